"""Gradients with one layer in memory, and with all, equal those of ordinary autograd on transformers' own model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import engine
import families
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moecompress.numerics.grids import round_to_nearest
from moecompress.stream.model import StreamModel, open_model
from moecompress.stream.train import forward_backward
from moecompress.types import ExpertWeights, LayerWeights, Scheme, TokenBatch

FAMILIES = ("qwen3_moe", "deepseek_v3", "gpt_oss", "mixtral")
BATCH = TokenBatch(engine.random_ids(2, 16), (0, 1))


def loss(logits: Tensor, batch: TokenBatch) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.ids[:, 1:].flatten())


def trainables(model: StreamModel) -> dict[tuple[int, str], Tensor]:
    """Every router, norm and attention tensor of the first MoE layer, of one in the middle and of the last."""
    chosen = (1, 2, len(model.layers) - 1)
    found = {}
    for index in chosen:
        weights = model.read_layer(index)
        for name, role in model.facts.layers[index].roles.items():
            value = weights.tensors[name]
            if role in ("router", "norm", "attention") and isinstance(value, Tensor) and "correction" not in name:
                found[(index, name)] = value.float()
    assert {model.facts.layers[index].roles[name] for index, name in found} == {"router", "norm", "attention"}
    return found


def autograd(path: Path, wanted: Mapping[tuple[int, str], Tensor]) -> tuple[float, dict[tuple[int, str], Tensor]]:
    model = engine.own_model(path)
    parameters = dict(model.named_parameters())
    value = loss(model(input_ids=BATCH.ids, use_cache=False).logits.float(), BATCH)
    value.backward()
    return value.item(), {(i, name): parameters[f"model.layers.{i}.{name}"].grad for i, name in wanted}


@pytest.mark.parametrize("resident", [True, False], ids=["resident", "reloaded"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_gradients_equal_ordinary_autograd(model_type: str, resident: bool, tmp_path: Path) -> None:
    path = families.save_tiny(model_type, tmp_path, torch.float32)
    model = open_model(path)
    leaves = trainables(model)
    value, found = forward_backward(model, model.read_layer, loss, leaves, BATCH, resident=resident)
    wanted_value, wanted = autograd(path, leaves)
    assert value == pytest.approx(wanted_value, rel=1e-6)
    assert found.keys() == wanted.keys()
    for key, gradient in found.items():
        assert gradient.dtype == torch.float32 and not gradient.requires_grad
        assert engine.difference(gradient, wanted[key]) < 1e-4, key


def quantized(weights: LayerWeights) -> LayerWeights:
    scheme = Scheme(4, 32)

    def rounded(expert: ExpertWeights) -> ExpertWeights:
        assert isinstance(expert.gate_up, Tensor) and isinstance(expert.down, Tensor)
        return ExpertWeights(
            round_to_nearest(expert.gate_up.float(), scheme), round_to_nearest(expert.down.float(), scheme)
        )

    return weights.with_experts(tuple(rounded(expert) for expert in weights.experts))


def test_both_ways_agree_through_quantized_experts(tmp_path: Path) -> None:
    model = open_model(families.save_tiny("qwen3_moe", tmp_path))
    leaves = trainables(model)
    results = [
        forward_backward(model, lambda i: quantized(model.read_layer(i)), loss, leaves, BATCH, resident=resident)
        for resident in (True, False)
    ]
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert results[0][0] != pytest.approx(forward_backward(model, model.read_layer, loss, {}, BATCH)[0], rel=1e-6)
    for key in leaves:
        assert engine.difference(results[0][1][key], results[1][1][key]) < 1e-4, key


def test_a_step_against_the_gradient_lowers_the_loss(tmp_path: Path) -> None:
    model = open_model(families.save_tiny("mixtral", tmp_path, torch.float32))
    leaves = {(i, "mlp.gate.weight"): model.read_layer(i).tensors["mlp.gate.weight"] for i in range(4)}
    value, gradient = forward_backward(model, model.read_layer, loss, leaves, BATCH)  # type: ignore[arg-type]
    lower = {key: leaf - 0.01 * gradient[key] / gradient[key].norm() for key, leaf in leaves.items()}  # type: ignore[operator]
    assert forward_backward(model, model.read_layer, loss, lower, BATCH)[0] < value


def test_the_callers_tensors_are_left_alone(tmp_path: Path) -> None:
    model = open_model(families.save_tiny("qwen3_moe", tmp_path))
    leaf = torch.randn(8, 64, dtype=torch.bfloat16)
    forward_backward(model, model.read_layer, loss, {(1, "mlp.gate.weight"): leaf}, BATCH)
    assert not leaf.requires_grad and leaf.grad is None
    assert all(parameter.is_meta and not parameter.requires_grad for parameter in model.skeleton.parameters())


def test_a_tensor_without_influence_has_gradient_zero(tmp_path: Path) -> None:
    """A correction bias moves only the choice of experts, which has no gradient."""
    model = open_model(families.save_tiny("deepseek_v3", tmp_path, torch.float32))
    name = "mlp.gate.e_score_correction_bias"
    bias = model.read_layer(1).tensors[name]
    for resident in (True, False):
        found = forward_backward(model, model.read_layer, loss, {(1, name): bias}, BATCH, resident=resident)[1]  # type: ignore[dict-item]
        assert torch.equal(found[(1, name)], torch.zeros(8))


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    model = open_model(families.save_tiny("mixtral", tmp_path))
    for resident in (True, False):
        with pytest.raises(ValueError, match=r"layer 2: no tensors \['mlp.gat.weight'\].*mlp.gate.weight"):
            forward_backward(
                model, model.read_layer, loss, {(2, "mlp.gat.weight"): torch.zeros(8, 64)}, BATCH, resident=resident
            )
