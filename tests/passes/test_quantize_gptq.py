"""quantize.gptq: better than rounding on the demo model's real inputs, and sensible for experts that see few tokens."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine
import families
import layers
import planted
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from moecompress.arch.sites import shared_gates
from moecompress.calib.tokenizer import load_tokenizer
from moecompress.calib.tokens import build_token_set
from moecompress.errors import CalibrationError, CoverageError
from moecompress.experts import materialise
from moecompress.numerics.gptq import gptq
from moecompress.numerics.grids import round_to_nearest
from moecompress.numerics.hqq import hqq
from moecompress.passes.quantize_gptq import Inputs, QuantizeGPTQ
from moecompress.passes.quantize_rtn import QuantizeRTN
from moecompress.recipe.specs import CalibrationSpec
from moecompress.stats.base import ExpertObservation
from moecompress.stats.linears import LinearHessian
from moecompress.stats.moments import ExpertHessian
from moecompress.stream.model import open_model
from moecompress.stream.streams import run_layer
from moecompress.types import LayerWeights, QuantizedTensor

CONTEXT: Any = SimpleNamespace(scale_dtype=torch.bfloat16, allocation=None)
IDS = engine.random_ids(4, 64, vocabulary=4096)


@pytest.fixture(scope="module")
def text(bench_a: Path, tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    spec = CalibrationSpec(source="manifest", manifest="python-stdlib", samples=10, length=192)
    tokens = build_token_set(
        "text", spec, load_tokenizer(bench_a), vocab_size=4096, cache_dir=tmp_path_factory.mktemp("cache")
    )
    return tokens.ids


@pytest.fixture(scope="module")
def bench(bench_a: Path, text: Tensor, tmp_path_factory: pytest.TempPathFactory) -> layers.AtLayer:
    return layers.at_layer(bench_a, text, tmp_path_factory.mktemp("bench"), index=1, batch_tokens=2048)


def gptq_pass(**options: Any) -> QuantizeGPTQ:
    return QuantizeGPTQ(**{"bits": 3, "group_size": 32, **options})


def test_block_error_is_below_rounding_and_falls_with_bits(bench: layers.AtLayer) -> None:
    errors = {}
    for bits in (1, 2, 3, 4):
        step = gptq_pass(bits=bits)
        errors[bits] = bench.error(bench.process(step)[1])
        rounded = QuantizeRTN(bits=bits, group_size=32)  # type: ignore[arg-type]
        assert errors[bits] < 0.85 * bench.error(bench.process(rounded)[1])
    assert errors[4] < errors[3] < errors[2] < errors[1]


@pytest.mark.parametrize("grid", ["minmax", "mse"])
@pytest.mark.parametrize("order", ["none", "gar", "act"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_option_is_better_than_rounding(bench: layers.AtLayer, grid: Any, order: Any, symmetric: bool) -> None:
    step = gptq_pass(grid=grid, order=order, symmetric=symmetric, static_groups=order == "act", sequential=False)
    _, after = bench.process(step)
    rounded = QuantizeRTN(bits=3, group_size=32, grid=grid, symmetric=symmetric)
    assert bench.error(after) < bench.error(bench.process(rounded)[1])


def test_apply_replays_the_decision(bench: layers.AtLayer) -> None:
    step = gptq_pass(min_tokens=1000)
    decision, first = bench.process(step)
    assert decision.data["experts"], "some experts are below 1000 tokens here"
    assert layers.same_codes(first, bench.process(step, decision=decision)[1])


def test_a_decision_can_be_edited(bench: layers.AtLayer) -> None:
    step = gptq_pass()
    decision, first = bench.process(step)
    decision.data["experts"]["3"] = {"fallback": "rtn"}  # type: ignore[index]
    _, after = bench.process(step, decision=decision)
    assert isinstance(bench.weights.experts[3].down, Tensor)
    wanted = round_to_nearest(bench.weights.experts[3].down.float(), step.scheme, grid="mse")
    found = after.experts[3].down
    assert isinstance(found, QuantizedTensor) and torch.equal(found.codes, wanted.codes)
    assert torch.equal(after.experts[2].down.codes, first.experts[2].down.codes)  # type: ignore[union-attr]


@pytest.mark.parametrize("options", [{}, {"sequential": False}, {"target_inputs": "original"}, {"min_tokens": 1000}])
def test_groups_of_experts_change_nothing(bench: layers.AtLayer, options: Any) -> None:
    whole = bench.process(gptq_pass(**options))[1]
    assert layers.same_codes(whole, bench.process(gptq_pass(expert_group=5, **options))[1])


def test_permuting_experts_permutes_the_codes(bench_a: Path, tmp_path: Path) -> None:
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0)).tolist()
    path = planted.permuted_experts(bench_a, tmp_path / "permuted", order)
    step = gptq_pass(min_tokens=0)
    plain = layers.at_layer(bench_a, IDS, tmp_path / "a").process(step)[1]
    moved = layers.at_layer(path, IDS, tmp_path / "b").process(step)[1]
    expected = plain.with_experts(tuple(plain.experts[old] for old in order))
    assert layers.same_codes(moved, expected)


@pytest.fixture(scope="module")
def never(bench_a: Path, tmp_path_factory: pytest.TempPathFactory) -> layers.AtLayer:
    folder = tmp_path_factory.mktemp("never")
    path = planted.routed_expert(bench_a, folder / "model", IDS)
    return layers.at_layer(path, IDS, folder, index=1)


def dense(weights: LayerWeights, expert: int) -> tuple[Tensor, Tensor]:
    made = weights.experts[expert]
    return materialise(made.gate_up, torch.float32), materialise(made.down, torch.float32)


def test_a_never_routed_expert_is_rounded_for_the_layers_average_input(never: layers.AtLayer) -> None:
    step = gptq_pass(min_tokens=30)
    decision, after = never.process(step)
    assert decision.data["experts"]["16"] == {"fallback": "shrink"}
    pooled = never.collect((ExpertHessian("gate_up"),))["expert_hessian.gate_up"]
    assert int(pooled["tokens"][16]) == 0
    hessian = pooled["pooled"] * (30 / float(pooled["tokens"].sum()))
    weight = never.weights.experts[16].gate_up
    assert isinstance(weight, Tensor) and isinstance(after.experts[16].gate_up, QuantizedTensor)
    wanted = gptq(weight.float(), hessian, step.scheme)
    assert torch.equal(after.experts[16].gate_up.codes, wanted.q.codes)
    for value in dense(after, 16):
        assert bool(torch.isfinite(value).all()) and float(value.abs().max()) > 0
    well_covered = [expert for expert in range(16) if int(pooled["tokens"][expert]) >= 30]
    assert well_covered and not set(map(str, well_covered)) & set(decision.data["experts"])


@pytest.mark.parametrize("fallback", ["rtn", "hqq"])
def test_data_free_fallbacks(never: layers.AtLayer, fallback: Any) -> None:
    step = gptq_pass(min_tokens=1, fallback=fallback)
    decision, after = never.process(step)
    assert decision.data["experts"] == {"16": {"fallback": fallback}}
    weight = never.weights.experts[16].down
    assert isinstance(weight, Tensor) and isinstance(after.experts[16].down, QuantizedTensor)
    rounder: Any = {"rtn": round_to_nearest, "hqq": hqq}[fallback]
    assert torch.equal(after.experts[16].down.codes, rounder(weight.float(), step.scheme, grid="mse").codes)


def test_coverage_can_be_demanded(never: layers.AtLayer) -> None:
    with pytest.raises(
        CoverageError, match=r"layer 1 expert 16 gate_up: 0 calibration tokens.*at least 1 .*min_tokens"
    ):
        never.process(gptq_pass(min_tokens=1, fallback="error"))


def test_few_tokens_go_smoothly_from_the_pool_to_their_own(never: layers.AtLayer) -> None:
    """The Hessian that is used: pool only at 0 tokens, own only at `min_tokens`, in between a mixture of both."""
    found = never.collect((ExpertHessian("gate_up"),))["expert_hessian.gate_up"]
    pool = {"": found["pooled"], "_delta": None}
    mean = found["pooled"] / float(found["tokens"].sum())
    expert = int(found["tokens"].argmin() if int(found["tokens"].min()) else found["tokens"][:16].argmin())
    tokens = int(found["tokens"][expert])
    step = gptq_pass(min_tokens=2 * tokens)
    inputs = dict(step._inputs(found, pool, (0, 17)))[expert]
    torch.testing.assert_close(inputs.shrunk()[0], found["hessian"][expert] + tokens * mean)
    enough = dict(gptq_pass(min_tokens=tokens)._inputs(found, pool, (0, 17)))[expert]
    assert torch.equal(enough.shrunk()[0], found["hessian"][expert])


def test_no_tokens_at_all_is_said_to_be_rounding(bench_a: Path, tmp_path: Path) -> None:
    at = layers.at_layer(bench_a, IDS, tmp_path)
    step = gptq_pass()
    empty = ExpertHessian("gate_up").init(at.model.facts.layers[0].site)  # type: ignore[arg-type]
    inputs = next(step._inputs(empty, {"": empty["pooled"], "_delta": None}, (0, 1)))[1]
    said: dict[str, Any] = {"experts": {}, "losses": {}}
    weight = torch.randn(8, 128)
    q = step._expert(CONTEXT, "here", weight, inputs, said, (0, "gate_up"), False)
    assert said["experts"] == {"0": {"fallback": "rtn"}}
    assert torch.equal(q.codes, round_to_nearest(weight, step.scheme, grid="mse").codes)


def test_affinity_lowers_the_weighted_error(bench: layers.AtLayer) -> None:
    """The squared error of the block's output is what power 2 minimises, per matrix and to first order."""
    plain = bench.error(bench.process(gptq_pass(bits=2))[1])
    assert bench.error(bench.process(gptq_pass(bits=2, weighting="affinity", power=2))[1]) < plain


