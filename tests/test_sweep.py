"""Sweeps and scopes: who decides when, on which numbers; what is applied again, and what is kept instead.

The passes here are made for the tests: each does one plain thing to a layer, so that the result can be worked out
apart from the engine, on layers that are run one after the other by hand.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import engine
import families
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from moecompress.errors import Stopped
from moecompress.passes.base import Decision, LayerContext, ModelContext, Pass, Scope
from moecompress.progress import NoProgress
from moecompress.recipe.build import PassSpec, Recipe
from moecompress.recipe.specs import CalibrationSpec, EvaluateSpec, OutputSpec
from moecompress.run import run
from moecompress.stats.base import Statistic
from moecompress.stats.routing import RoutingCounts, TokenSample
from moecompress.stream.collect import Collector
from moecompress.stream.model import StreamModel, open_model
from moecompress.stream.streams import TokenRun, run_layer
from moecompress.stream.train import TrainContext
from moecompress.types import LayerWeights, Stream, TokenBatch

IDS = engine.random_ids(16, 12)
GATE = "mlp.gate.weight"
LOG: list[tuple[str, str, int]] = []  # (pass, function, layer): what the engine called


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    engine.reload_here(monkeypatch)
    LOG.clear()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.save_tiny("qwen3_moe", tmp_path_factory.mktemp("source") / "model", torch.float32)


def changed_router(weights: LayerWeights, change: Callable[[Tensor], Tensor]) -> LayerWeights:
    gate = weights.tensors[GATE]
    assert isinstance(gate, Tensor)
    return weights.with_tensors({GATE: change(gate)})


def scaled(weights: LayerWeights, factor: float) -> LayerWeights:
    """All experts' outputs times a factor."""
    return weights.with_experts(
        tuple(expert.with_projection("down", expert.down * factor) for expert in weights.experts)  # type: ignore[operator]
    )


class TurnRouter(Pass):
    """Moves every row of the router to the next expert."""

    name: ClassVar[str] = "fake.turn"
    paper: ClassVar[str] = "test"
    changes: ClassVar[frozenset[str]] = frozenset({"router"})

    def apply(self, context: LayerContext, decision: Decision) -> LayerWeights:
        LOG.append((self.name, "apply", context.weights.index))
        return changed_router(context.weights, lambda gate: gate.roll(1, 0))


class Scale(Pass):
    """Multiplies the experts by a number that its decision holds."""

    name: ClassVar[str] = "fake.scale"
    paper: ClassVar[str] = "test"
    changes: ClassVar[frozenset[str]] = frozenset({"experts"})
    factor: float = 1.5

    def decide(self, context: LayerContext) -> Decision:
        LOG.append((self.name, "decide", context.weights.index))
        return Decision({"factor": self.factor})

    def apply(self, context: LayerContext, decision: Decision) -> LayerWeights:
        LOG.append((self.name, "apply", context.weights.index))
        return scaled(context.weights, decision.data["factor"])


class SlowScale(Scale):
    name: ClassVar[str] = "fake.slow"
    expensive: ClassVar[bool] = True


class Look(Pass):
    """Changes nothing and keeps what it saw."""

    name: ClassVar[str] = "fake.look"
    paper: ClassVar[str] = "test"
    changes: ClassVar[frozenset[str]] = frozenset()
    sample: int = 0
    random: bool = False
    calibration: str = "default"

    def needs(self) -> tuple[Statistic, ...]:
        return (RoutingCounts(), *([TokenSample(self.sample)] if self.sample else []))

    def decide(self, context: LayerContext) -> Decision:
        seen = {f"{name}.{key}": value for name, part in context.statistics.items() for key, value in part.items()}
        if self.random:
            seen["random"] = torch.stack([torch.rand(3, generator=context.generator(i)) for i in (None, 0, 1)])
        return Decision({}, seen)

    def apply(self, context: LayerContext, decision: Decision) -> LayerWeights:
        return context.weights


