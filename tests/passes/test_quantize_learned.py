"""quantize.learned: better than its start, replayed exactly, honest about experts with few tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import engine
import families
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

from moecompress.errors import CalibrationError, CoverageError, RecipeError
from moecompress.experts import Experts, materialise
from moecompress.layerstore import load_decision, save_decision
from moecompress.load import load
from moecompress.passes.base import Decision, LayerContext
from moecompress.passes.quantize_learned import QuantizeLearned
from moecompress.stream.layers import experts_of, filled_layer
from moecompress.stream.model import StreamModel, open_model
from moecompress.types import PROJECTIONS, LayerWeights, QuantizedTensor

SIZES = {"hidden_size": 64, "moe_intermediate_size": 32}
QUICK: dict[str, Any] = {"group_size": 32, "steps": 30, "batch": 512, "min_tokens": 256, "rate": 1e-2}
TOKENS, EXPERTS = 4096, 8


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    save_file({"ids": engine.random_ids(64, 64, seed=3)}, folder / "ids.safetensors")
    return families.save_tiny("qwen3_moe", folder / "model", torch.bfloat16, **SIZES)


@pytest.fixture(scope="module")
def model(source: Path) -> StreamModel:
    return open_model(source)


def sample(only: int = EXPERTS, seed: int = 0) -> dict[str, Tensor]:
    """Correlated inputs of TOKENS tokens, routed to the first `only` experts."""
    made = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, 64, generator=made) @ torch.randn(64, 64, generator=made) / 8
    ids = torch.rand(TOKENS, only, generator=made).argsort(1)[:, :2]
    gates = torch.rand(TOKENS, 2, generator=made) / 2
    return {"hidden": hidden, "ids": ids, "weights": gates, "rows": torch.arange(TOKENS) * 3}


class Setting:
    """A layer, its sample, and a context made of them; `missed` is what earlier layers lost."""

    def __init__(
        self, model: StreamModel, found: dict[str, Tensor], missed: Tensor | None = None, gain: float | None = 1.0
    ) -> None:
        self.weights, self.found = model.read_layer(1), found
        self.missed = torch.zeros_like(found["hidden"]) if missed is None else missed
        self.model, self.gain = model, gain

    def context(self, experts: Experts, weights: LayerWeights, allocation: Any = None) -> LayerContext:
        def block_error(rows: Tensor) -> Tensor:
            assert bool((rows % 3 == 0).all()), "rows are the sample's, not positions in it"
            return self.missed[rows // 3]

        return LayerContext(
            facts=replace(self.model.facts, expert_gain=lambda _: self.gain),
            layer=self.model.facts.layers[1],
            weights=weights,
            statistics={"token_sample": self.found},
            scale_dtype=torch.bfloat16,
            forward=lambda candidate, x: experts.run_expert(candidate, x)[1],
            forward_rounded=lambda *arguments: experts.run_expert(*arguments)[1],
            residual=lambda _: pytest.fail("not asked for"),
            activate=experts.activate,
            generator=lambda *_: torch.Generator().manual_seed(0),
            block_error=block_error,
            collect=lambda *_: {},
            norm_fold=lambda: pytest.fail("not asked for"),
            router=lambda: pytest.fail("not asked for"),
            allocation=allocation,
        )

    def run(self, step: QuantizeLearned, weights: LayerWeights | None = None, **more: Any) -> tuple[Any, LayerWeights]:
        with filled_layer(self.model, self.weights) as layer:
            context = self.context(experts_of(layer, "mlp.experts"), weights or self.weights, **more)
            decision = step.decide(context)
            return decision, step.apply(context, decision)

    def apply(self, step: QuantizeLearned, decision: Decision) -> LayerWeights:
        with filled_layer(self.model, self.weights) as layer:
            return step.apply(self.context(experts_of(layer, "mlp.experts"), self.weights), decision)

    def output(self, weights: LayerWeights) -> Tensor:
        """The experts' sum for every sampled token."""
        with filled_layer(self.model, weights) as layer, torch.no_grad():
            experts = experts_of(layer, "mlp.experts")
            return experts(self.found["hidden"], self.found["ids"], self.found["weights"])

    def error(self, weights: LayerWeights) -> float:
        wanted = self.output(self.weights) + self.missed
        return float((self.output(weights) - wanted).square().sum() / wanted.square().sum())


