"""Rounded activations are really rounded: in the streamed run, in the loaded model, and in every format's promise."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import engine
import families
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from moecompress.errors import UnsupportedModel
from moecompress.load import load
from moecompress.stream.model import open_model

IDS = engine.random_ids(2, 24)
ALL = ["routed_experts", "attention", "shared_experts"]


def compressed(folder: Path, source: Path, passes: list[Any], **sections: Any) -> Path:
    """The output of a run; its reload check has compared the loaded model with the streamed one."""
    folder.mkdir()
    sections.setdefault("output", {"format": "native"})
    done = engine.command("run", engine.write_recipe(folder, source, passes, **sections))
    assert done.code == 0, done.err
    return folder / "out"


def rtn(bits: int, activations: int | None = None, **more: Any) -> dict[str, Any]:
    chosen = {} if activations is None else {"activation_bits": activations}
    return {"quantize.rtn": {"bits": bits, "group_size": 16, **chosen, **more}}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits.float()


def slow_round(x: Tensor, bits: int, clip: float) -> Tensor:
    """Token by token, in float64 but for the scale."""
    made = torch.empty_like(x)
    top = 2 ** (bits - 1) - 1
    for index in range(x.reshape(-1, x.shape[-1]).shape[0]):
        row = x.reshape(-1, x.shape[-1])[index]
        scale = float(row.abs().max() * (clip / top)) or 1.0
        made.reshape(-1, x.shape[-1])[index] = torch.round(row / scale).clamp(-top - 1, top) * scale
    return made


def by_hand(root: Path, bits: int, clip: float = 1.0) -> Tensor:
    """Logits of the dense model with the same weights, whose experts round their inputs one token after the other."""
    model = open_model(root)
    own = engine.own_model(root.parent.parent / "model")
    for layer in model.facts.moe_layers:
        weights, site = model.read_layer(layer.index), layer.site
        assert site is not None
        module = own.get_submodule(f"{layer.name}.{site.experts}")
        module.forward = _naive(module, weights.experts, bits, clip)
    return logits(own)


def _naive(module: nn.Module, experts: Any, bits: int, clip: float) -> Any:
    from moecompress.numerics.grids import dequantize

    def forward(hidden: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for token in range(hidden.shape[0]):
            for slot in range(ids.shape[1]):
                expert = experts[int(ids[token, slot])]
                x = slow_round(hidden[token], bits, clip)
                gate, up = (x @ dequantize(expert.gate_up).t()).chunk(2, -1)
                middle = slow_round(nn.functional.silu(gate) * up, bits, clip)
                out[token] += gates[token, slot] * (middle @ dequantize(expert.down).t())
        return out

    return forward


@pytest.mark.parametrize(("bits", "clip"), [(4, 1.0), (4, 0.9), (8, 1.0)])
def test_the_loaded_model_rounds_as_a_slow_loop(
    bits: int, clip: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.reload_here(monkeypatch)
    source = families.save_tiny("qwen3_moe", tmp_path / "model", torch.float32)
    out = compressed(tmp_path / "run", source, [rtn(4, bits, activation_clip=clip)])
    found = logits(load(out))
    off = (found - by_hand(out, bits, clip)).norm(dim=-1) / found.norm(dim=-1)
    assert float(off.median()) < 1e-5  # a tie broken the other way moves single tokens


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "nemotron_h", "granitemoe"])
def test_families_run_and_load_with_all_targets(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run itself compares the loaded model with the streamed one; here: that rounding more changes more."""
    engine.reload_here(monkeypatch)
    source = families.save_tiny(model_type, tmp_path / "model", torch.float32)
    shared = [
        name for name in ALL if name != "shared_experts" or model_type not in ("mixtral", "gpt_oss", "granitemoe")
    ]
    size = {"group_size": -1, "targets": shared}
    made = {a: logits(load(compressed(tmp_path / f"a{a}", source, [rtn(8, a, **size)]))) for a in (4, 8, None)}
    assert made[None] is not None
    off = {a: float((made[a] - made[None]).norm() / made[None].norm()) for a in (4, 8)}
    assert off[4] > 4 * off[8] > 0


def test_gptq_hqq_and_learned_round_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.reload_here(monkeypatch)
    source = families.save_tiny("qwen3_moe", tmp_path / "model", torch.float32)
    tokens = tmp_path / "ids.safetensors"
    save_file({"input_ids": engine.random_ids(8, 32).int()}, tokens)
    calibration = {"source": "tokens", "files": [str(tokens)], "samples": 8, "length": 32}
    for name in ("quantize.gptq", "quantize.hqq", "quantize.learned"):
        more = {"steps": 4, "samples": 64, "min_tokens": 0} if name == "quantize.learned" else {}
        step = {name: {"bits": 4, "group_size": 16, "activation_bits": 4, "activation_clip": 0.95, **more}}
        out = compressed(tmp_path / name, source, [step], calibration=calibration)
        block = engine.read_json(out / "config.json")["quantization_config"]
        kinds = {
            (m["activation"], m["activation_clip"]) for layout in block["layouts"] for m in layout["matrices"].values()
        }
        assert kinds == {("int4", 0.95)}


def test_saved_again_it_stays_rounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.reload_here(monkeypatch)
    source = families.save_tiny("qwen2_moe", tmp_path / "model", torch.float32)
    out = compressed(tmp_path / "run", source, [rtn(4, 4, targets=ALL, group_size=-1)])
    model = load(out)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))
    linear = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert linear.weight.shape == (linear.out_features, linear.in_features) and linear.weight.dtype == torch.float32
    with pytest.raises(UnsupportedModel, match="inputs are rounded.*leave activation_bits out"):
        torch.nn.functional.linear(torch.ones(1, linear.in_features), linear.weight)
    with pytest.raises(UnsupportedModel, match="rounded to int4.*run it packed"):
        load(out, dequantize=True)
    alone = compressed(tmp_path / "alone", source, [rtn(4, 4, targets="attention", group_size=-1)])
    with pytest.raises(UnsupportedModel, match="rounded to int4.*run it packed"):
        load(alone, dequantize=True)


@pytest.mark.parametrize(
    ("kind", "text"),
    [("portable", "rounded activations.*use format: native"), ("dense", "full activations .activation_bits.*native")],
)
def test_formats_that_cannot_round_are_refused_by_plan(kind: str, text: str, tmp_path: Path) -> None:
    source = families.save_tiny("qwen3_moe", tmp_path / "model")
    recipe = engine.write_recipe(tmp_path, source, [rtn(4, 4)], output={"format": kind})
    done = engine.command("plan", recipe)
    assert done.code == 2
    assert re.search(text, done.out + done.err, re.S), done.out + done.err


def test_auto_takes_native_and_the_plan_says_so(tmp_path: Path) -> None:
    source = families.save_tiny("qwen3_moe", tmp_path / "model")
    done = engine.command("plan", engine.write_recipe(tmp_path, source, [rtn(4, 8)]))
    assert done.code == 0 and "(native)" in done.out and "inputs int8" in done.out


def test_a_clip_without_rounding_is_refused(tmp_path: Path) -> None:
    source = families.save_tiny("qwen3_moe", tmp_path / "model")
    done = engine.command("plan", engine.write_recipe(tmp_path, source, [rtn(4, None, activation_clip=0.9)]))
    assert done.code == 2 and "activation_clip has nothing to clip" in done.err
