"""The ablation script: every row is a recipe that the library knows, draws are repeatable, tables add up."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from moecompress.registry import PASSES, pass_class

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture(scope="module")
def script() -> Any:
    sys.path.insert(0, str(SCRIPTS))  # as when it is run: it shares a function with the script beside it
    spec = importlib.util.spec_from_file_location("bench_ablation", SCRIPTS / "bench_ablation.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(SCRIPTS))
    return module


def arguments(folder: Path, **more: Any) -> argparse.Namespace:
    for name, first in (("text", 0), ("own", 1000)):
        save_file({"ids": torch.arange(first, first + 40)[:, None].expand(40, 8).contiguous()}, folder / f"{name}.st")
    known = {"tokens": folder / "text.st", "ebss": folder / "own.st", "ebss_paper": None, "out": folder}
    return argparse.Namespace(**{**known, "samples": 10, "length": 8, **more})


def test_every_row_is_made_of_known_passes(script: Any) -> None:
    for row in script.DEFAULT:
        for step in script.METHODS[row.split("/")[0]][0]:
            for name, options in step.items():
                if name in PASSES:
                    pass_class(name)(**options)
    assert len(set(script.DEFAULT)) == len(script.DEFAULT) > 0


def test_draws_are_repeatable_and_halves_are_halves(script: Any, tmp_path: Path) -> None:
    given = arguments(tmp_path)
    files = {}
    for source in ("text", "ebss", "half", "text-balanced", "half-balanced"):
        for seed in (0, 1):
            spec = script.calibration(source, seed, given)["calibration"]
            files[source, seed] = load_file(spec["files"][0])["ids"][:, 0]
            assert spec["samples"] == 10 and ("balance" in spec) == source.endswith("-balanced")
            assert torch.equal(
                load_file(script.calibration(source, seed, given)["calibration"]["files"][0])["ids"][:, 0],
                files[source, seed],
            )
    assert not torch.equal(files["text", 0], files["text", 1])
    assert len(files["half", 0]) == 10 and int((files["half", 0] >= 1000).sum()) == 5
    assert len(files["half-balanced", 0]) == 25 and bool((files["ebss", 0] >= 1000).all())
    assert all(len(set(rows.tolist())) == len(rows) for rows in files.values())
    assert script.calibration("none", 0, given) == {}


def test_a_pool_is_no_larger_than_what_there_is(script: Any, tmp_path: Path) -> None:
    spec = script.calibration("text-balanced", 0, arguments(tmp_path, samples=32))["calibration"]
    assert len(load_file(spec["files"][0])["ids"]) == 40 and spec["balance"]["pool"] * 32 == 40


def test_tokens_may_be_text(script: Any, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("One sentence of some words. " * 40)
    given = arguments(tmp_path, tokens=file, model=SCRIPTS.parent / "tests" / "checkpoints" / "bench-a", samples=4)
    rows = load_file(script.calibration("text", 0, given)["calibration"]["files"][0])["ids"]
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    stream = tokenizer(file.read_text(), add_special_tokens=False)["input_ids"]
    assert rows.shape == (4, 8)
    assert all(any(row == stream[at : at + 8] for at in range(0, len(stream) - 7, 8)) for row in rows.tolist())


def test_what_is_missing_is_named(script: Any, tmp_path: Path) -> None:
    assert script.missing("gptq/w3g32/0", arguments(tmp_path)) is None
    assert script.missing("+ebss-paper/w3g32/0", arguments(tmp_path)) == "needs --ebss-paper"
    assert script.missing("+half-ebss/w3g32/0", arguments(tmp_path, ebss=None)) == "needs --ebss"


def test_the_table_averages_seeds_and_domains(script: Any) -> None:
    rows = {
        f"gptq/w3g32/{seed}": {
            "kl": {"a.txt": 0.1 + seed, "b.txt": 0.3 + seed, "all": 9.0},
            "perplexity": {"a.txt": 10.0 + seed, "b.txt": 40.0, "all": 20.0 + seed},
            "router_agreement": [1.0, 0.8],
            "cpu_seconds": 10.0,
        }
        for seed in (0, 1)
    }
    assert script.mean_kl(rows["gptq/w3g32/0"]) == pytest.approx(0.2)
    line = script.table(rows).splitlines()[-1]
    assert line == "| gptq | w3g32 | 2 | 0.6000 (10.50) | 0.8000 (40.00) | 0.7000 ± 0.7071 | 20.500 | 0.9000 | 10 |"
