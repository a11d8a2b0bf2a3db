"""Whatever was done to a model, in every dtype: generating runs the compiled kernels and expands no expert."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engine
import families
import mixed
import pruned
import pytest
import torch

import moecompress
from moecompress import ops
from moecompress.packed import Packed, backends
from moecompress.run import run
from moecompress_kernels import cpu

pytestmark = [
    pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable())),
    pytest.mark.slow,
]
RTN = {"quantize.rtn": {"bits": 4, "group_size": 16, "targets": ["routed_experts", "attention"]}}
OTP = {"steps": 4, "batch": 2, "target": 0.5, "learning_rate": 0.2, "penalty_rate": 5.0, "width": 4}
KINDS: dict[str, list[Any]] = {
    "mixed bits": [],
    "W3A4": [{"quantize.rtn": {"bits": 3, "group_size": 16, "activation_bits": 4}}],
    "pruned": [{"prune.random": {"keep": 0.5}}, RTN],
    "merged": [{"merge.m_smoe": {"keep": 0.5}}, RTN],
    "top_k": [RTN, {"prune.top_k": {}}],
    "odp": [RTN, {"prune.odp": {"quantile": 0.6, "protect": 0.1}}],
    "otp": [RTN, {"prune.otp": OTP}],
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.save_tiny("qwen3_moe", tmp_path_factory.mktemp("kinds") / "source")


@pytest.fixture(params=KINDS)
def native(request: pytest.FixtureRequest, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    engine.reload_here(monkeypatch)
    output = {"output": {"dir": str(tmp_path / "run" / "out"), "format": "native"}}
    if request.param == "mixed bits":
        (tmp_path / "run").mkdir()
        return run(mixed.mixed_recipe(tmp_path / "run", source, (1, 2, 3, 4, -4, 8), **output))
    return pruned.execute(tmp_path / "run", source, KINDS[request.param], **output)


@pytest.fixture
def unexpanded(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Expanding a packed weight fails, whoever asks for it."""

    def never(*_: Any) -> Any:
        raise AssertionError("a packed weight was expanded")

    for name in ("moecompress.ops.dequantize", "moecompress.ops.decode", "moecompress.experts.decode"):
        monkeypatch.setattr(name, never)
    yield monkeypatch


def test_generation_runs_compiled_kernels(native: Path, unexpanded: pytest.MonkeyPatch) -> None:
    prompts = torch.tensor([[0, 0, 7, 8, 9], [11, 12, 13, 14, 15], [0, 3, 4, 5, 6]])
    seen = (prompts > 0).long()
    logits = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for activation_bits in (None, 8):
            model = moecompress.load(native, dtype=dtype, activation_bits=activation_bits)
            for rows in (1, 3):
                options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
                made = model.generate(prompts[-rows:], attention_mask=seen[-rows:], **options)
                assert made.shape == (rows, 9)
            packed = [module for module in model.modules() if isinstance(module, Packed)]
            assert len(packed) >= families.LAYERS
            assert all(module.choice is not None and module.choice.backend == "cpu" for module in packed)
            assert sum(int(row.split()[0]) for row in backends(model) if " by cpu, " in row) == len(packed)
            with torch.no_grad():
                logits[dtype, activation_bits] = model(prompts, attention_mask=seen).logits.float()
    unexpanded.undo()
    unexpanded.setattr(ops, "unavailable", lambda name: "for a test")
    model = moecompress.load(native, dtype=torch.float32)
    with torch.no_grad():
        wanted = model(prompts, attention_mask=seen).logits
    exact = seen.bool()[..., None]

    def distance(found: torch.Tensor) -> float:
        return float(((found - wanted) * exact).norm() / (wanted * exact).norm())

    assert distance(logits[torch.float32, None]) <= 1e-4
    assert all(distance(found) <= 0.2 for found in logits.values())
