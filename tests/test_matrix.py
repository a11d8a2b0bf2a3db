"""The pass x family matrix, a part of it: every pass on two families, and several passes in a row on some.

The rest is in `tests/matrix.json`, which `scripts/matrix.py` makes; here it must agree with what is tried.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engine
import matrix
import pytest

from moecompress import registry

PASSES = registry.pass_names()
PLAIN = "qwen3_moe"
PAIRS = sorted(
    {(name, PLAIN) for name in PASSES}
    | {(name, matrix.FAMILIES[i * 7 % len(matrix.FAMILIES)]) for i, name in enumerate(PASSES)}
)
LONG = ("prune.easy_ep", "smooth.awq", "quantize.gptq")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    engine.reload_here(monkeypatch)


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_a_pass_runs_reloads_and_generates_or_is_refused_by_the_plan(name: str, family: str, tmp_path: Path) -> None:
    found = matrix.attempt(matrix.steps_of(name), matrix.source(family, tmp_path), tmp_path / "run")
    wanted = matrix.kept()["refused"].get(name, {}).get(family)
    assert found.refused == wanted, "matrix.json says otherwise; run scripts/matrix.py"


@pytest.mark.parametrize("family", matrix.FAMILIES[::7])
def test_passes_in_a_row(family: str, tmp_path: Path) -> None:
    refused = matrix.kept()["refused"]
    steps: list[Any] = [step for name in LONG for step in matrix.steps_of(name)[:1] if family not in refused[name]]
    assert matrix.attempt(steps, matrix.source(family, tmp_path), tmp_path / "run").refused is None


def test_the_table_is_of_this_registry_and_these_families_and_stands_in_the_readme() -> None:
    kept = matrix.kept()
    assert kept["passes"] == list(PASSES) and kept["families"] == list(matrix.FAMILIES), "run scripts/matrix.py"
    assert matrix.table(kept) in matrix.README.read_text("utf-8"), "run scripts/matrix.py --write"


def test_reasons_are_told_without_places() -> None:
    text = "recipe.yaml:3: smooth.awq: layer 0: no norm in layers.3 before layer 4. Next: set shared: false"
    assert matrix.reason(text) == "no norm in a layer before a layer; set shared: false"
