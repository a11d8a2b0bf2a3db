"""Learned rounding: starts are kept exactly, gradients are those of autograd, learning lowers the block's error."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from moecompress.numerics.block import BlockSample, gptq_expert, own_outputs, pooled_moments, routed
from moecompress.numerics.grids import dequantize, round_to_nearest
from moecompress.numerics.learned import Learned, Schedule, learn_block
from moecompress.numerics.rounding import Adam, LearnedMatrix
from moecompress.types import QuantizedTensor, Scheme

EXPERTS, TOP_K, HIDDEN, WIDTH = 4, 2, 16, 16


def scheme(bits: int, symmetric: bool = True, group: int = 8) -> Scheme:
    return Scheme(bits, group, symmetric, "none" if symmetric else "int", bits == 1 and symmetric)


def matrix(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def some_codes(weight: Tensor, chosen: Scheme, seed: int) -> QuantizedTensor:
    """The nearest codes with some of them moved by one, as GPTQ does."""
    near = round_to_nearest(weight, chosen, grid="mse")
    moved = near.codes.int() + torch.randint(-1, 2, near.codes.shape, generator=torch.Generator().manual_seed(seed))
    return replace(near, codes=moved.clamp(0, 2**chosen.bits - 1).to(torch.uint8))


def forward(_: int, gate_up: Tensor, down: Tensor, x: Tensor) -> Tensor:
    gate, up = (x @ gate_up.t()).chunk(2, -1)
    return (F.silu(gate) * up) @ down.t()


def block(bits: int = 3, tokens: int = 256, seed: int = 0, **options: Any) -> tuple[Any, Any, BlockSample]:
    """Learned matrices of a small block with correlated inputs, and its sample with the original's outputs."""
    made = torch.Generator().manual_seed(seed)
    mix = torch.randn(HIDDEN, HIDDEN, generator=made)
    hidden = torch.randn(tokens, HIDDEN, generator=made) @ mix / 4
    ids = torch.rand(tokens, EXPERTS, generator=made).argsort(1)[:, :TOP_K]
    gates = torch.rand(tokens, TOP_K, generator=made)
    up = [matrix(2 * WIDTH, HIDDEN, 10 + e) / 4 for e in range(EXPERTS)]
    down = [matrix(HIDDEN, WIDTH, 20 + e) / 4 for e in range(EXPERTS)]
    sample = BlockSample(hidden, ids, gates, torch.zeros_like(hidden))
    sample = replace(sample, target=output(sample, up, down))
    learned = [
        [LearnedMatrix(w, round_to_nearest(w, scheme(bits), grid="mse"), **options) for w in side]
        for side in (up, down)
    ]
    return learned[0], learned[1], sample


def output(sample: BlockSample, up: Any, down: Any) -> Tensor:
    """The block, token by token and slot by slot."""
    rows = []
    for x, ids, gates in zip(sample.hidden, sample.ids.tolist(), sample.weights, strict=True):
        parts = [g * forward(e, up[e], down[e], x[None])[0] for e, g in zip(ids, gates, strict=True) if e < len(up)]
        rows.append(sum(parts, torch.zeros_like(x)))
    return torch.stack(rows)


def relative_error(sample: BlockSample, codes: Any) -> float:
    missed = output(sample, *([dequantize(q) for q in side] for side in codes)) - sample.target
    return float(missed.square().sum() / sample.target.square().sum())


