"""Experts as neurons, their alignment, their mean, and segments moved from one to another."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moecompress.numerics.matching import aligned
from moecompress.numerics.merging import average, shares
from moecompress.numerics.neurons import Neurons, expert_of, joined, linear_in_up, neurons_of
from moecompress.numerics.segments import Rule, balanced, destinations, rebuilt, similarity
from moecompress.types import ExpertWeights

WIDTH, H = 12, 7
LAYOUTS = [(True, True, False), (True, False, True), (False, True, False), (False, True, True)]  # gated, whole, bias


def expert(seed: int = 0, gated: bool = True, bias: bool = False, width: int = WIDTH) -> ExpertWeights:
    generator = torch.Generator().manual_seed(seed)
    rows = 2 * width if gated else width
    biases = [torch.randn(size, generator=generator) if bias else None for size in (rows, H)]
    return ExpertWeights(torch.randn(rows, H, generator=generator), torch.randn(H, width, generator=generator), *biases)


def activate(projected: Tensor, gated: bool, concatenated: bool) -> Tensor:
    if not gated:
        return torch.relu(projected).square()
    gate, up = projected.chunk(2, -1) if concatenated else (projected[..., ::2], projected[..., 1::2])
    return torch.nn.functional.silu(gate) * up


def run(weights: ExpertWeights, x: Tensor, gated: bool = True, concatenated: bool = True) -> Tensor:
    bias = 0 if weights.gate_up_bias is None else weights.gate_up_bias
    out = activate(x @ weights.gate_up.T + bias, gated, concatenated) @ weights.down.T  # type: ignore[union-attr]
    return out if weights.down_bias is None else out + weights.down_bias


def permuted(neurons: Neurons, seed: int = 0) -> Neurons:
    return neurons.take(torch.randperm(len(neurons.outputs), generator=torch.Generator().manual_seed(seed)))


def x(count: int = 40) -> Tensor:
    return torch.randn(count, H, generator=torch.Generator().manual_seed(99))


@pytest.mark.parametrize(("gated", "concatenated", "bias"), LAYOUTS)
def test_neurons_are_the_expert_in_any_order(gated: bool, concatenated: bool, bias: bool) -> None:
    before = expert(0, gated, bias)
    neurons = neurons_of(before, gated, concatenated)
    again = expert_of(neurons, before, gated, concatenated)
    assert all(
        torch.equal(a, b) for a, b in zip(vars(again).values(), vars(before).values(), strict=True) if a is not None
    )
    other = expert_of(permuted(neurons), before, gated, concatenated)
    assert not torch.equal(other.gate_up, before.gate_up)  # type: ignore[arg-type]
    wanted = run(before, x(), gated, concatenated)
    torch.testing.assert_close(run(other, x(), gated, concatenated), wanted, rtol=1e-4, atol=1e-4)


def test_the_best_order_is_found() -> None:
    first, second = (neurons_of(expert(seed, width=5), True, True) for seed in (0, 1))
    best = max(
        itertools.permutations(range(5)),
        key=lambda p: float((first.flat() * second.flat()[list(p)]).sum()),
    )
    assert aligned(first, second).tolist() == list(best)
    again = permuted(first, 3)
    torch.testing.assert_close(again.take(aligned(first, again)).flat(), first.flat())
    with pytest.raises(ValueError, match="equal widths"):
        aligned(first, neurons_of(expert(0), True, True))


def test_shares_add_up_in_every_cluster() -> None:
    labels = torch.tensor([0, 1, 0, 2, 1, 2])
    found = shares(torch.tensor([3.0, 0, 1, 5, 0, 5]), labels)
    torch.testing.assert_close(found, torch.tensor([0.75, 0.5, 0.25, 0.5, 0.5, 0.5], dtype=torch.float64))


@pytest.mark.parametrize("bias", [False, True])
def test_order_of_neurons_does_not_matter_to_the_mean(bias: bool) -> None:
    members = [neurons_of(expert(seed, bias=bias), True, True) for seed in range(3)]
    weights = [0.5, 0.3, 0.2]
    wanted = average(members, weights)
    for seed in range(2):
        found = average([members[0], permuted(members[1], seed), permuted(members[2], seed + 5)], weights)
        torch.testing.assert_close(found.flat(), wanted.flat(), rtol=1e-6, atol=1e-6)
    turned = average([permuted(members[0], 4), *members[1:]], weights)
    before, after = (expert_of(n, expert(0, bias=bias), True, True) for n in (wanted, turned))
    torch.testing.assert_close(run(after, x()), run(before, x()), rtol=1e-4, atol=1e-4)
    low = torch.stack([m.take(aligned(members[0], m)).flat() for m in members]).amin(0)
    assert bool((wanted.flat() >= low - 1e-6).all())  # a convex combination


def test_copies_merge_without_loss_and_only_when_aligned() -> None:
    one = neurons_of(expert(0), True, True)
    twins = [one, permuted(one, 1), permuted(one, 2)]
    torch.testing.assert_close(average(twins, [0.2, 0.5, 0.3]).flat(), one.flat(), rtol=1e-6, atol=1e-6)
    apart = average(twins, [0.2, 0.5, 0.3], align=False)
    assert float((apart.flat() - one.flat()).norm() / one.flat().norm()) > 0.3
    assert average([one], [1.0]) is one


def test_linear_in_up() -> None:
    assert linear_in_up(lambda p: activate(p, True, True), True, True)
    assert linear_in_up(lambda p: activate(p, True, False), True, False)
    assert not linear_in_up(lambda p: activate(p, False, True), False, True)

    def gpt_oss(projected: Tensor) -> Tensor:
        gate, up = projected[..., ::2].clamp(max=7), projected[..., 1::2].clamp(-7, 7)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)

    assert not linear_in_up(gpt_oss, True, False)


@pytest.mark.parametrize("bias", [False, True])
def test_balancing_and_turning_keep_the_function(bias: bool) -> None:
    like = expert(0, bias=bias)
    neurons = neurons_of(like, True, True)
    made = balanced(neurons)
    up = made.inputs[:, -1] if made.bias is None else torch.cat([made.inputs[:, -1], made.bias[:, -1:]], 1)
    torch.testing.assert_close(up.norm(dim=1), made.outputs.norm(dim=1))
    factors = torch.tensor([-1.0, 3.0, 0.25] * 4)
    for other in (made, neurons.scaled(factors)):
        torch.testing.assert_close(run(expert_of(other, like, True, True), x()), run(like, x()), rtol=1e-4, atol=1e-4)
    again = balanced(neurons.scaled(factors))
    found = similarity(made, again, Rule(gate=1 / 3, up=1 / 3, down=1 / 3))
    assert found.argmax(1).tolist() == list(range(WIDTH)) and float(found.diagonal().min()) > 1 - 1e-5
    plain = similarity(neurons, neurons.scaled(factors), Rule(canonical=False))
    assert float(plain.diagonal().min()) < -0.99


@settings(max_examples=10)
@given(seed=st.integers(0, 99))
def test_similarity_equals_a_loop(seed: int) -> None:
    first, second = (neurons_of(expert(seed + k, width=4), True, True) for k in (0, 50))
    rule = Rule(gate=0.2, up=0.5, down=0.3)
    found = similarity(first, second, rule)
    cos = torch.nn.functional.cosine_similarity
    for i, j in itertools.product(range(4), repeat=2):
        gate, up = (float(cos(first.inputs[i, k], second.inputs[j, k], dim=0)) for k in (0, 1))
        down = float(cos(first.outputs[i], second.outputs[j], dim=0))
        sign = -1 if up < 0 else 1
        assert float(found[i, j]) == pytest.approx(0.2 * gate + sign * (0.5 * up + 0.3 * down), abs=1e-5)


def moved(kept: Neurons, dropped: Neurons, rule: Rule) -> Neurons:
    ((goal, alike),) = destinations([dropped], [kept], rule)
    taken = dropped.take(((goal == 0) & (alike > rule.threshold)).nonzero().flatten())
    return rebuilt(kept, taken, 1.0, torch.full((len(taken.outputs),), 2.0), rule)


@pytest.mark.parametrize("bias", [False, True])
def test_a_copy_is_taken_over_without_loss(bias: bool) -> None:
    like = expert(0, bias=bias)
    kept = balanced(neurons_of(like, True, True))
    factors = torch.tensor([-1.0, 2.0] * (WIDTH // 2))
    copy = balanced(permuted(neurons_of(like, True, True).scaled(factors)))
    found = moved(kept, copy, Rule())
    torch.testing.assert_close(run(expert_of(found, like, True, True), x()), run(like, x()), rtol=1e-4, atol=1e-4)
    paper = moved(kept, copy, Rule(init="gate_max"))
    wanted = run(like, x())
    assert (
        float((run(expert_of(paper, like, True, True), x()) - wanted).norm() / wanted.norm()) > 0.1
    )  # the known defect


def test_nothing_in_common_moves_nothing() -> None:
    kept, other = (balanced(neurons_of(expert(seed), True, True)) for seed in (0, 1))
    ((goal, alike),) = destinations([other], [kept], Rule(threshold=1.0))
    assert not bool((alike > 1).any()) and goal.tolist() == [0] * WIDTH
    none = joined([other]).take(torch.empty(0, dtype=torch.int64))
    torch.testing.assert_close(
        rebuilt(kept, none, 1.0, torch.empty(0), Rule()).flat(), kept.flat(), rtol=1e-5, atol=1e-6
    )


def test_more_moves_at_lower_thresholds_and_to_the_nearest() -> None:
    experts = [balanced(neurons_of(expert(seed), True, True)) for seed in range(4)]
    found = destinations(experts[:2], experts[2:], Rule())
    for neurons, (goal, alike) in zip(experts[:2], found, strict=True):
        each = torch.stack([similarity(neurons, other, Rule()).amax(1) for other in experts[2:]])
        assert torch.equal(goal, each.argmax(0)) and torch.equal(alike, each.amax(0))
        fractions = [float((alike > threshold).double().mean()) for threshold in (0.0, 0.3, 0.6, 0.9)]
        assert fractions == sorted(fractions, reverse=True)


def test_the_heavy_one_decides_a_cluster_and_dead_neurons_stay() -> None:
    kept = balanced(neurons_of(expert(0), True, True))
    near = kept._replace(outputs=kept.outputs + 0.2 * torch.randn(WIDTH, H, generator=torch.Generator().manual_seed(1)))
    for weight, far, close in ((1e6, kept, near), (1e-6, near, kept)):
        found = rebuilt(kept, near, 1.0, torch.full((WIDTH,), weight), Rule(iterations=1))
        assert (found.flat() - close.flat()).norm() < 0.1 * (
            far.flat() - close.flat()
        ).norm() + 0.05 * close.flat().norm()
    dead = kept.take(torch.arange(WIDTH))
    dead.inputs[3], dead.outputs[3] = 0, 0
    found = rebuilt(dead, dead.take(torch.tensor([3, 4])), 1.0, torch.ones(2), Rule())
    assert bool(found.flat().isfinite().all()) and float(found.flat()[3].abs().max()) == 0


@pytest.mark.parametrize("part", ["kept", "dropped"])
def test_segments_do_not_care_for_order(part: str) -> None:
    like = expert(0)
    kept, dropped = (balanced(neurons_of(expert(seed), True, True)) for seed in (0, 1))
    rule = Rule(threshold=0.2)
    wanted = expert_of(moved(kept, dropped, rule), like, True, True)
    pair = (permuted(kept), dropped) if part == "kept" else (kept, permuted(dropped))
    found = expert_of(moved(*pair, rule), like, True, True)
    torch.testing.assert_close(run(found, x()), run(wanted, x()), rtol=1e-3, atol=1e-3)
