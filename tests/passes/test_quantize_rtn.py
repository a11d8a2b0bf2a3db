"""quantize.rtn: its options do what they say, on every kind of matrix, and better options are never worse."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine
import families
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from moecompress.experts import materialise
from moecompress.numerics.grids import NORM
from moecompress.passes.base import Decision
from moecompress.passes.quantize_rtn import QuantizeRTN
from moecompress.stream.model import StreamModel, open_model
from moecompress.types import LayerWeights, QuantizedTensor, Scheme, Weight

BITS = (1, 2, 3, 4, 8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> StreamModel:
    """Has routed and shared experts, a dense first layer, attention; all widths are multiples of 128."""
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128, "intermediate_size": 128, "kv_lora_rank": 128}
    sizes |= {"q_lora_rank": 128, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32}
    path = tmp_path_factory.mktemp("model")
    return open_model(families.save_tiny("deepseek_v3", path, torch.bfloat16, **sizes))


def context_of(model: StreamModel, weights: LayerWeights) -> Any:
    """All that this pass looks at."""
    layer = model.facts.layers[weights.index]
    return SimpleNamespace(layer=layer, weights=weights, scale_dtype=torch.bfloat16, allocation=None)


def applied(model: StreamModel, step: QuantizeRTN, index: int = 1) -> tuple[LayerWeights, LayerWeights]:
    """The layer before and after."""
    before = model.read_layer(index)
    context = context_of(model, before)
    return before, step.apply(context, step.decide(context))


def errors(before: LayerWeights, after: LayerWeights, power: int = 2) -> float:
    """Sum of |w - q|^power over all experts."""
    total = 0.0
    for a, b in zip(before.experts, after.experts, strict=True):
        for x, y in ((a.gate_up, b.gate_up), (a.down, b.down)):
            total += float((materialise(x, torch.float64) - materialise(y, torch.float64)).abs().pow(power).sum())
    return total


@pytest.mark.parametrize("grid", ["minmax", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("bits", BITS)
def test_every_option(bits: Any, group_size: int, symmetric: bool, grid: Any, model: StreamModel) -> None:
    """Codes within range, scales per group in the checkpoint's dtype, no value further off than one step."""
    step = QuantizeRTN(bits=bits, group_size=group_size, symmetric=symmetric, grid=grid)
    assert step.check(model.facts) == []
    before, after = applied(model, step)
    for old, new in zip(before.experts, after.experts, strict=True):
        for a, b in ((old.gate_up, new.gate_up), (old.down, new.down)):
            assert isinstance(a, Tensor) and isinstance(b, QuantizedTensor)
            assert b.scheme == Scheme(
                bits, group_size, symmetric, "none" if symmetric else "int", bits == 1 and symmetric
            )
            assert b.codes.dtype == torch.uint8 and b.codes.shape == a.shape and int(b.codes.max()) < 2**bits
            groups = 1 if group_size == -1 else a.shape[1] // group_size
            assert b.scales.dtype == torch.bfloat16 and b.scales.shape == (a.shape[0], groups)
            assert (b.zeros is None) == symmetric
            if grid == "minmax" and not b.scheme.binary:
                steps = b.scales.float().abs().repeat_interleave(a.shape[1] // groups, 1)
                off = (materialise(b, torch.float32) - a.float()).abs()
                assert bool((off <= 1.05 * steps).all())
    assert all(after.tensors[name] is value for name, value in before.tensors.items())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("grid", ["minmax", "mse"])
def test_more_bits_are_never_worse(grid: Any, symmetric: bool, model: StreamModel) -> None:
    steps = [QuantizeRTN(bits=bits, group_size=32, symmetric=symmetric, grid=grid) for bits in BITS]  # type: ignore[arg-type]
    found = [errors(*applied(model, step)) for step in steps]
    assert found == sorted(found, reverse=True) and found[-1] < found[-2] / 50


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_search_is_never_worse_in_what_it_minimises(bits: Any, symmetric: bool, model: StreamModel) -> None:
    found = {
        grid: errors(*applied(model, QuantizeRTN(bits=bits, group_size=32, symmetric=symmetric, grid=grid)), power=NORM)
        for grid in ("minmax", "mse")
    }
    assert found["mse"] <= found["minmax"]
    if bits == 2:
        assert found["mse"] < 0.9 * found["minmax"]


@pytest.mark.parametrize("bits", [2, 4])
def test_smaller_groups_are_never_worse(bits: Any, model: StreamModel) -> None:
    found = [errors(*applied(model, QuantizeRTN(bits=bits, group_size=size))) for size in (32, 64, 128)]
    assert found == sorted(found)
    assert errors(*applied(model, QuantizeRTN(bits=bits, group_size=-1))) == found[-1]  # 128 columns: the same groups


def roles_of_changed(model: StreamModel, targets: tuple[str, ...], index: int) -> set[str]:
    before, after = applied(model, QuantizeRTN(group_size=32, targets=targets), index)  # type: ignore[arg-type]
    roles = model.facts.layers[index].roles
    changed = {name: value for name, value in after.tensors.items() if value is not before.tensors[name]}
    assert all(isinstance(value, QuantizedTensor) for value in changed.values())
    wanted = {name for name in model.facts.layers[index].linears if roles[name] in targets}
    assert set(changed) == wanted
    found = {str(roles[name]) for name in changed}
    if before.experts and isinstance(after.experts[0].down, QuantizedTensor):
        found.add("routed_experts")
    return found


@pytest.mark.parametrize("target", ["routed_experts", "attention", "shared_experts", "dense_mlp"])
def test_each_target_alone(target: str, model: StreamModel) -> None:
    dense, sparse = roles_of_changed(model, (target,), 0), roles_of_changed(model, (target,), 1)
    assert dense == ({target} & {"attention", "dense_mlp"})
    assert sparse == ({target} & {"routed_experts", "attention", "shared_experts"})


def test_all_targets_leave_router_norms_and_vocabulary(model: StreamModel) -> None:
    targets = ("routed_experts", "attention", "shared_experts", "dense_mlp")
    assert roles_of_changed(model, targets, 1) == {"routed_experts", "attention", "shared_experts"}
    facts = model.facts.layers[1]
    kept = {facts.roles[name] for name in facts.roles if name not in facts.linears}
    assert {"router", "norm"} <= kept and not {"router", "norm"} & {facts.roles[name] for name in facts.linears}


@pytest.mark.parametrize("target", ["router", "gate", "norm", "lm_head", "embedding"])
def test_a_router_is_not_quantized_and_the_reason_is_given(target: str, tmp_path: Path, bench_a: Path) -> None:
    recipe = engine.write_recipe(tmp_path, bench_a, [{"quantize.rtn": {"targets": ["routed_experts", target]}}])
    done = engine.command("run", recipe)
    assert done.code == 2 and "Traceback" not in done.err
    assert f"'{target}' is not quantized: a rounded router sends tokens to other experts" in done.err
    assert "recipe.yaml:" in done.err and "shared_experts" in done.err


@pytest.mark.parametrize("targets", ["attention", ["attention"]])
def test_one_target_may_be_a_plain_word(targets: Any) -> None:
    assert QuantizeRTN(targets=targets).targets == ("attention",)


@pytest.mark.parametrize(
    "options",
    [{"bits": 5}, {"bits": 16}, {"group_size": 0}, {"group_size": -2}, {"grid": "best"}, {"targets": ["mlp"]}],
)
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(options))):
        QuantizeRTN(**options)