@pytest.mark.parametrize("power", [1, 2])
def test_equal_affinities_are_no_affinities(bench: layers.AtLayer, power: int) -> None:
    """T7: a routing weight of 1 everywhere, or the same power of two, leaves every code as it is."""
    plain = ExpertHessian("gate_up")
    weighed = ExpertHessian("gate_up", "affinity", power)  # type: ignore[arg-type]
    x = torch.randn(300, 128, generator=torch.Generator().manual_seed(0))
    weight = bench.weights.experts[0].gate_up
    assert isinstance(weight, Tensor)
    codes = []
    for statistic, gate in ((plain, 0.3), (weighed, 1.0), (weighed, 4.0)):
        state = statistic.init(bench.model.facts.layers[1].site)  # type: ignore[arg-type]
        gates, empty = torch.full((300,), gate), torch.empty(300, 0)
        statistic.observe_expert(state, ExpertObservation(0, torch.arange(300), gates, x, empty, empty))
        codes.append(gptq(weight.float(), state["hessian"][0], gptq_pass().scheme).q.codes)
    assert torch.equal(codes[0], codes[1]) and torch.equal(codes[0], codes[2])


def test_all_experts_see_all_tokens_while_routing_is_kept(bench: layers.AtLayer) -> None:
    wanted = (ExpertHessian("gate_up", all_experts=True), ExpertHessian("down", all_experts=True))
    found = bench.collect(wanted)
    total = bench.run.tokens.ids.numel()
    for statistic in wanted:
        assert found[statistic.name]["tokens"].tolist() == [total] * 16
    inputs = found[wanted[0].name]["hessian"]
    assert all(torch.equal(inputs[0], inputs[expert]) for expert in range(16))
    routed = bench.collect((ExpertHessian("gate_up"),))["expert_hessian.gate_up"]
    torch.testing.assert_close(inputs[0] * 4, routed["pooled"], rtol=1e-4, atol=1e-2)  # top-4: every token four times
    decision, after = bench.process(gptq_pass(all_experts=True, min_tokens=total))
    assert decision.data["experts"] == {} and bench.error(after) < 0.05


