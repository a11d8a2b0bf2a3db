"""smooth.awq: the function stays, in float64, on every family where it may; elsewhere the reason is given."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import engine
import exact
import families
import layers
import planted
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from moecompress.errors import RecipeError
from moecompress.numerics.awq import scale_candidates
from moecompress.numerics.grids import dequantize, round_to_nearest
from moecompress.passes.base import Decision
from moecompress.passes.quantize_gptq import QuantizeGPTQ
from moecompress.passes.quantize_rtn import QuantizeRTN
from moecompress.passes.smooth_awq import SmoothAWQ
from moecompress.plan import make_plan
from moecompress.recipe import load_recipe
from moecompress.stream.layers import experts_of, filled_layer
from moecompress.types import QuantizedTensor, Scheme

IDS = engine.random_ids(4, 24)
# In the second line routers or norms compute in float32 whatever the model's dtype.
FOLDABLE = {name: 1e-10 for name in ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "granitemoe")}
FOLDABLE |= {name: 1e-6 for name in ("deepseek_v3", "qwen3_next", "glm4_moe")}


def awq(**options: Any) -> SmoothAWQ:
    return SmoothAWQ(**{"bits": 3, "group_size": 16, "clip": False, **options})


@pytest.mark.parametrize("model_type", FOLDABLE)
def test_the_function_stays_in_float64(model_type: str, tmp_path: Path) -> None:
    path = families.save_tiny(model_type, tmp_path / "model", torch.float32)
    model = engine.own_model(path).double()
    for part in model.modules():
        if hasattr(part, "config"):
            part.config._experts_implementation = "eager"  # the default has no float64
    with torch.no_grad():
        wanted = model(input_ids=IDS, use_cache=False).logits
    at = layers.at_layer(path, IDS, tmp_path)
    index = at.model.facts.moe_layers[-1].index
    at = layers.at_layer(path, IDS, tmp_path, index=index)
    step, site = awq(), at.model.facts.layers[index].site
    assert site is not None
    found, _ = at.process(step)
    scales = {"shared": site.hidden, "experts": site.width}
    generator = torch.Generator().manual_seed(0)
    drawn = {  # scales that matter, in place of those the search likes on random weights
        name: torch.rand(*found.tensors[name].shape, generator=generator) * 4 + 0.25 for name in scales
    }
    assert {name: value.shape[-1] for name, value in found.tensors.items()} == scales
    before = exact.widened(at.weights)
    context: Any = type("Context", (), {"weights": before, "layer": at.model.facts.layers[index]})
    after = step.apply(context, Decision(found.data, drawn))
    name = at.model.facts.layers[index].name
    exact.load_into(model.get_submodule(name), site, after)
    with torch.no_grad():
        changed = model(input_ids=IDS, use_cache=False).logits
    assert engine.difference(changed, wanted) < FOLDABLE[model_type]
    for number, expert in enumerate(after.experts):
        back = step.restored(at.model.facts.layers[index], Decision(found.data, drawn), number, expert)
        torch.testing.assert_close(back.gate_up, before.experts[number].gate_up, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(back.down, before.experts[number].down, rtol=1e-6, atol=1e-9)


REFUSED = {
    "gemma4_text": ({}, "router does not read what the experts read.*shared: false"),
    "minimax": ({}, "the layer itself computes with the output.*shared: false"),
    "gpt_oss": ({}, "not linear in the up projection.*set experts: false"),
    "nemotron_h": ({"shared": False}, "not linear in the up projection"),
    "qwen3_moe": ({"shared": False, "experts": False}, "nothing is left to do"),
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_cannot_be_folded_is_refused_by_the_plan(model_type: str, tmp_path: Path) -> None:
    options, reason = REFUSED[model_type]
    path = families.save_tiny(model_type, tmp_path / "model")
    passes = [{"smooth.awq": {"group_size": 16, **options}}, {"quantize.rtn": {"group_size": 16}}]
    recipe = engine.write_recipe(tmp_path, path, passes, calibration=engine.token_calibration(tmp_path, IDS))
    problems = make_plan(load_recipe(recipe)).problems
    assert len(problems) == 1 and re.search(f"smooth.awq: .*{reason}", problems[0]), problems


@pytest.fixture(scope="module")
def outliers(bench_a: Path, tmp_path_factory: pytest.TempPathFactory) -> layers.AtLayer:
    folder = tmp_path_factory.mktemp("outliers")
    ids = engine.random_ids(8, 96, vocabulary=4096)
    path = planted.outlier_channels(bench_a, folder / "model", (3, 77), 32.0)
    return layers.at_layer(path, ids, folder, index=1)


def test_planted_outlier_channels_are_found(outliers: layers.AtLayer) -> None:
    """The two channels get the largest scales, which gives back the precision that the plant took."""
    decision, _ = outliers.process(awq(bits=3, group_size=32))
    assert set(decision.tensors["shared"].topk(2).indices.tolist()) == {3, 77} and decision.data["ratio"] > 0.2


@pytest.mark.parametrize("quantizer", [QuantizeRTN, QuantizeGPTQ])
def test_smoothing_before_rounding_lowers_the_error(outliers: layers.AtLayer, quantizer: Any) -> None:
    step = quantizer(bits=3, group_size=32)
    plain = outliers.error(outliers.process(step)[1])
    _, smoothed = outliers.process(awq(group_size=32))
    assert outliers.error(smoothed) < 1e-9
    assert outliers.error(outliers.process(step, smoothed)[1]) < plain


def test_clipping_lowers_the_error_of_minmax_rounding(outliers: layers.AtLayer) -> None:
    step = QuantizeRTN(bits=3, group_size=32, grid="minmax")
    _, smoothed = outliers.process(awq(group_size=32, grid="minmax"))
    _, clipped = outliers.process(awq(group_size=32, grid="minmax", clip=True))
    assert outliers.error(outliers.process(step, clipped)[1]) < outliers.error(outliers.process(step, smoothed)[1])


def test_experts_without_tokens_keep_their_function(bench_a: Path, tmp_path: Path) -> None:
    ids = engine.random_ids(4, 64, vocabulary=4096)
    path = planted.routed_expert(bench_a, tmp_path / "model", ids)
    at = layers.at_layer(path, ids, tmp_path, index=1)
    step = awq(group_size=32, clip=True)
    decision, after = at.process(step)
    assert torch.equal(decision.tensors["experts"][16], torch.ones(128))
    assert not decision.tensors["clip.gate_up"][16].any() and not decision.tensors["clip.down"][16].any()
    back = step.restored(at.model.facts.layers[1], decision, 16, after.experts[16])
    torch.testing.assert_close(back.gate_up, at.weights.experts[16].gate_up.float(), rtol=1e-5, atol=1e-7)  # type: ignore[union-attr]


def test_after_a_quantizer_it_is_too_late(outliers: layers.AtLayer) -> None:
    _, rounded = outliers.process(QuantizeRTN(bits=3, group_size=32))
    assert isinstance(rounded.experts[0].gate_up, QuantizedTensor)
    with pytest.raises(RecipeError, match="quantized already. Next: smooth before quantizing"):
        outliers.process(awq(group_size=32), rounded)


def test_options_are_checked(outliers: layers.AtLayer) -> None:
    assert "works: 16, 32, 64, 128" in awq(group_size=48).check(outliers.model.facts)[0]
    with pytest.raises(ValidationError, match="not a group size"):
        awq(group_size=0)


@pytest.mark.parametrize(("weighting", "power"), [("none", 2), ("affinity", 1), ("affinity", 2)])
def test_the_search_weighs_tokens_as_it_says(outliers: layers.AtLayer, weighting: Any, power: Any) -> None:
    """Against a plain loop over the candidates: sum over tokens of c^power |f(x) - f'(x)|^2 of every expert."""
    step = awq(group_size=32, experts=False, ratios=4, weighting=weighting, power=power)
    decision, _ = outliers.process(step)
    sample, weights = outliers.collect(step.needs())["token_sample"], outliers.weights
    x, exponent = sample["hidden"].double(), power if weighting == "affinity" else 0
    errors = []
    with filled_layer(outliers.model, weights) as module:
        experts = experts_of(module, "mlp.experts")
        for scale in scale_candidates(x.abs().mean(0), 4):
            error = 0.0
            for number, one in enumerate(weights.experts):
                assert isinstance(one.gate_up, Tensor)
                rounded = dequantize(round_to_nearest(one.gate_up.float() * scale, Scheme(3, 32), grid="mse"))
                rows, slots = (sample["ids"] == number).nonzero(as_tuple=True)
                made = [experts.run_expert(e, x[rows].float())[1] for e in (one, replace(one, gate_up=rounded / scale))]
                for missed, gate in zip(made[1] - made[0], sample["weights"][rows, slots], strict=True):
                    error += float(gate) ** exponent * float(missed.double().square().sum())
            errors.append(error)
    assert decision.data["ratio"] == errors.index(min(errors)) / 4


def test_weighting_can_change_the_choice(outliers: layers.AtLayer) -> None:
    chosen = []
    for weighting, power in (("none", 2), ("affinity", 1), ("affinity", 2)):
        decision, _ = outliers.process(awq(group_size=32, shared=False, weighting=weighting, power=power))
        chosen.append(decision.data["expert_ratios"])
    assert chosen[0] != chosen[1] != chosen[2]
