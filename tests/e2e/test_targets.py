"""Experts in few bits beside attention and shared experts in more: the shipped presets, on tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engine
import families
import pytest
import torch
from safetensors.torch import save_file

from moecompress.load import load
from moecompress.stream.model import open_model
from moecompress.types import QuantizedTensor

#: preset -> (family, bits of attention, of shared experts, of routed experts, passes whose group size is set to 16)
PRESETS: dict[str, tuple[str, int, int | None, int, dict[int, str]]] = {
    "experts-w3-rest-w8": ("qwen3_moe", 8, None, 3, {2: "gptq"}),
    "experts-w3-rest-w4": ("qwen2_moe", 4, 4, 3, {0: "gptq", 2: "gptq"}),
    "eac-moe-w3": ("mixtral", 4, None, 3, {0: "gptq", 2: "gptq"}),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_run_plan_and_load(preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.reload_here(monkeypatch)
    family, attention, shared, experts, groups = PRESETS[preset]
    sizes: dict[str, Any] = {"shared_expert_intermediate_size": 48} if shared else {}
    path = families.save_tiny(family, tmp_path / "model", **sizes)
    ids, out = engine.random_ids(24, 24), tmp_path / "out"
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    (tmp_path / "mine.yaml").write_text(
        f"extends: {preset}\nmodel: {path}\noutput: {{dir: {out}, format: native}}\n"
        f"calibration: {{source: tokens, files: [{tmp_path / 'ids.safetensors'}], samples: 24, length: 24}}\n"
    )
    small = [part for at, name in groups.items() for part in ("--set", f"passes.{at}.quantize.{name}.group_size=16")]
    planned = engine.command("plan", tmp_path / "mine.yaml", *small)
    assert planned.code == 0, planned.err
    assert f"quantize {experts}-bit" in planned.out and f"quantize {attention}-bit" in planned.out
    done = engine.command("run", tmp_path / "mine.yaml", *small)
    assert done.code == 0, done.err
    model = open_model(out)
    for layer in model.facts.moe_layers:
        weights = model.read_layer(layer.index)
        for name in layer.linears:
            value = weights.tensors[name]
            wanted = {"attention": attention, "shared_experts": shared}[layer.roles[name]]
            bits = value.scheme.bits if isinstance(value, QuantizedTensor) else None
            assert bits == wanted, name
        for expert in model.read_experts(layer.index):
            assert isinstance(expert.gate_up, QuantizedTensor) and expert.gate_up.scheme.bits == experts
        assert isinstance(weights.tensors["mlp.gate.weight"], torch.Tensor)
    with torch.no_grad():
        logits = load(out, dtype=torch.float32)(input_ids=ids[:2], use_cache=False).logits
    assert engine.difference(logits, engine.streamed_logits(model, ids[:2], tmp_path / "stream")) < 1e-4
    routers = [row["router"]["aligned"] for row in engine.read_json(out / "moecompress" / "report.json")["layers"]]
    assert all(len(said) == 1 for said in routers)


def test_families_without_shared_experts_are_told(tmp_path: Path) -> None:
    path = families.save_tiny("qwen3_moe", tmp_path / "model")
    passes = [{"quantize.rtn": {"bits": 8, "group_size": -1, "targets": ["attention", "shared_experts"]}}]
    done = engine.command("plan", engine.write_recipe(tmp_path, path, passes))
    assert done.code == 2 and "this model has no shared_experts" in done.out + done.err