def test_original_inputs_equal_to_the_compressed_change_nothing(bench: layers.AtLayer) -> None:
    """For gate and up; down is asked to make up for gate and up, so there it is something else."""
    plain = bench.process(gptq_pass())[1]
    aimed = bench.process(gptq_pass(target_inputs="original"))[1]
    for a, b in zip(plain.experts, aimed.experts, strict=True):
        assert torch.equal(a.gate_up.codes, b.gate_up.codes)  # type: ignore[union-attr]
    assert bench.error(aimed) < bench.error(plain)


def test_original_inputs_repair_what_earlier_layers_lost(bench_a: Path, text: Tensor, tmp_path: Path) -> None:
    at = layers.at_layer(bench_a, text, tmp_path, batch_tokens=2048)
    model, run = at.model, at.run
    coarse = at.process(gptq_pass(bits=2))[1]
    run_layer(model, model.read_layer(0), run, "original")
    run_layer(model, coarse, run, "compressed")
    later = layers.AtLayer(model, run, at.probe, 1)
    run_layer(model, model.read_layer(0), at.probe, "compressed")
    run_layer(model, later.weights, run, "original")
    store = run.store("original", 2)
    wanted = store.read(0, store.shape[0])
    errors = {}
    for target in ("compressed", "original"):
        _, after = later.process(gptq_pass(bits=2, target_inputs=target))
        errors[target] = float((later.output(after) - wanted).double().square().sum())
    assert errors["original"] < errors["compressed"]


