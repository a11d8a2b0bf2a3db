"""The one experts module computes what the families' own modules compute, dense or packed."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import engine
import families
import pytest
import torch
from torch import Tensor, nn

from moecompress.arch.sites import is_experts
from moecompress.checkpoint.native import encode, record_layout
from moecompress.experts import Experts, PackedExperts, materialise, routed_slots
from moecompress.numerics.grids import dequantize, round_to_nearest
from moecompress.ops import Choice
from moecompress.types import ExpertWeights, Scheme

TOKENS, TOP_K = 40, 2


def own_module(model_type: str) -> Any:
    """The family's own experts module of the last MoE layer, by its eager loop over experts."""
    model: Any = families.tiny_model(model_type)
    model.set_experts_implementation("eager")
    return [module for module in model.modules() if is_experts(module)][-1]


def weights_of(module: Any, dtype: torch.dtype = torch.float32) -> tuple[ExpertWeights, ...]:
    up_name = "gate_up_proj" if module.has_gate else "up_proj"

    def canonical(stack: Tensor, index: int) -> Tensor:
        matrix = stack[index].detach()
        return (matrix.T if module.is_transposed else matrix).to(dtype).contiguous()

    def bias(name: str, index: int) -> Tensor | None:
        return getattr(module, f"{name}_bias")[index].detach().to(dtype) if module.has_bias else None

    up, down = getattr(module, up_name), module.down_proj
    return tuple(
        ExpertWeights(canonical(up, i), canonical(down, i), bias(up_name, i), bias("down_proj", i))
        for i in range(down.shape[0])
    )


def our_module(module: nn.Module, dtype: torch.dtype = torch.float32) -> Experts:
    ours = Experts.replacing(module)
    ours.weights = weights_of(module, dtype)
    return ours


def hidden_size(experts: Experts) -> int:
    return int(experts.expert(0).gate_up.shape[1])


def routing(columns: int, experts: int = 8, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [T, H], distinct ids [T, K] and positive weights [T, K]."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(TOKENS, experts, generator=generator).argsort(-1)[:, :TOP_K]
    return torch.randn(TOKENS, columns, generator=generator), ids, torch.rand(TOKENS, TOP_K, generator=generator)


@pytest.mark.parametrize("model_type", engine.STREAMED)
def test_equal_to_the_familys_own_module(model_type: str) -> None:
    own = own_module(model_type)
    ours = our_module(own)
    inputs = routing(hidden_size(ours))
    with torch.no_grad():
        assert engine.difference(ours(*inputs), own(*inputs)) < 1e-5


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss", "nemotron_h", "deepseek_v4", "gemma4_text"])
def test_equal_in_float64(model_type: str) -> None:
    """Beyond rounding: the same function, not merely a near one."""
    own = own_module(model_type).double()
    ours = our_module(own, torch.float64)
    hidden, ids, weights = routing(hidden_size(ours))
    with torch.no_grad():
        found, wanted = ours(hidden.double(), ids, weights.double()), own(hidden.double(), ids, weights.double())
    assert found.dtype == torch.float64 and engine.difference(found, wanted) < 1e-13


def by_hand(experts: Experts, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """One token and one slot at a time, in float64; ids of the number of experts add nothing."""
    out = torch.zeros(hidden.shape, dtype=torch.float64)
    for token in range(hidden.shape[0]):
        for slot in range(ids.shape[1]):
            if ids[token, slot] < len(experts):
                chosen = experts.expert(int(ids[token, slot]))
                one = experts.run_expert(chosen, hidden[token : token + 1].double())[1][0]
                out[token] += weights[token, slot].double() * one
    return out


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_the_sentinel_id_skips_a_slot(model_type: str) -> None:
    ours = our_module(own_module(model_type))
    hidden, ids, weights = routing(hidden_size(ours))
    ids[torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.4] = 8
    assert engine.difference(ours(hidden, ids, weights), by_hand(ours, hidden, ids, weights).float()) < 1e-5
    ids[:] = 8
    assert torch.equal(ours(hidden, ids, weights), torch.zeros_like(hidden))


def test_an_expert_twice_in_one_row_counts_twice() -> None:
    ours = our_module(own_module("qwen3_moe"))
    hidden, ids, weights = routing(64)
    ids[:, 1] = ids[:, 0]
    assert engine.difference(ours(hidden, ids, weights), by_hand(ours, hidden, ids, weights).float()) < 1e-5


@pytest.mark.parametrize("wrong", [-1, 9, 1000])
def test_ids_outside_the_range_are_refused(wrong: int) -> None:
    ours = our_module(own_module("qwen3_moe"))
    hidden, ids, weights = routing(64)
    ids[7, 1] = wrong
    with pytest.raises(ValueError, match=rf"expert ids: .*{wrong}.*0\.\.8"):
        ours(hidden, ids, weights)


def test_no_tokens_give_no_output() -> None:
    ours = our_module(own_module("gpt_oss"))
    none = ours(torch.empty(0, 64), torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2))
    assert none.shape == (0, 64)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_permuting_experts_and_ids_changes_nothing(model_type: str) -> None:
    ours = our_module(own_module(model_type))
    hidden, ids, weights = routing(hidden_size(ours))
    wanted = ours(hidden, ids, weights)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(2))
    ours.weights = [ours.weights[old] for old in order.tolist()]  # new place i holds old expert order[i]
    new_ids = order.argsort()[ids]
    assert engine.difference(ours(hidden, new_ids, weights), wanted) < 1e-6
    assert engine.difference(ours(hidden, ids, weights), wanted) > 0.1


