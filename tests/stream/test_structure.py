"""What the structure of a layer tells about its experts, against what the layer does with values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engine
import families
import pytest
import torch
from torch import Tensor

from moecompress.stream.layers import call_layer, experts_of, filled_layer
from moecompress.stream.model import open_model
from moecompress.stream.structure import with_structure

# What no trace tells: layers whose computation depends on values, of which the weights decide.
UNTOLD = {"qwen4_exp_text"}


@pytest.mark.parametrize("model_type", engine.STREAMED)
def test_the_gain_of_the_experts_output(model_type: str, tmp_path: Path) -> None:
    """Experts that give a little more: the layer gives `gain` times that more, or nothing that a number describes."""
    model = with_structure(open_model(families.save_tiny(model_type, tmp_path / "model", torch.float32)))
    run = engine.token_run(model, engine.random_ids(2, 12), tmp_path)
    facts = model.facts.moe_layers[0]
    engine.through_layers(model, run, facts.index)
    hidden = run.store("original", facts.index).read(0, 2)
    assert facts.site is not None
    with torch.no_grad(), filled_layer(model, model.read_layer(facts.index)) as layer:
        experts: Any = experts_of(layer, facts.site.experts)
        plain, given = type(experts).forward, []

        def more(states: Tensor, *routing: Tensor) -> Tensor:
            given.append(1e-2 * torch.randn(states.shape, generator=torch.Generator().manual_seed(0)))
            return plain(experts, states, *routing) + given[-1]

        before = call_layer(layer, hidden, run.calls[0][facts.index])
        experts.forward = more
        try:
            after = call_layer(layer, hidden, run.calls[0][facts.index])
        finally:
            del experts.forward
    gain = model.facts.expert_gain(facts.index)
    change, more_given = (after - before).flatten(), given[-1].flatten()
    if gain is not None:
        torch.testing.assert_close(change, gain * more_given, rtol=1e-3, atol=1e-5)
    elif model_type not in UNTOLD and change.shape == more_given.shape:
        best = (change @ more_given) / (more_given @ more_given)
        assert (change - best * more_given).norm() > 1e-2 * change.norm(), "a number describes it"


def test_a_multiplier_is_the_gain(tmp_path: Path) -> None:
    path = families.save_tiny("granitemoe", tmp_path / "model", residual_multiplier=0.25)
    assert with_structure(open_model(path)).facts.expert_gain(1) == 0.25


@pytest.mark.parametrize("model_type", ["minimax", "bailing_hybrid", "kimi_linear", "qwen3_next", "mixtral"])
def test_layers_of_linear_attention_have_no_probabilities(model_type: str, tmp_path: Path) -> None:
    model = with_structure(open_model(families.save_tiny(model_type, tmp_path / "model")))
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * families.LAYERS
    for layer in model.facts.moe_layers:
        assert model.facts.attends(layer.index) == (kinds[layer.index] != "linear_attention")