@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek_v3", "gpt_oss", "nemotron_h", "gemma4_text"])
def test_all_targets_of_many_families(model_type: str, tmp_path: Path) -> None:
    path = families.save_tiny(model_type, tmp_path / "model", torch.bfloat16)
    facts = open_model(path).facts
    linears = {facts.layers[-1].roles[name] for name in facts.layers[-1].linears}
    targets = [t for t in ("routed_experts", "attention", "shared_experts") if t == "routed_experts" or t in linears]
    step = gptq_pass(group_size=-1, targets=targets)
    at = layers.at_layer(path, engine.random_ids(4, 24), tmp_path, index=facts.moe_layers[-1].index)
    decision, after = at.process(step)
    chosen = set(step.schemes(facts.layers[at.index]))
    assert {name for name, value in after.tensors.items() if isinstance(value, QuantizedTensor)} == {
        name for name in chosen if name not in ("gate_up", "down")
    }
    assert all(isinstance(e.gate_up, QuantizedTensor) and isinstance(e.down, QuantizedTensor) for e in after.experts)
    assert set(decision.data["linears"]) == chosen - {"gate_up", "down"}
    assert bool(torch.isfinite(at.output(after)).all())


def test_linears_against_the_models_own_inputs(tmp_path: Path) -> None:
    path = families.save_tiny("qwen2_moe", tmp_path / "model", torch.float32)
    ids = engine.random_ids(3, 16)
    at = layers.at_layer(path, ids, tmp_path, index=1, batch_tokens=32)
    seen: dict[str, Tensor] = {}
    model = engine.own_model(path)
    names = [name for name in at.model.facts.layers[1].linears if "attn" in name]
    for name in names:
        module = model.model.layers[1].get_submodule(name.removesuffix(".weight"))
        module.register_forward_pre_hook(lambda _m, args, name=name: seen.__setitem__(name, args[0].flatten(0, -2)))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    step = gptq_pass(targets=["attention"])
    _, after = at.process(step)
    for name in names:
        weight, found = at.weights.tensors[name], after.tensors[name]
        assert isinstance(weight, Tensor) and isinstance(found, QuantizedTensor)
        wanted = gptq(weight, seen[name].t() @ seen[name], step.scheme, scale_dtype=torch.float32)
        assert float((found.codes != wanted.q.codes).float().mean()) < 0.01  # sums in another order


def test_what_cannot_be_is_refused(bench: layers.AtLayer) -> None:
    facts = bench.model.facts
    assert gptq_pass(order="act").check(facts) == [
        "order: act mixes columns of different groups of 32 (works: order: gar, static_groups: true, or group_size: -1)"
    ]
    assert gptq_pass(order="act", group_size=128).check(facts) == []
    assert gptq_pass(order="act", static_groups=True).check(facts) == []
    assert "works: 16, 32, 64, 128" in gptq_pass(group_size=48).check(facts)[0]
    with pytest.raises(ValidationError, match="weighting: none"):
        gptq_pass(all_experts=True, weighting="affinity")
    assert gptq_pass().needs_data and not QuantizeRTN().needs_data