def same(first: LayerWeights, second: LayerWeights) -> bool:
    pairs = [
        (a.projection(p), b.projection(p))
        for a, b in zip(first.experts, second.experts, strict=True)
        for p in PROJECTIONS
    ]
    return all(
        isinstance(a, QuantizedTensor)
        and isinstance(b, QuantizedTensor)
        and torch.equal(a.codes, b.codes)
        and torch.equal(a.scales, b.scales)
        and (a.zeros is None or (b.zeros is not None and torch.equal(a.zeros, b.zeros)))
        for a, b in pairs
    )


@pytest.mark.parametrize("weighting", ["affinity", "none"])
@pytest.mark.parametrize("rounding", ["soft", "straight"])
@pytest.mark.parametrize("bits", [2, 3])
def test_learning_beats_nearest(bits: Any, rounding: Any, weighting: Any, model: StreamModel) -> None:
    here = Setting(model, sample())
    options = {**QUICK, "bits": bits, "start": "mse", "weighting": weighting, "rounding": rounding}
    errors = [here.error(here.run(QuantizeLearned(**{**options, "steps": steps}))[1]) for steps in (0, 60)]
    assert errors[1] < 0.95 * errors[0]


def test_what_earlier_layers_lost_is_counted_as_the_layer_counts_it(model: StreamModel) -> None:
    """Where the layer adds twice the experts' output, half of what is missing makes up for it; elsewhere nothing."""
    step = QuantizeLearned(**{**QUICK, "bits": 3, "steps": 10, "keep_best": False})
    missed = 0.1 * Setting(model, sample()).output(model.read_layer(1))
    plain = Setting(model, sample(), missed).run(step)[1]
    assert same(plain, Setting(model, sample(), 2 * missed, gain=2.0).run(step)[1])
    decision, apart = Setting(model, sample(), missed, gain=None).run(step)
    assert same(apart, Setting(model, sample()).run(step)[1]) and not same(apart, plain)
    assert decision.data["repaired"] is False
    facts = replace(model.facts, expert_gain=lambda _: None)
    assert (
        "works: repair: false" in QuantizeLearned(**QUICK, repair=True).check(facts)[0]
        and QuantizeLearned(**QUICK).check(facts) == []
    )


@pytest.mark.parametrize("bits", [2, 3])
def test_steps_that_do_harm_are_not_kept(bits: Any, model: StreamModel) -> None:
    here = Setting(model, sample())
    step = QuantizeLearned(**{**QUICK, "bits": bits, "rate": 0.2, "scale_rate": 0.2})
    decision, changed = here.run(step)
    errors = dict(decision.data["output_errors"])
    assert errors[decision.data["kept_step"]] == min(errors.values()) < 0.8 * errors[step.steps]
    harmed = here.run(step.model_copy(update={"keep_best": False}))
    assert harmed[0].data["output_errors"] == [] and here.error(changed) < 0.9 * here.error(harmed[1])


def test_gptq_is_the_better_start(model: StreamModel) -> None:
    here = Setting(model, sample())
    gptq, mse = (
        here.error(here.run(QuantizeLearned(**{**QUICK, "steps": 0, "bits": 3, "start": s}))[1])
        for s in ("gptq", "mse")
    )
    assert gptq < mse


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_a_saved_decision_replays_bit_for_bit(bits: Any, symmetric: bool, model: StreamModel, tmp_path: Path) -> None:
    here = Setting(model, sample())
    step = QuantizeLearned(**{**QUICK, "steps": 5, "bits": bits, "symmetric": symmetric})
    decision, changed = here.run(step)
    save_decision(tmp_path, "00001", decision)
    loaded = load_decision(tmp_path, "00001")
    assert loaded is not None and same(here.apply(step, loaded), changed)
    assert same(here.run(step)[1], changed), "the same seed learns the same codes"
    scheme = changed.experts[0].gate_up.scheme  # type: ignore[union-attr]
    assert scheme == step.scheme and scheme.bits == bits
    assert all(bool(torch.isfinite(materialise(e.down, torch.float32)).all()) for e in changed.experts)


def test_the_layer_makes_up_for_what_earlier_layers_lost(model: StreamModel) -> None:
    found = sample()
    here = Setting(model, found)
    direction = torch.randn(64, generator=torch.Generator().manual_seed(5))
    missed = here.output(here.weights) * 0.3 + direction * 0.02
    here = Setting(model, found, missed)
    step = QuantizeLearned(**{**QUICK, "bits": 3, "steps": 80})
    repaired, plain = (here.error(here.run(step.model_copy(update={"repair": on}))[1]) for on in (True, False))
    assert repaired < 0.9 * plain