def test_slots_are_each_token_and_slot_once() -> None:
    ids = torch.randint(0, 9, (50, 3), generator=torch.Generator().manual_seed(3))
    seen = torch.full_like(ids, 8)
    before = -1
    for expert, rows, slots in routed_slots(ids, 8):
        assert expert > before and bool((rows.diff() >= 0).all())
        assert bool((seen[rows, slots] == 8).all())
        seen[rows, slots] = expert
        before = expert
    assert torch.equal(seen, ids)


class Recorder:
    def __init__(self) -> None:
        self.routing: list[tuple[Tensor, ...]] = []
        self.experts: list[tuple[Any, ...]] = []

    def on_routing(self, *seen: Tensor) -> None:
        self.routing.append(seen)

    def on_expert(self, *seen: Any) -> None:
        self.experts.append(seen)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_what_is_recorded_makes_up_the_output(model_type: str) -> None:
    ours = our_module(own_module(model_type))
    hidden, ids, weights = routing(64)
    ids[3] = 8
    ours.observer = seen = Recorder()
    out = ours(hidden, ids, weights)
    assert all(torch.equal(a, b) for a, b in zip(seen.routing[0], (hidden, ids, weights), strict=True))
    total = torch.zeros_like(out)
    for expert, rows, gates, inputs, intermediate, outputs in seen.experts:
        assert torch.equal(inputs, hidden[rows])
        assert torch.equal(gates, (weights[rows] * (ids[rows] == expert)).sum(-1))
        down = ours.expert(expert)
        again = nn.functional.linear(intermediate, materialise(down.down, torch.float32), down.down_bias)
        torch.testing.assert_close(again, outputs)
        total[rows] += gates[:, None] * outputs
    torch.testing.assert_close(total, out)
    assert [expert for expert, *_ in seen.experts] == sorted(set(ids.flatten().tolist()) - {8})


def quantized(expert: ExpertWeights, gate_up: int, down: int) -> ExpertWeights:
    def rounded(weight: Any, bits: int) -> Any:
        if bits == 16:
            return weight
        return round_to_nearest(weight, Scheme(bits, 16, binary=bits == 1), scale_dtype=torch.float32)

    return replace(expert, gate_up=rounded(expert.gate_up, gate_up), down=rounded(expert.down, down))


def packed(own: Any, weights: tuple[ExpertWeights, ...]) -> PackedExperts:
    """The module as the loader makes it: one record layout per kind of expert."""
    layouts = [record_layout(expert) for expert in weights]
    kinds = list(dict.fromkeys(layouts))
    module = PackedExperts.packing(own, kinds, [layouts.count(kind) for kind in kinds], "experts")
    filled = [0] * len(kinds)
    for index, (expert, layout) in enumerate(zip(weights, layouts, strict=True)):
        kind = kinds.index(layout)
        getattr(module, f"rec{kind}").data[filled[kind]] = encode(layout, expert)
        module.slot_map.data[index] = torch.tensor([kind, filled[kind]])
        filled[kind] += 1
        if own.has_bias:
            name = "gate_up_proj_bias" if own.has_gate else "up_proj_bias"
            getattr(module, name).data[index] = expert.gate_up_bias
            module.down_proj_bias.data[index] = expert.down_bias
    return module


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "nemotron_h", "granitemoe"])
def test_packed_and_expanded_agree_bit_for_bit(model_type: str) -> None:
    """Every expert with bits of its own, one of them not quantized at all."""
    own = own_module(model_type)
    bits = [(4, 4), (4, 4), (3, 2), (8, 1), (1, 16), (16, 16), (2, 4), (3, 2)]
    weights = tuple(quantized(expert, *pair) for expert, pair in zip(weights_of(own), bits, strict=True))
    ours, dense, small = Experts.replacing(own), Experts.replacing(own), packed(own, weights)
    ours.weights = weights
    dense.weights = tuple(
        replace(e, gate_up=materialise(e.gate_up, torch.float32), down=materialise(e.down, torch.float32))
        for e in weights
    )
    assert len(small) == 8
    inputs = routing(hidden_size(dense))
    wanted = dense(*inputs)
    assert engine.difference(small(*inputs), wanted) < 1e-5  # by a kernel, where there is one
    small.restore()
    small.choice = Choice("torch")
    assert torch.equal(ours(*inputs), wanted) and torch.equal(small(*inputs), wanted)


def test_at_most_one_expert_is_expanded_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    own = own_module("qwen3_moe")
    module = packed(own, tuple(quantized(expert, 4, 4) for expert in weights_of(own)))
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def watched(weight: Any, dtype: torch.dtype) -> Tensor:
        dense = dequantize(weight, dtype)
        made.append(weakref.ref(dense))
        alive.append(sum(ref() is not None for ref in made))
        return dense

    module.choice = Choice("torch")
    monkeypatch.setattr("moecompress.ops.dequantize", watched)
    module(*routing(64))
    assert len(made) == 16 and max(alive) <= 2  # gate_up and down of one expert
