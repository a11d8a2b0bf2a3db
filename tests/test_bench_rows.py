"""The resumable tables of the benchmark scripts: finished rows are not measured again, and every row is a recipe."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moecompress.registry import pass_class

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield importlib.import_module
    for name in ("bench_rows", "bench_pruning"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("lines", [False, True])
def test_a_stopped_table_goes_on_where_it_stopped(lines: bool, script: Any, tmp_path: Path) -> None:
    made, out = script("bench_rows").Rows, tmp_path / "out"
    first = made(out, lambda found: " ".join(found), lines)
    for name in ("b", "a"):
        first.add(name, {"row": name, "kl": 0.5})
    assert (out / "table.md").read_text() == "b a"
    again = made(out, lambda found: " ".join(found), lines)
    assert again.found == first.found and list(again.missing(["a", "c", "b", "d"])) == ["c", "d"]
    asked = again.missing(iter(["c", "c", "d"]))
    for name in asked:
        again.add(name, {"row": name, "kl": 1.0})
    assert list(made(out, len, lines).found) == ["b", "a", "c", "d"]


def test_every_row_of_the_pruning_table_is_a_recipe(script: Any, tmp_path: Path) -> None:
    bench = script("bench_pruning")
    text = tmp_path / "code.txt"
    text.write_text("for x in y: pass\n" * 2000)
    known = {"out": tmp_path, "tokens": tmp_path / "ids", "samples": 4, "length": 8, "demonstrations": 2}
    given = argparse.Namespace(**known, domain=[f"code={text}"])
    sources = {"": "tokens", "@code": "text", "@code.answers": "answers"}
    for method in bench.METHODS:
        for domain, source in sources.items():
            made = bench.work(f"{method}{domain}+gptq3-0.5", given)
            assert made["calibration"]["source"] == source and Path(made["calibration"]["files"][0]).name
            for step in made["passes"]:
                for name, options in step.items():
                    pass_class(name)(**options)
    assert len(set(bench.ROWS)) == len(bench.ROWS)


def test_rows_judged_on_one_domain_are_told_inside_and_outside(script: Any) -> None:
    row = {
        "kl": {"a.txt": 1.0, "b.txt": 2.0, "c.txt": 6.0},
        "perplexity": dict.fromkeys(("a.txt", "b.txt", "c.txt"), 9),
    }
    rows = {name: {**row, "bytes": 2**20, "seconds": 3} for name in ("reap-0.5", "reap@b-0.5", "ean@b.answers-0.5")}
    table = script("bench_pruning").table(rows).splitlines()
    assert table[2] == "| reap | 0.5 | 1.000 (9.00) | 2.000 (9.00) | 6.000 (9.00) | 3.000 | 1.00 | 3 |"
    assert table[-2:] == ["| ean@b.answers-0.5 | 2.000 | 3.500 |", "| reap@b-0.5 | 2.000 | 3.500 |"]