def test_experts_with_few_tokens_follow_the_policy(model: StreamModel) -> None:
    here = Setting(model, sample(only=5))
    runs = {name: here.run(QuantizeLearned(**QUICK, bits=3, fallback=name)) for name in ("shrink", "rtn")}
    for name, (decision, changed) in runs.items():
        notes = decision.data["experts"]
        assert [notes[str(e)].get("fallback") for e in range(EXPERTS)] == [None] * 5 + [name] * 3
        assert notes["7"]["sampled_tokens"] == 0 < notes["0"]["sampled_tokens"]
        assert here.error(changed) < 0.2
    start = here.run(QuantizeLearned(**{**QUICK, "steps": 0}, bits=3))[1]
    nearest = here.run(QuantizeLearned(**{**QUICK, "steps": 0}, bits=3, start="mse"))[1]
    for expert in (5, 6, 7):
        for changed, wanted in ((runs["shrink"][1], start), (runs["rtn"][1], nearest)):
            kept = [replace(w, experts=(w.experts[expert],)) for w in (changed, wanted)]
            assert same(*kept), "nobody visits it: it stays at its start"
        dense = materialise(runs["shrink"][1].experts[expert].gate_up, torch.float32)
        original = materialise(here.weights.experts[expert].gate_up, torch.float32)
        assert float((dense - original).norm() / original.norm()) < 0.5
    with pytest.raises(CoverageError, match="3 experts have few.*expert 5 has 0.*min_tokens = 256.*fallback: shrink"):
        here.run(QuantizeLearned(**QUICK, fallback="error"))


def test_allocated_widths_are_followed(model: StreamModel) -> None:
    here = Setting(model, sample())
    widths = {"gate_up": [1, 2, 3, 4, 1, 2, 3, 4], "down": [2, 2, 2, 2, 3, 3, 3, 3]}
    _, changed = here.run(QuantizeLearned(**{**QUICK, "steps": 5}), allocation=widths)
    for name in PROJECTIONS:
        assert [e.projection(name).scheme.bits for e in changed.experts] == widths[name]  # type: ignore[union-attr]


def test_the_plan_counts_what_learning_holds(model: StreamModel) -> None:
    layer = model.facts.layers[1]
    weights = EXPERTS * 3 * 64 * 32
    small, large = (QuantizeLearned(samples=n).statistics_bytes(layer) for n in (1000, 2000))
    plain = QuantizeLearned(samples=1000, optimizer="sign_sgd").statistics_bytes(layer)
    assert small - plain == 2 * 4 * weights, "Adam has two float32 moments per weight"
    assert large - small >= 4 * 1000 * 64 * 4, "inputs and targets, once as collected and once shuffled"


def test_what_cannot_work_says_what_can(model: StreamModel) -> None:
    here = Setting(model, sample())
    _, changed = here.run(QuantizeLearned(**{**QUICK, "steps": 0}))
    with pytest.raises(RecipeError, match="already quantized.*one quantize pass"):
        here.run(QuantizeLearned(**QUICK), changed)
    empty = Setting(model, {name: value[:0] for name, value in sample().items()})
    with pytest.raises(CalibrationError, match="no calibration token"):
        empty.run(QuantizeLearned(**QUICK))
    with pytest.raises(ValidationError, match="routed_experts have a block.*quantize.gptq"):
        QuantizeLearned(targets=("routed_experts", "attention"))
    assert QuantizeLearned(group_size=48).check(model.facts)[0].startswith("group_size 48 does not divide")


def test_a_run_packs_reloads_and_comes_closer_than_nearest(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    engine.reload_here(monkeypatch)
    calibration = {"source": "tokens", "files": [str(source.parent / "ids.safetensors")], "samples": 64, "length": 64}
    ids = engine.random_ids(2, 24, seed=9)
    wanted = engine.own_logits(source, ids).log_softmax(-1)
    distance = {}
    for name, options in {"rtn": {}, "learned": {"steps": 40, "batch": 512, "rate": 1e-2}}.items():
        folder = tmp_path / name
        folder.mkdir()
        passes = [{f"quantize.{name}": {"bits": 2, "group_size": 32, **options}}]
        done = engine.command("run", engine.write_recipe(folder, source, passes, calibration=calibration))
        assert done.code == 0, done.err
        with torch.no_grad():
            found = load(folder / "out")(input_ids=ids).logits.float().log_softmax(-1)
        distance[name] = float((wanted.exp() * (wanted - found)).sum(-1).mean())
    assert 0 < distance["learned"] < distance["rtn"]
    report = engine.read_json(tmp_path / "learned" / "out" / "moecompress" / "report.json")
    assert report["size"]["expert_bits_per_weight"] == pytest.approx(2.5, abs=0.01)
    assert all(expert["bits"] == {"gate_up": 2, "down": 2} for row in report["layers"] for expert in row["experts"])