class LookOriginal(Look):
    name: ClassVar[str] = "fake.look_original"
    propagate: ClassVar[Stream] = "original"


class MuteRarest(Pass):
    """MODEL: silences the expert with the fewest tokens of the whole model."""

    name: ClassVar[str] = "fake.mute"
    paper: ClassVar[str] = "test"
    scope: ClassVar[Scope] = Scope.MODEL
    changes: ClassVar[frozenset[str]] = frozenset({"experts"})
    propagate: ClassVar[Stream] = "original"

    def needs(self) -> tuple[Statistic, ...]:
        return (RoutingCounts(),)

    def decide(self, context: ModelContext) -> Decision:
        tokens = torch.stack([context.statistics[i]["routing_counts"]["tokens"] for i in sorted(context.statistics)])
        layer, expert = divmod(int(tokens.argmin()), tokens.shape[1])
        return Decision({"of": layer, "expert": expert}, {"tokens": tokens})

    def apply(self, context: LayerContext, decision: Decision) -> LayerWeights:
        LOG.append((self.name, "apply", context.weights.index))
        if context.weights.index != decision.data["of"]:
            return context.weights
        return muted(context.weights, decision.data["expert"])


def muted(weights: LayerWeights, chosen: int) -> LayerWeights:
    return weights.with_experts(
        tuple(
            expert.with_projection("down", torch.zeros_like(expert.down)) if index == chosen else expert  # type: ignore[arg-type]
            for index, expert in enumerate(weights.experts)
        )
    )


def loss(logits: Tensor, batch: TokenBatch) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.ids[:, 1:].flatten())


class RouterStep(Pass):
    """TRAIN: one step against the gradient of all routers, on the first batch."""

    name: ClassVar[str] = "fake.train"
    paper: ClassVar[str] = "test"
    scope: ClassVar[Scope] = Scope.TRAIN
    changes: ClassVar[frozenset[str]] = frozenset({"router"})

    def decide(self, context: TrainContext) -> Decision:
        gates = {(i, GATE): context.weights(i).tensors[GATE] for i in range(len(context.model.layers))}
        batch = context.tokens["default"].batches[0]
        value, gradients = context.forward_backward(loss, gates, batch)  # type: ignore[arg-type]
        new = {str(i): gates[i, name] - 0.1 * gradient for (i, name), gradient in gradients.items()}  # type: ignore[operator]
        return Decision({"loss": value}, new)

    def apply(self, context: LayerContext, decision: Decision) -> LayerWeights:
        return changed_router(context.weights, lambda _: decision.tensors[str(context.weights.index)])


def recipe_of(source: Path, folder: Path, passes: Sequence[Pass], sets: Sequence[str] = ("default",)) -> Recipe:
    calibration = {}
    for number, name in enumerate(sets):
        path = folder / f"{name}.safetensors"
        save_file({"ids": IDS.roll(number, 0)[: 16 - number]}, path)
        calibration[name] = CalibrationSpec(
            source="tokens", files=(str(path),), samples=16 - number, length=12, heldout=0.125
        )
    return Recipe(
        model=str(source),
        calibration=calibration,
        passes=tuple(PassSpec(name=step.name, params=step, where="test:1") for step in passes),
        output=OutputSpec(dir=str(folder / "out"), format="dense"),
        evaluate=EvaluateSpec(),
    )


class Keep(NoProgress):
    """Copies the decisions away before the run directory goes; may stop the run at a step."""

    def __init__(self, folder: Path, stop_at: int = -1) -> None:
        self.folder, self.stop_at, self.steps, self.stage_name = folder, stop_at, 0, ""
        self.decisions: dict[str, Decision] = {}

    def stage(self, name: str, steps: int, done: int = 0) -> None:
        self.stage_name = name
        if name == "finish":
            from moecompress.layerstore import load_decision

            for path in (self.folder / "out.run" / "decisions").rglob("*.json"):
                found = load_decision(path.parent, path.stem)
                assert found is not None
                self.decisions[f"{path.parent.name}/{path.stem}"] = found

    def step(self, text: str = "") -> None:
        if self.stage_name.startswith("sweep"):
            if self.steps == self.stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            self.steps += 1