def learn(blocks: Any, judge: BlockSample | None = None, seed: int = 0, **schedule: Any) -> Learned:
    up, down, sample = blocks
    plan = Schedule(**{"steps": 30, "batch": 128, **schedule})
    return learn_block(forward, up, down, sample, judge, plan, torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(bits=st.sampled_from([1, 2, 3, 4, 8]), symmetric=st.booleans(), seed=st.integers(0, 1000))
def test_a_start_is_kept_exactly(bits: int, symmetric: bool, seed: int) -> None:
    weight, chosen = matrix(6, 16, seed), scheme(bits, symmetric)
    start = some_codes(weight, chosen, seed)
    learned = LearnedMatrix(weight, start, reach=300.0)
    found = learned.quantized()
    assert torch.equal(found.codes, start.codes) and torch.equal(found.scales, start.scales)
    assert (found.zeros is None) == symmetric and found.scheme == chosen
    assert torch.equal(learned.values(), dequantize(found))


@pytest.mark.parametrize("symmetric", [True, False])
def test_values_are_what_is_stored_after_moves(symmetric: bool) -> None:
    weight = matrix(8, 32, 1)
    learned = LearnedMatrix(weight, round_to_nearest(weight, scheme(3, symmetric), grid="mse"))
    before = learned.quantized()
    for seed in range(5):
        learned.move(matrix(8 * 4, 8, seed).view(8, 4, 8) * 0.2, matrix(8, 4, seed)[..., None] * 0.05)
        assert torch.equal(learned.values(), dequantize(learned.quantized()))
    after = learned.quantized()
    assert not torch.equal(before.codes, after.codes) and not torch.equal(before.scales, after.scales)
    assert after.scales.dtype == torch.bfloat16
    assert float(learned.offset.abs().max()) <= 0.5 and 0.5 <= float(learned.factor.min())


def test_rate_zero_never_moves() -> None:
    weight = matrix(8, 16, 1)
    start = some_codes(weight, scheme(4), 3)
    learned = LearnedMatrix(weight, start, reach=2.0, rate=0.0)
    learned.move(torch.ones(8, 2, 8), torch.ones(8, 2, 1))
    assert torch.equal(learned.quantized().codes, start.codes)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_gradients_are_those_of_straight_through_rounding(bits: int, symmetric: bool) -> None:
    weight = matrix(5, 16, 7)
    start = round_to_nearest(weight, scheme(bits, symmetric), grid="mse")
    learned = LearnedMatrix(weight, start)
    learned.move(matrix(10, 8, 8).view(5, 2, 8) * 0.3, torch.zeros(5, 2, 1))
    offset = learned.offset.clone().requires_grad_()
    factor = torch.ones(5, 2, 1, requires_grad=True)
    scale = start.scales.float()[..., None] * factor
    zero = torch.full((5, 2, 1), 2.0 ** (bits - 1)) if start.zeros is None else start.zeros.float()[..., None]
    position = weight.view(5, 2, 8) / scale + offset + zero
    rounded = position + (position.round() - position).detach()
    inside = (position >= -0.5) & (position <= 2**bits - 0.5)
    code = torch.where(inside, rounded, position.detach().round().clamp(0, 2**bits - 1))
    upstream = matrix(5, 16, 9)
    ((code - zero) * scale * upstream.view(5, 2, 8)).sum().backward()
    found = learned.gradients(upstream)
    torch.testing.assert_close(found[0], offset.grad)
    torch.testing.assert_close(found[1], factor.grad)


def test_adam_is_adam() -> None:
    value = torch.nn.Parameter(matrix(3, 4, 0))
    reference = torch.optim.Adam([value], lr=0.01, betas=(0.9, 0.95), eps=0)
    own = Adam.zeros(value.detach())
    expected = value.detach().clone()
    for seed in range(5):
        value.grad = matrix(3, 4, seed)
        expected -= 0.01 * own.direction(value.grad.clone())
        reference.step()
    torch.testing.assert_close(expected, value.detach())
    assert not bool(Adam.zeros(value.detach()).direction(torch.zeros(3, 4)).any())


def test_one_step_follows_the_gradient_of_the_whole_block() -> None:
    up, down, sample = block(rate=1.0)
    sample = replace(sample, target=sample.target + 1)  # a miss that every expert shares
    dense = [[m.values().requires_grad_() for m in side] for side in (up, down)]
    before = [[m.offset.clone() for m in side] for side in (up, down)]
    loss = (output(sample, *dense) - sample.target).square().sum() / len(sample.hidden)
    gradients = torch.autograd.grad(loss, [*dense[0], *dense[1]])
    wanted = [m.gradients(g)[0] for m, g in zip([*up, *down], gradients, strict=True)]
    plan = {"optimizer": "sign_sgd", "rate": 0.01, "decay": "linear", "rounding": "straight"}
    learn((up, down, sample), steps=1, batch=256, **plan)
    for matrix_, old, gradient in zip([*up, *down], [*before[0], *before[1]], wanted, strict=True):
        clear = gradient.abs() > 1e-5
        assert bool(clear.any())
        torch.testing.assert_close(
            (matrix_.offset - old)[clear], (old - 0.01 * gradient.sign()).clamp(-0.5, 0.5)[clear] - old[clear]
        )


@pytest.mark.parametrize("symmetric", [True, False])
def test_softness_runs_from_no_rounding_to_rounding(symmetric: bool) -> None:
    weight = matrix(8, 32, 1)
    start = round_to_nearest(weight, scheme(3, symmetric))
    learned = LearnedMatrix(weight, start)
    scale = start.scales.float().repeat_interleave(8, 1)
    zero = 4.0 if start.zeros is None else start.zeros.float().repeat_interleave(8, 1)
    wanted = weight + learned.offset.flatten(1) * scale
    inside = (wanted / scale + zero >= 0) & (wanted / scale + zero <= 7)
    assert float(inside.float().mean()) > 0.8
    torch.testing.assert_close(learned.values(1.0)[inside], wanted[inside], atol=1e-5, rtol=1e-5)
    distances = [float((learned.values(softness) - learned.values()).abs().sum()) for softness in (1.0, 0.5, 0.1, 1e-6)]
    assert distances == sorted(distances, reverse=True) and distances[-1] < 1e-2 * distances[0]


@pytest.mark.parametrize("optimizer", ["adam", "sign_sgd"])
@pytest.mark.parametrize("rounding", ["soft", "straight"])
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_learning_lowers_the_error_of_the_block(bits: int, rounding: Any, optimizer: Any) -> None:
    made = block(bits, reach=1.5)
    before = relative_error(made[2], [[m.quantized() for m in side] for side in made[:2]])
    found = learn(made, steps=60, rate=1e-2, rounding=rounding, optimizer=optimizer)
    assert relative_error(made[2], found.codes) < 0.8 * before
    assert found.best == 60 and found.errors == ()


def test_the_judge_keeps_the_best_and_its_errors_are_those_of_the_codes() -> None:
    made = block(3)
    judge = made[2].rows(torch.arange(64))
    start = relative_error(judge, [[m.quantized() for m in side] for side in made[:2]])
    found = learn(made, judge, steps=20, rate=0.5, scale_rate=0.3, rounding="straight")  # far too large steps
    steps = dict(found.errors)
    assert steps[0] == pytest.approx(start, rel=1e-4) and list(steps) == list(range(0, 21, 2))
    assert steps[found.best] == min(steps.values()) == pytest.approx(relative_error(judge, found.codes), rel=1e-4)
    assert max(steps.values()) > 1.5 * start, "the steps were to do harm"


def test_no_steps_give_the_start() -> None:
    made = block(2)
    start = [[m.quantized() for m in side] for side in made[:2]]
    found = learn(made, made[2], steps=0)
    assert found.best == 0 and len(found.errors) == 1
    for side, wanted in zip(found.codes, start, strict=True):
        assert all(torch.equal(a.codes, b.codes) for a, b in zip(side, wanted, strict=True))


def test_an_expert_that_nobody_visits_keeps_its_start_and_skipped_slots_do_nothing() -> None:
    up, down, sample = block(3)
    start = [side[2].quantized() for side in (up, down)]
    ids = torch.where(sample.ids == 2, EXPERTS, sample.ids)
    sample = replace(sample, ids=ids, target=output(replace(sample, ids=ids), *_dense(up, down)))
    assert bool((ids == EXPERTS).any())
    found = learn((up, down, sample), sample, steps=10)
    assert found.errors[0][1] < 1e-10, "the target is what the other experts already give"
    for side, wanted in zip(found.codes, start, strict=True):
        assert torch.equal(side[2].codes, wanted.codes) and torch.equal(side[2].scales, wanted.scales)


def _dense(*sides: Any) -> list[list[Tensor]]:
    return [[m.values() for m in side] for side in sides]


def test_equal_seeds_give_equal_codes_and_others_do_not() -> None:
    found = [learn(block(3), seed=seed) for seed in (0, 0, 1)]
    same, other = (
        all(torch.equal(a.codes, b.codes) for a, b in zip(found[0].codes[0], found[i].codes[0], strict=True))
        for i in (1, 2)
    )
    assert same and not other


def test_no_tokens_are_refused() -> None:
    up, down, sample = block(2)
    with pytest.raises(ValueError, match="0 tokens"):
        learn((up, down, sample.rows(torch.zeros(0, dtype=torch.int64))))
    with pytest.raises(ValueError, match="weight: shape"):
        LearnedMatrix(torch.zeros(2, 8), up[0].quantized())


def test_own_outputs_and_routing_against_loops() -> None:
    _, _, sample = block(2, tokens=9)
    dense = [matrix(HIDDEN, HIDDEN, e) for e in range(EXPERTS)]
    ids = sample.ids.clone()
    ids[3, 1] = EXPERTS
    flat = own_outputs(replace(sample, ids=ids), lambda e, x: x @ dense[e], EXPERTS)
    at = 0
    for token in range(9):
        for slot in range(TOP_K):
            expert = int(ids[token, slot])
            wanted = sample.hidden[token] @ dense[expert] if expert < EXPERTS else torch.zeros(HIDDEN)
            torch.testing.assert_close(flat.target[at], wanted)
            assert float(flat.weights[at]) == 1 and int(flat.ids[at]) == expert
            at += 1
    pairs = {(e, int(r), int(s)) for e, rows, slots in routed(ids, EXPERTS) for r, s in zip(rows, slots, strict=True)}
    assert pairs == {(int(ids[r, s]), r, s) for r in range(9) for s in range(TOP_K) if int(ids[r, s]) < EXPERTS}


def test_the_start_by_gptq_beats_nearest_and_few_tokens_lean_on_the_layer() -> None:
    _, _, sample = block(2, tokens=512)
    up, down = ([matrix(r, c, k + e) / 4 for e in range(EXPERTS)] for r, c, k in ((32, 16, 10), (16, 16, 20)))

    def intermediate(_: int) -> Any:
        return lambda gate_up, x: F.silu((x @ gate_up.t()).chunk(2, -1)[0]) * (x @ gate_up.t()).chunk(2, -1)[1]

    schemes = scheme(3), scheme(3)
    codes: Any = [[], []]
    for expert, rows, slots in routed(sample.ids, EXPERTS):
        gates = sample.weights[rows, slots][:, None]
        made = gptq_expert(
            up[expert], down[expert], sample.hidden[rows], gates, intermediate(expert), schemes, torch.bfloat16
        )
        codes[0].append(made[0])
        codes[1].append(made[1])
    nearest = [[round_to_nearest(w, scheme(3), grid="mse") for w in side] for side in (up, down)]
    assert relative_error(sample, codes) < 0.8 * relative_error(sample, nearest)
    prior = pooled_moments(sample, up, intermediate, (HIDDEN, WIDTH))
    weighed = torch.cat([sample.hidden[r] * sample.weights[r, s][:, None] for _, r, s in routed(sample.ids, EXPERTS)])
    torch.testing.assert_close(prior.gate_up, weighed.t() @ weighed, rtol=1e-4, atol=1e-4)
    assert prior.tokens == 512 * TOP_K
    nobody = torch.zeros(0, HIDDEN), torch.zeros(0, 1)
    alone, pooled = (
        gptq_expert(up[0], down[0], *nobody, intermediate(0), schemes, torch.bfloat16, known, 64.0)
        for known in (None, prior)
    )
    moment = prior.gate_up
    losses = [float(torch.trace(d @ moment @ d.t())) for d in (dequantize(q[0]) - up[0] for q in (alone, pooled))]
    assert losses[1] < losses[0]