def test_overflowing_inputs_are_told() -> None:
    sums = torch.full((32, 32), torch.inf)
    inputs = Inputs(99, 1, 99, sums, None, 0.0, {"": sums, "_delta": None})
    with pytest.raises(CalibrationError, match="here: hessian: holds NaN or infinity"):
        gptq_pass()._expert(CONTEXT, "here", torch.randn(4, 32), inputs, {"experts": {}}, (0, "gate_up"), False)


def test_lighter_holds_as_few_experts_as_asked(bench: layers.AtLayer) -> None:
    facts, layer = bench.model.facts, bench.model.facts.layers[0]
    whole = gptq_pass().statistics_bytes(layer)
    for excess in (1, whole // 3, whole // 2, 10 * whole):
        lighter = gptq_pass().lighter(facts, excess)
        assert lighter.expert_group is not None
        held = lighter.statistics_bytes(layer)
        assert held <= max(whole - excess, gptq_pass(expert_group=1).statistics_bytes(layer))
    assert gptq_pass(expert_group=3).lighter(facts, whole).expert_group == 3


def test_a_gated_shared_expert_counts_its_tokens_by_its_gate(tmp_path: Path) -> None:
    """AGQ for shared experts: sigmoid gates from transformers' own modules; attention stays unweighted."""
    path = families.save_tiny("qwen2_moe", tmp_path / "model", torch.float32)
    ids = engine.random_ids(3, 40)
    at = layers.at_layer(path, ids, tmp_path, index=1, batch_tokens=48)
    seen: dict[str, Tensor] = {}
    model = engine.own_model(path)
    names = [*at.model.facts.layers[1].linears, "mlp.shared_expert_gate.weight"]
    for name in names:
        module = model.model.layers[1].get_submodule(name.removesuffix(".weight"))
        module.register_forward_pre_hook(lambda _m, args, name=name: seen.__setitem__(name, args[0].flatten(0, -2)))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    row = at.weights.tensors["mlp.shared_expert_gate.weight"]
    assert isinstance(row, Tensor)
    gate = (seen.pop("mlp.shared_expert_gate.weight") @ row[0]).sigmoid()
    gates = shared_gates(at.model.facts.layers[1])
    assert set(gates) == {f"mlp.shared_expert.{part}_proj.weight" for part in ("gate", "up", "down")}
    columns = tuple((name, x.shape[1]) for name, x in seen.items())
    for power in (1, 2):
        wanted = LinearHessian(columns, gates=tuple(gates.items()), power=power)  # type: ignore[arg-type]
        found = at.collect((wanted,))["linear_hessian"]
        for name, x in seen.items():
            weight = gate**power if name in gates else torch.ones(len(x))
            torch.testing.assert_close(found[name], torch.einsum("t,ti,tj->ij", weight, x, x), rtol=1e-4, atol=1e-4)


def test_affinity_lowers_a_shared_experts_gated_error(tmp_path: Path) -> None:
    path = families.save_tiny("qwen2_moe", tmp_path / "model", torch.float32)
    at = layers.at_layer(path, engine.random_ids(6, 60), tmp_path, index=1)
    gate = at.weights.tensors["mlp.shared_expert_gate.weight"]
    sharp = at.weights.with_tensors({"mlp.shared_expert_gate.weight": gate * 6})  # type: ignore[operator]
    gates = tuple(shared_gates(at.model.facts.layers[1]).items())
    columns = tuple((name, at.model.facts.layers[1].shapes[name][1]) for name, _ in gates)
    moments = at.collect((LinearHessian(columns, gates=gates),), sharp)["linear_hessian"]
    errors = {}
    for weighting in ("none", "affinity"):
        step = gptq_pass(bits=2, group_size=-1, targets=["shared_experts"], weighting=weighting)
        _, after = at.process(step, sharp)
        for name, _ in gates[:2]:
            missed = materialise(after.tensors[name], torch.float32) - at.weights.tensors[name]  # type: ignore[operator]
            errors[weighting, name] = float(((missed @ moments[name]) * missed).sum())
    for name, _ in gates[:2]:
        assert errors["affinity", name] < errors["none", name]