def execute(
    source: Path, folder: Path, *passes: Pass, **options: Any
) -> tuple[list[LayerWeights], dict[str, Decision]]:
    """Run the passes; the layers of the output and all decisions as `NN-name/layer`."""
    keep = Keep(folder)
    out = run(recipe_of(source, folder, passes, **options), progress=keep)
    model = open_model(out)
    return [model.read_layer(index) for index in range(4)], keep.decisions


def by_hand(
    model: StreamModel,
    folder: Path,
    change: Callable[[LayerWeights], LayerWeights],
    collected_on: Callable[[LayerWeights], LayerWeights],
    *statistics: Statistic,
) -> list[dict[str, dict[str, Tensor]]]:
    """Statistics of every layer: layers are run as `change` makes them, and watched as `collected_on` makes them."""
    tokens = engine.token_run(model, IDS, folder, heldout=0.125)
    found = []
    for facts in model.facts.layers:
        assert facts.site is not None
        before = model.read_layer(facts.index)
        collector = Collector(facts.site, statistics, tokens.tokens.heldout)
        run_layer(model, collected_on(before), tokens, "original", collector=collector, write=False)
        found.append(collector.finished())
        run_layer(model, change(before), tokens, "original")
    return found


def unchanged(weights: LayerWeights) -> LayerWeights:
    return weights


def turned(weights: LayerWeights) -> LayerWeights:
    return changed_router(weights, lambda gate: gate.roll(1, 0))


def assert_saw(decisions: dict[str, Decision], folder: str, wanted: list[dict[str, dict[str, Tensor]]]) -> None:
    for index, layer in enumerate(wanted):
        seen = decisions[f"{folder}/{index:05d}"].tensors
        for name, part in layer.items():
            for key, value in part.items():
                torch.testing.assert_close(seen[f"{name}.{key}"], value, atol=1e-6, rtol=1e-5)


def original_layers(source: Path) -> list[LayerWeights]:
    model = open_model(source)
    return [model.read_layer(index) for index in range(4)]


def assert_layers(found: list[LayerWeights], wanted: list[LayerWeights]) -> None:
    assert [engine.same_layer(a, b) for a, b in zip(found, wanted, strict=True)] == [True] * 4


def test_a_model_pass_decides_on_all_layers_and_then_applies(source: Path, tmp_path: Path) -> None:
    layers, decisions = execute(source, tmp_path, MuteRarest())
    statistics = by_hand(open_model(source), tmp_path / "hand", unchanged, unchanged, RoutingCounts())
    tokens = torch.stack([part["routing_counts"]["tokens"] for part in statistics])
    decision = decisions["00-fake.mute/model"]
    assert torch.equal(decision.tensors["tokens"], tokens) and int(tokens[0].sum()) == 14 * 12 * 2
    layer, expert = decision.data["of"], decision.data["expert"]
    assert int(tokens[layer, expert]) == int(tokens.min())
    wanted = original_layers(source)
    wanted[layer] = muted(wanted[layer], expert)
    assert_layers(layers, wanted)
    assert [entry[2] for entry in LOG] == [0, 1, 2, 3]  # only in the second sweep


def test_a_model_pass_sees_what_the_passes_before_it_did(source: Path, tmp_path: Path) -> None:
    """Its statistics are those of the original stream through the changed layers, as `propagate: original` says."""
    layers, decisions = execute(source, tmp_path, TurnRouter(), MuteRarest())
    statistics = by_hand(open_model(source), tmp_path / "hand", unchanged, turned, RoutingCounts())
    tokens = torch.stack([part["routing_counts"]["tokens"] for part in statistics])
    decision = decisions["01-fake.mute/model"]
    assert torch.equal(decision.tensors["tokens"], tokens)
    wanted = [turned(layer) for layer in original_layers(source)]
    wanted[decision.data["of"]] = muted(wanted[decision.data["of"]], decision.data["expert"])
    assert_layers(layers, wanted)


