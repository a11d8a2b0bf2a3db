"""smooth.expert: the function stays, in float64, on every family; the scales are EAQuant's; outliers are found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engine
import exact
import families
import layers
import planted
import pytest
import torch
from torch import Tensor

from moecompress.errors import RecipeError
from moecompress.numerics.smoothing import channel_scales, unified_scales
from moecompress.passes.base import Decision
from moecompress.passes.quantize_rtn import QuantizeRTN
from moecompress.passes.smooth_expert import SmoothExpert
from moecompress.plan import make_plan
from moecompress.recipe import load_recipe
from moecompress.stats.moments import InputMoments

IDS = engine.random_ids(4, 24)


def plan_problems(path: Path, folder: Path, **options: Any) -> str:
    calibration = {"source": "tokens", "files": ["missing"], "samples": 2, "length": 8}
    recipe = engine.write_recipe(folder, path, [{"smooth.expert": options}], calibration=calibration)
    return "\n".join(text for text in make_plan(load_recipe(recipe)).problems if "smooth.expert" in text)


@pytest.mark.parametrize("model_type", engine.STREAMED)
def test_every_family_keeps_its_function_or_says_why(model_type: str, tmp_path: Path) -> None:
    """All MoE layers smoothed with strong scales: the same logits to 1e-10 in float64. Else the plan has the reason."""
    path = families.save_tiny(model_type, tmp_path / "model", torch.float32)
    options = {}
    if told := plan_problems(path, tmp_path):
        options = {"shared": "set shared: false" not in told, "experts": "set experts: false" not in told}
        if not any(options.values()):
            return
        assert plan_problems(path, tmp_path, **options) == ""
    own = exact.double_model(path)
    wanted = exact.double_logits(own, IDS)
    at = layers.at_layer(path, IDS[:2], tmp_path)
    step, generator = SmoothExpert(**options), torch.Generator().manual_seed(0)
    for facts in at.model.facts.moe_layers:
        site = facts.site
        assert site is not None
        at = layers.at_layer(path, IDS[:2], tmp_path, index=facts.index)
        found, _ = at.process(step)
        drawn = {k: v.double() * (torch.rand(v.shape, generator=generator) + 0.5) for k, v in found.tensors.items()}
        context: Any = type("Context", (), {"weights": exact.widened(at.weights), "layer": facts})
        after = step.apply(context, Decision(found.data, drawn))
        exact.load_into(own.get_submodule(facts.name), site, after)
    assert engine.difference(exact.double_logits(own, IDS), wanted) < 1e-10


REFUSED = {
    "gemma4_text": "router does not read what the experts read",
    "gpt_oss": "not linear in the up projection.*set experts: false",
    "flex_olmo": "set shared: false",
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_cannot_be_folded_is_refused_by_plan(model_type: str, tmp_path: Path) -> None:
    import re

    path = families.save_tiny(model_type, tmp_path / "model", torch.float32)
    assert re.search(REFUSED[model_type], plan_problems(path, tmp_path), re.S)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> layers.AtLayer:
    folder = tmp_path_factory.mktemp("tiny")
    path = families.save_tiny("qwen2_moe", folder / "model", torch.float32)
    return layers.at_layer(path, IDS, folder, index=2)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.6, 1.0])
def test_scales_are_the_papers(alpha: float, tiny: layers.AtLayer) -> None:
    """Against the formula over every reader, channel by channel."""
    decision, _ = tiny.process(SmoothExpert(alpha=alpha))
    moments, weights = tiny.collect((InputMoments(),))["input_moments"], tiny.weights
    everywhere = moments["gate_up.abs_max"].amax(0)
    names = decision.data["readers"]
    shared = [weights.tensors[n] for n in names if "shared_expert." in n]
    router = [weights.tensors[n] for n in names if n == "mlp.gate.weight"]
    assert len(shared) == 2 and len(router) == 1 and len(names) == 4  # and the shared expert's gate, compensated only

    def wanted(a: Tensor, matrix: Tensor, j: int) -> float:
        return float(a[j]) ** alpha / float(matrix[:, j].abs().max()) ** (1 - alpha)

    for j in range(64):
        each = [
            wanted(moments["gate_up.abs_max"][e], expert.gate_up, j)  # type: ignore[arg-type]
            for e, expert in enumerate(weights.experts)
            if int(moments["tokens"][e])
        ]
        each += [wanted(everywhere, torch.cat(shared), j), wanted(everywhere, router[0], j)]  # type: ignore[arg-type]
        assert float(decision.tensors["shared"][j]) == pytest.approx(max(each), rel=1e-5)
    for e, expert in enumerate(weights.experts):
        if int(moments["tokens"][e]):
            assert float(decision.tensors["experts"][e, 7]) == pytest.approx(
                wanted(moments["down.abs_max"][e], expert.down, 7),  # type: ignore[arg-type]
                rel=1e-5,
            )


def test_who_has_a_say_and_how_it_is_joined(tiny: layers.AtLayer) -> None:
    """Every reader raises the scales; one scale from joint maxima never exceeds the largest of the readers'."""
    found = {
        key: tiny.process(SmoothExpert(**options))[0].tensors["shared"]
        for key, options in {
            "all": {},
            "no router": {"router": False},
            "experts": {"router": False, "shared_experts": False},
            "layer": {"router": False, "shared_experts": False, "aggregate": "layer"},
        }.items()
    }
    assert bool((found["all"] >= found["no router"]).all()) and bool((found["no router"] >= found["experts"]).all())
    assert bool((found["all"] > found["no router"]).any()) and bool((found["experts"] != found["layer"]).any())


