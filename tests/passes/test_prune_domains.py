"""EASY-EP on several domains: every domain counts alike, and demonstrations are the model's own answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import engine
import pytest
import torch
from pruned import execute
from safetensors.torch import save_file


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    engine.reload_here(monkeypatch)


def importance(out: Path) -> torch.Tensor:
    rows = engine.read_json(out / "moecompress" / "report.json")["layers"]
    return torch.tensor([[e["importance"] for e in row["experts"]] for row in rows], dtype=torch.float64)


def sets(folder: Path, **wanted: Any) -> dict[str, Any]:
    made = {}
    for name, ids in wanted.items():
        save_file({"ids": ids.int()}, folder / f"{name}.safetensors")
        tokens = {"source": "tokens", "files": [str(folder / f"{name}.safetensors")], "heldout": 0}
        made[name] = {**tokens, "samples": ids.shape[0], "length": ids.shape[1]}
    return made


@pytest.mark.parametrize("counts", ["uniform", "global"])
def test_domains_are_normed_and_averaged(counts: str, tmp_path: Path, bench_a: Path) -> None:
    few, many = engine.random_ids(1, 32, 0, vocabulary=400), engine.random_ids(5, 32, 1, vocabulary=4000)
    known = sets(tmp_path, few=few, many=many)
    step = {"keep": 0.5, "counts": counts}
    alone = [
        importance(
            execute(tmp_path / name, bench_a, [{"prune.easy_ep": {**step, "calibration": name}}], calibration=known)
        )
        for name in known
    ]
    both = {**step, "calibration": ["few", "many"]}
    mixed = importance(execute(tmp_path / "mixed", bench_a, [{"prune.easy_ep": both}], calibration=known))
    wanted = sum(score / score.sum(1, keepdim=True) for score in alone) / 2
    torch.testing.assert_close(mixed, torch.as_tensor(wanted))


def test_names_of_sets_are_checked(tmp_path: Path, bench_a: Path) -> None:
    known = sets(tmp_path, few=engine.random_ids(1, 32))
    passes = [{"prune.easy_ep": {"calibration": ["few", "man"]}}]
    done = engine.command("plan", engine.write_recipe(tmp_path, bench_a, passes, calibration=known))
    assert done.code == 2 and "'man' is no calibration set" in done.out + done.err


def test_demonstrations_are_the_models_own_answers(tmp_path: Path, bench_a: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"text": f"In the year {year} the town"}) + "\n" for year in range(1900, 1940))
    )
    spec = {"source": "answers", "files": [str(prompts)], "samples": 2, "length": 32, "max_tokens": 16, "heldout": 0}
    out = execute(tmp_path, bench_a, [{"prune.easy_ep": {"keep": 0.5}}], calibration=spec)
    origin = engine.read_json(out / "moecompress" / "report.json")["calibration"][0]["origin"]
    assert origin["source"] == "answers" and bool((importance(out) > 0).any(1).all())
