"""Whole models whose packed weights run on the CUDA kernels (under the shim) give what PyTorch gives."""

from __future__ import annotations

import json
from pathlib import Path

import families
import pytest
import torch

import moecompress
from moecompress import ops
from moecompress.packed import Packed
from moecompress_kernels import cuda


def compressed(family: str, root: Path) -> Path:
    source = families.save_tiny(family, root / "source")
    step = {"quantize.rtn": {"bits": 3, "group_size": -1, "targets": ["routed_experts", "attention"]}}
    recipe = root / "recipe.yaml"
    recipe.write_text(
        json.dumps({"model": str(source), "passes": [step], "output": {"dir": str(root / "out"), "format": "native"}})
    )
    return moecompress.run(recipe)


@pytest.mark.parametrize("family", ["gpt_oss", "nemotron_h", "gemma4_text"])
def test_families(family: str, tmp_path: Path, on_shim: cuda.Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gates of both orders, clamps, biases, gelu, no gate; prefill of 24 tokens and decode of one."""
    output = compressed(family, tmp_path)
    ids = torch.arange(100, 124)[None] % families.VOCABULARY
    logits = {}
    for name in ("torch", "cuda"):
        monkeypatch.setattr(ops, "unavailable", lambda one, name=name: None if one == name else "for a test")
        monkeypatch.setattr(cuda, "unfit", lambda layer, device: cuda._unfit(layer, on_shim))
        model = moecompress.load(output, dtype=torch.float16)
        with torch.no_grad():
            logits[name] = [model(ids).logits.float(), model(ids[:, :1]).logits.float()]
        packed = [module for module in model.modules() if isinstance(module, Packed)]
        assert packed and all(module.choice.backend == name for module in packed if module.choice)
    for found, wanted in zip(logits["cuda"], logits["torch"], strict=True):
        assert float((found - wanted).norm() / wanted.norm()) < 0.01
