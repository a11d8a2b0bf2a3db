"""Whole models whose packed weights run on the device's kernels, here on the CPU, give what PyTorch gives."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import families
import pytest
import torch

import moecompress
from moecompress import ops
from moecompress.experts import PackedLinear
from moecompress.packed import Packed, backend_name
from moecompress_kernels import cuda, triton

triton_is_here = importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"


def compressed(family: str, root: Path) -> Path:
    source = families.save_tiny(family, root / "source")
    step = {"quantize.rtn": {"bits": 3, "group_size": -1, "targets": ["routed_experts", "attention"]}}
    recipe = root / "recipe.yaml"
    recipe.write_text(
        json.dumps({"model": str(source), "passes": [step], "output": {"dir": str(root / "out"), "format": "native"}})
    )
    return moecompress.run(recipe)


def only(name: str, device: cuda.Device, patch: pytest.MonkeyPatch) -> None:
    """Let this backend be the one that can run, on CPU tensors."""
    patch.setattr(ops, "unavailable", lambda one: None if one == name else "for a test")
    patch.setattr(cuda, "unfit", lambda layer, where: cuda._unfit(layer, device))
    patch.setattr(triton, "unfit", lambda layer, where: triton.misfit(layer))


def packed_modules(model: torch.nn.Module) -> list[Packed]:
    return [module for module in model.modules() if isinstance(module, Packed)]


@pytest.mark.parametrize("family", ["gpt_oss", "nemotron_h", "gemma4_text"])
def test_families(family: str, tmp_path: Path, on_shim: cuda.Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gates of both orders, clamps, biases, gelu, no gate; prefill of 24 tokens and decode of one."""
    output = compressed(family, tmp_path)
    ids = torch.arange(100, 124)[None] % families.VOCABULARY
    logits = {}
    for name in ("torch", "cuda", *(["triton"] if triton_is_here and family == "gpt_oss" else [])):
        only(name, on_shim, monkeypatch)
        model = moecompress.load(output, dtype=torch.float16)
        with torch.no_grad():
            logits[name] = [model(ids).logits.float(), model(ids[:, :1]).logits.float()]
        packed = packed_modules(model)
        assert packed and all(module.choice.backend == name for module in packed if module.choice)
    for name in logits:
        for found, wanted in zip(logits[name], logits["torch"], strict=True):
            assert float((found - wanted).norm() / wanted.norm()) < 0.01


def test_inputs_of_a_dtype_that_kernels_do_not_take(
    tmp_path: Path, on_shim: cuda.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A float32 model runs in PyTorch and says why; made float16, on the kernels; given float32, in PyTorch again."""
    only("cuda", on_shim, monkeypatch)
    output, ids = compressed("mixtral", tmp_path), torch.arange(5, 12)[None]
    model = moecompress.load(output, dtype=torch.float32)
    reason = "inputs are float32; it takes bfloat16 and float16"
    assert all(one.choice and ("cuda", reason) in one.choice.refused for one in packed_modules(model))
    assert reason in backend_name(model)
    with torch.no_grad():
        wanted = model(ids).logits
        model.to(torch.float16)
        found = model(ids).logits.float()
        assert all(one.choice and one.choice.backend == "cuda" for one in packed_modules(model))
        assert float((found - wanted).norm() / wanted.norm()) < 0.01
        one = next(one for one in packed_modules(model) if isinstance(one, PackedLinear))
        inputs = torch.randn(3, one.in_features)
        assert float((one(inputs) - one(inputs.half()).float()).norm() / one(inputs).norm()) < 0.01
        assert one.choice == ops.Choice("torch", (("cuda", reason), *one.choice.refused[1:]))  # it stays there