def test_largest_inputs_fall_below_what_each_reader_asked_for(tiny: layers.AtLayer) -> None:
    """Smoothed inputs of an expert are at most what its own SmoothQuant scale would have made them."""
    decision, after = tiny.process(SmoothExpert(experts=False))
    before, moved = (
        tiny.collect((InputMoments(),), w)["input_moments"]["gate_up.abs_max"] for w in (tiny.weights, after)
    )
    for e, expert in enumerate(tiny.weights.experts):
        own = channel_scales(before[e], expert.gate_up.abs().amax(0), 0.6)  # type: ignore[union-attr]
        assert bool((moved[e] <= before[e] / own * 1.001).all())
    assert torch.equal(unified_scales(torch.tensor([[1.0, 5.0], [2.0, 3.0]])), torch.tensor([2.0, 5.0]))


def test_channels_without_activity() -> None:
    scales = channel_scales(torch.tensor([[0.0, 4.0, 9.0], [0.0, 0.0, 0.0]]), torch.ones(2, 3), 0.5)
    assert scales.tolist() == [[2.0, 2.0, 3.0], [1.0, 1.0, 1.0]]


@pytest.fixture(scope="module")
def outliers(bench_a: Path, tmp_path_factory: pytest.TempPathFactory) -> layers.AtLayer:
    folder = tmp_path_factory.mktemp("outliers")
    ids = engine.random_ids(8, 96, vocabulary=4096)
    path = planted.outlier_channels(bench_a, folder / "model", (3, 77), 32.0)
    return layers.at_layer(path, ids, folder, index=1)


def test_planted_outlier_channels_are_found_and_smoothing_helps(outliers: layers.AtLayer) -> None:
    decision, smoothed = outliers.process(SmoothExpert())
    assert set(decision.tensors["shared"].topk(2).indices.tolist()) == {3, 77}
    assert outliers.error(smoothed) < 1e-9
    step = QuantizeRTN(bits=4, group_size=-1, activation_bits=4)
    plain, better = (outliers.error(outliers.process(step, w)[1]) for w in (outliers.weights, smoothed))
    assert better < plain / 2


def test_experts_without_tokens_have_no_say_and_keep_their_function(bench_a: Path, tmp_path: Path) -> None:
    ids = engine.random_ids(4, 64, vocabulary=4096)
    path = planted.routed_expert(bench_a, tmp_path / "model", ids)
    at = layers.at_layer(path, ids, tmp_path, index=1)
    before = layers.at_layer(bench_a, ids, tmp_path / "b", index=1)
    step = SmoothExpert(router=False)
    decision, after = at.process(step)
    plain, _ = before.process(step)
    torch.testing.assert_close(decision.tensors["shared"], plain.tensors["shared"], rtol=1e-3, atol=1e-5)
    assert torch.equal(decision.tensors["experts"][16], torch.ones(128))
    assert decision.data["experts"] == {"16": {"smoothing": "no tokens of its own"}}
    back = step.restored(at.model.facts.layers[1], decision, 16, after.experts[16])
    torch.testing.assert_close(back.gate_up, at.weights.experts[16].gate_up.float(), rtol=1e-5, atol=1e-7)  # type: ignore[union-attr]


def test_after_a_quantizer_it_is_too_late(outliers: layers.AtLayer) -> None:
    _, rounded = outliers.process(QuantizeRTN(bits=3, group_size=32))
    with pytest.raises(RecipeError, match="quantized already. Next: smooth before quantizing"):
        outliers.process(SmoothExpert(), rounded)


def test_nothing_to_do_is_refused(tiny: layers.AtLayer) -> None:
    assert "nothing is left to do" in SmoothExpert(shared=False, experts=False).check(tiny.model.facts)[0]