def test_a_group_size_that_does_not_divide_names_what_would(tmp_path: Path) -> None:
    facts = open_model(families.save_tiny("qwen2_moe", tmp_path)).facts  # hidden 64, experts 32, shared expert 40
    assert QuantizeRTN(group_size=32).check(facts) == []
    (problem,) = QuantizeRTN(group_size=64).check(facts)
    assert problem.startswith("group_size 64 does not divide the 32 input columns of experts down (works: 16, 32,")
    (problem,) = QuantizeRTN(group_size=32, targets=("routed_experts", "shared_experts")).check(facts)
    assert (
        "40 input columns of mlp.shared_expert.down_proj.weight (works: none of 16..256, -1 = per channel)" in problem
    )


def test_sizes_that_differ_between_layers_are_all_checked(tmp_path: Path) -> None:
    """Layers with sliding and with full attention have other head sizes: none may be overlooked."""
    path = families.save_tiny("gemma4_text", tmp_path, head_dim=20, global_head_dim=16)
    facts = open_model(path).facts
    widths = {layer.shapes["self_attn.o_proj.weight"][1] for layer in facts.layers}
    assert widths == {64, 80}
    problems = QuantizeRTN(group_size=64, targets=("attention",)).check(facts)
    assert len(problems) == 1 and "80 input columns of self_attn.o_proj.weight" in problems[0]


def test_a_target_the_model_does_not_have_is_a_problem(bench_a: Path) -> None:
    (problem,) = QuantizeRTN(group_size=32, targets=("shared_experts",)).check(open_model(bench_a).facts)
    assert problem == "targets: this model has no shared_experts"


def test_codes_of_an_earlier_pass_are_left_alone(model: StreamModel) -> None:
    _, first = applied(model, QuantizeRTN(bits=8, group_size=32))
    step = QuantizeRTN(bits=2, group_size=32)
    context = context_of(model, first)
    again = step.apply(context, step.decide(context))
    assert all(a.gate_up is b.gate_up and a.down is b.down for a, b in zip(first.experts, again.experts, strict=True))


def test_apply_follows_the_decision(model: StreamModel) -> None:
    """An edited decision that names fewer targets quantizes fewer."""
    before = model.read_layer(1)
    step = QuantizeRTN(group_size=32, targets=("routed_experts", "attention"))
    context = context_of(model, before)
    name = "self_attn.o_proj.weight"
    assert {"gate_up", "down", name} < set(step.decide(context).data["targets"])
    after = step.apply(context, Decision({"bits": 4, "targets": [name]}))
    assert isinstance(after.tensors[name], QuantizedTensor)
    kept: list[Weight] = [value for key, value in after.tensors.items() if key != name]
    assert all(isinstance(value, Tensor) for value in kept) and after.experts is before.experts


def test_scales_are_stored_in_the_dtype_they_were_found_for(model: StreamModel) -> None:
    """Grids are made for rounded scales, so that storing them changes nothing."""
    _, after = applied(model, QuantizeRTN(bits=4, group_size=32))
    weight = after.experts[0].gate_up
    assert isinstance(weight, QuantizedTensor)
    values = materialise(weight, torch.float32)
    by_hand = (weight.codes.float() - 8) * weight.scales.float().repeat_interleave(32, 1)
    assert torch.equal(values, by_hand)
