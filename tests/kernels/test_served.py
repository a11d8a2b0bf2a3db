"""A native checkpoint evaluated as it is served has the figures of the streamed evaluation, and names its kernels."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import moecompress
from moecompress.errors import RecipeError
from moecompress.evaluate import evaluate_dir
from moecompress.packed import STREAMED
from moecompress_kernels import cpu

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
PASSES: list[dict[str, Any]] = [
    {"prune.random": {"keep": 0.75}},
    {"quantize.rtn": {"bits": 3, "group_size": 16, "targets": ["routed_experts", "attention"]}},
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(
        "".join(f"In the year {1800 + number} the town had {number * 37 % 91} houses. " for number in range(90))
    )
    return str(file)


@pytest.fixture(scope="module", params=["whole", "pruned"])
def native(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, bench_a: Path, text: str) -> Path:
    root = tmp_path_factory.mktemp(request.param)
    recipe = {
        "model": str(bench_a),
        "calibration": {"source": "text", "files": [text], "samples": 4, "length": 32},
        "passes": PASSES if request.param == "pruned" else PASSES[1:],
        "output": {"dir": str(root / "out"), "format": "native"},
    }
    (root / "recipe.yaml").write_text(json.dumps(recipe))
    return moecompress.run(root / "recipe.yaml")


def measured(path: Path, text: str, **options: Any) -> dict[str, Any]:
    return evaluate_dir(path, [text], length=48, windows=6, save=False, **options)


@pytest.mark.parametrize("activation_bits", [None, 8])
def test_figures_are_those_of_the_streamed_evaluation(
    native: Path, text: str, bench_a: Path, activation_bits: int | None
) -> None:
    """To 1e-3 of everything in float32, where rounded inputs may still fall to the next code; in bfloat16 nearly."""
    options = {"reference": bench_a, "activation_bits": activation_bits}
    streamed, own = (measured(native, text, served=served, **options) for served in (False, True))
    exact = measured(in_float32(native), text, served=True, **options)
    assert streamed["backend"].startswith(STREAMED)
    for served, tolerance in ((exact, 1e-3), (own, 1e-2)):
        for name in ("kl", "top1_agreement"):
            assert abs(streamed[name]["text"] - served[name]["text"]) <= 3 * tolerance * streamed[name]["text"], name
        values = [found["perplexity"]["text"]["value"] for found in (streamed, served)]
        assert 0 < abs(values[0] - values[1]) <= tolerance * values[0], values
        pairs = list(zip(streamed["router_agreement"], served["router_agreement"], strict=True))
        if "pruned" in str(native):  # numbers mean other experts then
            assert pairs == [(None, None)] * 4
        else:
            assert len(pairs) == 4 and all(min(pair) > 0.5 and abs(pair[0] - pair[1]) <= 0.02 for pair in pairs), pairs
        assert " packed modules by cpu, " in served["backend"] and "not triton: " in served["backend"]
        assert served["backend"].endswith("rounded to int8") == (activation_bits == 8)


def in_float32(native: Path) -> Path:
    """The same checkpoint with a config that asks for float32."""
    copied = native.parent / "float32"
    if not copied.exists():
        shutil.copytree(native, copied)
        config = json.loads((copied / "config.json").read_text())
        (copied / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    return copied


def test_only_packed_checkpoints_are_served_so(text: str, bench_a: Path) -> None:
    with pytest.raises(RecipeError, match="kernels run packed weights. Allowed: the native format"):
        measured(bench_a, text, served=True)