def test_a_changed_router_makes_old_counts_worthless(source: Path, tmp_path: Path) -> None:
    """Statistics after a pass that changes the router are collected anew; the same as from scratch."""
    _, decisions = execute(source, tmp_path, Look(), LookOriginal(), TurnRouter(), Look(), LookOriginal())
    model, counts = open_model(source), RoutingCounts()
    plain = by_hand(model, tmp_path / "a", unchanged, unchanged, counts)
    assert_saw(decisions, "01-fake.look_original", plain)
    assert_saw(decisions, "04-fake.look_original", by_hand(model, tmp_path / "b", unchanged, turned, counts))
    changed = by_hand(model, tmp_path / "c", turned, turned, counts)
    assert_saw(decisions, "03-fake.look", changed)
    assert_saw(decisions, "00-fake.look", by_hand(model, tmp_path / "d", turned, unchanged, counts))
    assert not torch.equal(plain[1]["routing_counts"]["tokens"], changed[1]["routing_counts"]["tokens"])


def test_a_change_that_a_statistic_does_not_depend_on_keeps_it(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counting routes does not depend on experts: no further run of the layer."""
    ran: list[tuple[int, str]] = []

    def counted(model: StreamModel, weights: LayerWeights, run: TokenRun, stream: Stream, **options: Any) -> None:
        if run.tokens.name == "default":
            ran.append((weights.index, stream))
        run_layer(model, weights, run, stream, **options)

    monkeypatch.setattr("moecompress.sweep.run_layer", counted)
    execute(source, tmp_path, LookOriginal(), Scale(), LookOriginal())
    assert ran == [(index, stream) for index in range(4) for stream in ("original", "compressed")]
    ran.clear()
    (tmp_path / "second").mkdir()
    execute(source, tmp_path / "second", LookOriginal(), TurnRouter(), LookOriginal())
    assert ran == [(i, stream) for i in range(4) for stream in ("original", "original", "compressed")]


def test_one_sample_serves_passes_that_ask_for_different_sizes(source: Path, tmp_path: Path) -> None:
    _, decisions = execute(source, tmp_path, LookOriginal(sample=5), LookOriginal(sample=700), LookOriginal(sample=20))
    wanted = by_hand(open_model(source), tmp_path / "hand", unchanged, unchanged, TokenSample(700))
    for folder in ("00", "01", "02"):
        assert_saw(decisions, f"{folder}-fake.look_original", wanted)
    assert wanted[0]["token_sample"]["rows"].shape == (14 * 12,)  # every token that is not held out, once


def test_a_train_pass_gets_the_gradients_of_ordinary_autograd(source: Path, tmp_path: Path) -> None:
    layers, decisions = execute(source, tmp_path, RouterStep())
    own = engine.own_model(source)
    value = loss(own(input_ids=IDS, use_cache=False).logits, TokenBatch(IDS, tuple(range(16))))
    value.backward()
    assert decisions["00-fake.train/model"].data["loss"] == pytest.approx(value.item(), rel=1e-5)
    for index, layer in enumerate(layers):
        gate = own.get_parameter(f"model.layers.{index}.{GATE}")
        assert gate.grad.abs().max() > 0
        torch.testing.assert_close(layer.tensors[GATE], (gate - 0.1 * gate.grad).detach(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("first", [Scale(factor=0.5), SlowScale(factor=0.5)], ids=["cheap", "expensive"])
def test_a_train_pass_trains_on_what_the_passes_before_it_left(first: Pass, source: Path, tmp_path: Path) -> None:
    _, decisions = execute(source, tmp_path, first, RouterStep())
    own = engine.own_model(source)
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            parameter.mul_(0.5 if name.endswith("experts.down_proj") else 1.0)
        value = loss(own(input_ids=IDS, use_cache=False).logits, TokenBatch(IDS, tuple(range(16))))
    assert decisions["01-fake.train/model"].data["loss"] == pytest.approx(value.item(), rel=1e-5)


def test_cheap_passes_are_applied_again_in_every_sweep_and_expensive_ones_are_kept(
    source: Path, tmp_path: Path
) -> None:
    layers, _ = execute(source, tmp_path, Scale(factor=2.0), SlowScale(factor=0.25), Scale(factor=3.0), MuteRarest())
    decided = [entry for entry in LOG if entry[1] == "decide"]
    assert sorted(decided) == sorted(
        (name, "decide", index) for name in ("fake.scale", "fake.scale", "fake.slow") for index in range(4)
    )
    slow = [entry for entry in LOG if entry[:2] == ("fake.slow", "apply")]
    assert [index for *_, index in slow] == [0, 1, 2, 3]
    # before the expensive pass: once; after it: in both sweeps
    assert sum(entry[:2] == ("fake.scale", "apply") for entry in LOG) == 4 + 8
    wanted = [scaled(scaled(scaled(layer, 2.0), 0.25), 3.0) for layer in original_layers(source)]
    different = [not engine.same_layer(a, b) for a, b in zip(layers, wanted, strict=True)]
    assert different.count(True) == 1  # the muted expert's layer
    assert not list(tmp_path.glob("out.run"))


def test_two_barriers_make_three_sweeps(source: Path, tmp_path: Path) -> None:
    keep = Keep(tmp_path)
    run(recipe_of(source, tmp_path, [SlowScale(factor=2.0), MuteRarest(), TurnRouter(), RouterStep()]), progress=keep)
    assert keep.steps == 3 * 4
    assert sum(entry[:2] == ("fake.slow", "apply") for entry in LOG) == 4
    assert {"01-fake.mute/model", "03-fake.train/model"} <= set(keep.decisions)


def stopped(recipe: Recipe, folder: Path, at: int) -> Keep:
    keep = Keep(folder, stop_at=at)
    with pytest.raises(Stopped):
        run(recipe, progress=keep)
    assert not (folder / "out").exists()
    return keep


def test_decisions_are_replayed_and_may_be_edited(source: Path, tmp_path: Path) -> None:
    """A stopped run's decision is a small file: what is written there is what the later sweeps apply."""
    recipe = recipe_of(source, tmp_path, [Scale(factor=2.0), MuteRarest()])
    stopped(recipe, tmp_path, 3)  # after the last layer of the first sweep
    path = tmp_path / "out.run" / "decisions" / "00-fake.scale" / "00001.json"
    assert json.loads(path.read_text()) == {"factor": 2.0}
    path.write_text('{"factor": 0.125}')
    keep = Keep(tmp_path)
    run(recipe, resume=True, progress=keep)
    muted_at = keep.decisions["01-fake.mute/model"].data
    wanted = [scaled(layer, 0.125 if layer.index == 1 else 2.0) for layer in original_layers(source)]
    wanted[muted_at["of"]] = muted(wanted[muted_at["of"]], muted_at["expert"])
    model = open_model(tmp_path / "out")
    assert_layers([model.read_layer(index) for index in range(4)], wanted)
    assert [entry for entry in LOG if entry[1] == "decide"] == [("fake.scale", "decide", i) for i in range(4)]


def test_an_edited_model_decision_is_applied(source: Path, tmp_path: Path) -> None:
    recipe = recipe_of(source, tmp_path, [MuteRarest()])
    stopped(recipe, tmp_path, 4)  # after layer 0 of the second sweep
    path = tmp_path / "out.run" / "decisions" / "00-fake.mute" / "model.json"
    path.write_text('{"of": 3, "expert": 6}')
    run(recipe, resume=True, progress=Keep(tmp_path))
    assert engine.same_layer(open_model(tmp_path / "out").read_layer(3), muted(original_layers(source)[3], 6))


@pytest.mark.parametrize("at", [0, 3, 5, 7, 11])
def test_stopped_anywhere_and_resumed_gives_the_same_bytes(at: int, source: Path, tmp_path: Path) -> None:
    passes = [Look(random=True, sample=9), SlowScale(), TurnRouter(), Look(), MuteRarest(), RouterStep()]
    results = []
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
        recipe = recipe_of(source, tmp_path / name, passes)
        if name == "stopped":
            stopped(recipe, tmp_path / name, at)
        keep = Keep(tmp_path / name)
        out = run(recipe, resume=name == "stopped", progress=keep)
        files = [*sorted(out.glob("*.safetensors")), out / "config.json", out / "moecompress" / "manifest.json"]
        tensors = {f"{k}:{n}": v for k, decision in keep.decisions.items() for n, v in decision.tensors.items()}
        results.append(([path.read_bytes() for path in files], tensors))
    assert results[0][0] == results[1][0]
    assert results[0][1].keys() == results[1][1].keys()
    assert all(torch.equal(value, results[1][1][key]) for key, value in results[0][1].items())


def test_random_numbers_depend_on_pass_layer_and_expert_alone(source: Path, tmp_path: Path) -> None:
    found = []
    for name, passes in (("a", [Look(random=True)]), ("b", [Scale(), LookOriginal(), Look(random=True)])):
        (tmp_path / name).mkdir()
        _, decisions = execute(source, tmp_path / name, *passes)
        found.append({k.partition("/")[2]: d.tensors["random"] for k, d in decisions.items() if "random" in d.tensors})
    assert found[0].keys() == found[1].keys() and len(found[0]) == 4
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())
    assert len({tuple(row.tolist()) for value in found[0].values() for row in value}) == 12


