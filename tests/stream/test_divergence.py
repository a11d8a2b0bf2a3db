"""KL per changed layer equals that of transformers' own model with the same layer changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import engine
import families
import pytest
import torch
from torch import Tensor

from moecompress.stream.divergence import layer_divergence
from moecompress.stream.model import open_model
from moecompress.types import LayerWeights


def halved(weights: LayerWeights) -> LayerWeights:
    """Every expert at half its output."""
    down = [expert.down for expert in weights.experts]
    assert all(isinstance(value, Tensor) for value in down)
    made = [replace(expert, down=value / 2) for expert, value in zip(weights.experts, down, strict=True)]  # type: ignore[operator]
    return weights.with_experts(tuple(made))


@pytest.mark.parametrize("batch_tokens", [8, 64])
def test_against_the_whole_model(batch_tokens: int, tmp_path: Path) -> None:
    path = families.save_tiny("mixtral", tmp_path, torch.float32)
    ids = engine.random_ids(3, 8)
    model = open_model(path)
    found = layer_divergence(model, model.read_layer, halved, ids, batch_tokens=batch_tokens)
    assert sorted(found) == [layer.index for layer in model.facts.moe_layers]
    own = engine.own_model(path)
    with torch.no_grad():
        wanted = own(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
        for index, value in found.items():
            down = own.model.layers[index].mlp.experts.down_proj
            down.div_(2)
            q = own(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
            down.mul_(2)
            kl = (wanted.exp() * (wanted - q)).sum(-1).mean()
            assert value == pytest.approx(float(kl), rel=1e-4) and value > 0


def test_an_unchanged_layer_costs_nothing(tmp_path: Path) -> None:
    model = open_model(families.save_tiny("mixtral", tmp_path, torch.float32))
    found = layer_divergence(model, model.read_layer, lambda weights: weights, engine.random_ids(2, 8))
    assert set(found.values()) == {0.0}
