"""The norm that feeds the experts is found with all that reads it, and a scale moves out of it exactly."""

from __future__ import annotations

from pathlib import Path

import engine
import families
import pytest
import torch

from moecompress.arch.sites import NormFold
from moecompress.errors import UnsupportedModel
from moecompress.stream.fold import find_norm_fold, scaled_inputs
from moecompress.stream.model import StreamModel, open_model
from moecompress.stream.streams import run_layer
from moecompress.stream.structure import with_structure
from moecompress.types import ExpertWeights, LayerWeights

FOUND = {
    "mixtral": NormFold("post_attention_layernorm.weight", 0.0, ("mlp.gate.weight",)),
    "qwen2_moe": NormFold(
        "post_attention_layernorm.weight",
        0.0,
        (
            "mlp.gate.weight",
            "mlp.shared_expert.gate_proj.weight",
            "mlp.shared_expert.up_proj.weight",
            "mlp.shared_expert_gate.weight",
        ),
    ),
    "qwen3_next": NormFold(
        "post_attention_layernorm.weight",
        1.0,  # this family multiplies by 1 + weight
        (
            "mlp.gate.weight",
            "mlp.shared_expert.gate_proj.weight",
            "mlp.shared_expert.up_proj.weight",
            "mlp.shared_expert_gate.weight",
        ),
    ),
    "deepseek_v3": NormFold(
        "post_attention_layernorm.weight",
        0.0,
        ("mlp.gate.weight", "mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"),
    ),
    "gpt_oss": NormFold("post_attention_layernorm.weight", 0.0, ("mlp.router.weight",)),
}


def fold_of(path: Path, folder: Path) -> tuple[StreamModel, LayerWeights, NormFold]:
    """The fold of the last layer."""
    model = open_model(path)
    run = engine.token_run(model, engine.random_ids(3, 12), folder)
    index = model.facts.moe_layers[-1].index
    for before in range(index):
        run_layer(model, model.read_layer(before), run, "original")
    weights = model.read_layer(index)
    return model, weights, find_norm_fold(model, weights, run, "original")


@pytest.mark.parametrize("model_type", FOUND)
def test_norm_and_readers(model_type: str, tmp_path: Path) -> None:
    path = families.save_tiny(model_type, tmp_path / "model", torch.float32)
    _, _, found = fold_of(path, tmp_path)
    assert (found.norm, found.offset) == (FOUND[model_type].norm, FOUND[model_type].offset)
    assert sorted(found.readers) == sorted(FOUND[model_type].readers)


@pytest.mark.parametrize("model_type", families.FAMILIES)
def test_every_family_folds_or_says_why(model_type: str, tmp_path: Path) -> None:
    if model_type not in engine.STREAMED:
        pytest.skip("this family is not streamed at all")
    path = families.save_tiny(model_type, tmp_path / "model", torch.float32)
    facts = with_structure(open_model(path)).facts
    told = [facts.fold_problem(layer.index) for layer in facts.moe_layers]
    try:
        _, weights, found = fold_of(path, tmp_path)
    except UnsupportedModel as reason:
        assert "Next: set shared: false" in str(reason)
        assert told[-1 if model_type != "qwen4_exp_text" else 0] is not None, "the plan lets it pass"
        return
    assert found.norm in weights.tensors and all(name in weights.tensors for name in found.readers)
    assert told == [None] * len(told), "the plan refuses what works"


def test_a_norm_that_is_also_the_residual_is_told_without_weights(tmp_path: Path) -> None:
    """minimax adds the experts' output to the norm's own output: no module reads it, the layer does."""
    facts = with_structure(open_model(families.save_tiny("minimax", tmp_path / "model"))).facts
    assert "the layer itself computes with the output of post_attention_layernorm.weight" in str(facts.fold_problem(0))


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_scaled_inputs_in_float64(offset: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, scale = torch.randn(5, 8, generator=generator).double(), torch.rand(8, generator=generator).double() + 0.1
    tensors = {
        "norm.weight": torch.randn(8, generator=generator).double(),
        "norm.bias": torch.randn(8, generator=generator).double(),
        "gate.weight": torch.randn(3, 8, generator=generator).double(),
    }
    expert = ExpertWeights(torch.randn(4, 8, generator=generator).double(), torch.randn(8, 2).double())
    before = LayerWeights(0, tensors, (expert,))
    after = scaled_inputs(before, NormFold("norm.weight", offset, ("gate.weight",)), scale)

    def read(weights: LayerWeights) -> list[torch.Tensor]:
        normed = x * (offset + weights.tensors["norm.weight"]) + weights.tensors["norm.bias"]  # type: ignore[operator]
        return [normed @ w.t() for w in (weights.tensors["gate.weight"], weights.experts[0].gate_up)]  # type: ignore[union-attr]

    for found, wanted in zip(read(after), read(before), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert after.experts[0].down is expert.down and after.tensors["norm.weight"].dtype == torch.float64  # type: ignore[union-attr]