def test_a_pass_names_its_own_calibration_set(source: Path, tmp_path: Path) -> None:
    _, decisions = execute(
        source, tmp_path, LookOriginal(), LookOriginal(calibration="other"), sets=("default", "other")
    )
    first, second = (decisions[f"{folder}-fake.look_original/00000"].tensors for folder in ("00", "01"))
    assert int(first["routing_counts.total"]) == 14 * 12
    assert int(second["routing_counts.total"]) == 14 * 12  # 15 sequences, one held out
    assert not torch.equal(first["routing_counts.tokens"], second["routing_counts.tokens"])


class BlockError(Scale):
    """Keeps what is left of the layer's output error when it decides."""

    name: ClassVar[str] = "fake.error"
    needs_block_error: ClassVar[bool] = True

    def decide(self, context: LayerContext) -> Decision:
        rows = torch.tensor([3, 40, 41, 100])
        return Decision({"factor": 1.0}, {"error": context.block_error(rows)})


def test_the_block_error_is_that_of_the_layer_as_it_is(source: Path, tmp_path: Path) -> None:
    _, decisions = execute(source, tmp_path, TurnRouter(), BlockError())
    model = open_model(source)
    plain = engine.token_run(model, IDS, tmp_path / "plain")
    changed = engine.token_run(model, IDS, tmp_path / "changed")
    for index in range(4):
        run_layer(model, model.read_layer(index), plain, "original")
        run_layer(model, turned(model.read_layer(index)), changed, "original")
        a, b = (tokens.store("original", index + 1).read(0, 16).reshape(-1, 64) for tokens in (plain, changed))
        wanted = (a - b)[[3, 40, 41, 100]]
        torch.testing.assert_close(
            decisions[f"01-fake.error/{index:05d}"].tensors["error"], wanted, atol=1e-5, rtol=1e-4
        )


class Careless(Look):
    name: ClassVar[str] = "fake.careless"

    def decide(self, context: LayerContext) -> Decision:
        context.block_error(torch.tensor([0]))
        return Decision({})


def test_the_block_error_is_only_for_those_who_ask(source: Path, tmp_path: Path) -> None:
    with pytest.raises(LookupError, match="needs_block_error"):
        execute(source, tmp_path, Careless())
    assert not (tmp_path / "out").exists()
