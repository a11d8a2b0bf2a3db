"""Gates: which slots stay, against loops over tokens; relaxations against their limits; importance by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moecompress.gate import Gate, Relaxation
from moecompress.numerics.gating import (
    constant_sum,
    gated,
    mask_logits,
    mask_router,
    most_important,
    ratio_counts,
    received_attention,
    relaxed_mask,
    rest_ratios,
    shift_to_share,
    slot_order,
    weighing_router,
)

E, K, H, T = 8, 4, 6, 50
KEEP_ALL = Gate("count", True, count=K)


def routing(seed: int = 0, ties: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [T, H], ids [T, K] in no order, weights [T, K] that sum to 2.5."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(T)])
    weights = torch.rand(T, K, generator=generator)
    weights = (weights * 2).round() / 2 + 0.5 if ties else weights
    return torch.randn(T, H, generator=generator), ids, 2.5 * weights / weights.sum(-1, keepdim=True)


def router(seed: int = 1, spread: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = mask_router(H, K, 16, 0.97, generator)
    return {**made, "w_out": spread * torch.randn(K, 16, generator=generator), "start": torch.zeros(K)}


def slow_keep(hidden: Tensor, ids: Tensor, weights: Tensor, gate: Gate) -> list[set[int]]:
    """The experts that stay, token by token in plain Python."""
    kept = []
    for x, row, values in zip(hidden.double(), ids.tolist(), weights.double().tolist(), strict=True):
        ranked = sorted(zip(values, row, strict=True), key=lambda pair: (-pair[0], pair[1]))
        sizes = [value for value, _ in ranked]
        if gate.kind == "count":
            n = gate.count
        elif gate.kind == "ratio":
            n = next((r for r in range(1, K) if sum(sizes[r:]) < gate.threshold * sum(sizes[:r])), K)
        else:
            inside = torch.cat([x / math.sqrt(float((x * x).mean()) + 1e-6), torch.tensor(sizes)])
            middle = gate.tensors["w_in"].double() @ inside
            scores = gate.tensors["w_out"].double() @ (middle * middle.sigmoid()) + gate.tensors["start"].double()
            n = 1 + int(scores.argmax())
        kept.append({expert for _, expert in ranked[:n]})
    return kept


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("kind", ["count", "ratio", "mask_router"])
def test_gates_keep_what_a_loop_over_tokens_keeps(kind: str, ties: bool, renormalise: bool) -> None:
    hidden, ids, weights = routing(ties=ties)
    gate = {
        "count": Gate("count", renormalise, count=2),
        "ratio": Gate("ratio", renormalise, threshold=0.5),
        "mask_router": Gate("mask_router", renormalise, router()),
    }[kind]
    new, left, kept = gated(hidden, ids, weights, gate, E)
    wanted = slow_keep(hidden, ids, weights, gate)
    assert len({len(found) for found in wanted}) > (kind != "count")  # not always the same number
    for t, found in enumerate(wanted):
        assert {e for e in new[t].tolist() if e != E} == found and len(found) >= 1
        stay = torch.tensor([e in found for e in ids[t].tolist()])
        assert torch.equal(new[t][stay], ids[t][stay]) and bool((left[t][~stay] == 0).all())
        assert kept[t].tolist() == stay.float().tolist()
        total = 2.5 if renormalise else float(weights[t][stay].sum())
        assert float(left[t].sum()) == pytest.approx(total, rel=1e-5)
        ratio = left[t][stay] / weights[t][stay]
        assert float(ratio.max() - ratio.min()) < 1e-5  # their proportions stay


@pytest.mark.parametrize(
    "gate",
    [KEEP_ALL, Gate("ratio", True), Gate("mask_router", True, router(spread=0.0))],
)
def test_a_gate_that_keeps_all_changes_nothing_at_all(gate: Gate) -> None:
    hidden, ids, weights = routing()
    if gate.kind == "mask_router":
        gate.tensors["start"][-1] = 1.0
    new, left, _ = gated(hidden, ids, weights, gate, E)
    assert torch.equal(new, ids) and torch.equal(left, weights)


def test_an_endless_threshold_leaves_the_strongest_with_the_whole_weight() -> None:
    hidden, ids, weights = routing()
    gate = Gate("ratio", True, threshold=math.inf)
    new, left, _ = gated(hidden, ids, weights, gate, E)
    assert ((new != E).sum(-1) == 1).all()
    assert torch.equal(left.max(-1).indices, weights.max(-1).indices)
    torch.testing.assert_close(left.max(-1).values, torch.full((T,), 2.5))


def test_the_order_of_slots_does_not_matter() -> None:
    hidden, ids, weights = routing(ties=True)
    mixed = torch.stack([torch.randperm(K, generator=torch.Generator().manual_seed(t)) for t in range(T)])
    gate = Gate("mask_router", True, router())
    first = gated(hidden, ids, weights, gate, E)
    second = gated(hidden, ids.gather(1, mixed), weights.gather(1, mixed), gate, E)
    assert torch.equal(first[0].gather(1, mixed), second[0])
    torch.testing.assert_close(first[1].gather(1, mixed), second[1])


def test_slots_are_ranked_by_weight_and_then_by_expert() -> None:
    order = slot_order(torch.tensor([[5, 3, 1, 0]]), torch.tensor([[0.2, 0.4, 0.2, 0.2]]))
    assert order.tolist() == [[1, 3, 2, 0]]


def test_what_leaves_is_weighed_against_what_stays() -> None:
    ranked = torch.tensor([[4.0, 2.0, 1.0, 1.0]])
    torch.testing.assert_close(rest_ratios(ranked), torch.tensor([[4 / 4, 2 / 6, 1 / 7]]).double())
    for threshold, kept in ((0.1, 4), (0.2, 3), (0.4, 2), (0.99, 2), (1.01, 1)):
        assert ratio_counts(ranked, threshold).tolist() == [kept]


def test_with_two_experts_the_ratio_is_the_published_one() -> None:
    """Dropped when w_1 / w_0 < mu; half of the tokens at the median."""
    ranked = torch.rand(1001, 2, generator=torch.Generator().manual_seed(0)).sort(-1, descending=True).values
    ratio = ranked[:, 1].double() / ranked[:, 0].double()
    assert torch.equal(rest_ratios(ranked)[:, 0], ratio)
    median = float(ratio.median())
    counts = ratio_counts(ranked, median)
    assert torch.equal(counts == 1, ratio < median) and int((counts == 1).sum()) == 500


@pytest.mark.parametrize("temperature", [4.0, 1.0, 0.1, 0.01])
def test_relaxed_masks_start_at_one_and_fall(temperature: float) -> None:
    logits = torch.randn(200, K, generator=torch.Generator().manual_seed(0))
    for straight in (False, True):
        mask = relaxed_mask(logits, Relaxation(temperature, straight, seed=3))
        assert bool((mask[:, 0] == 1).all()) and bool((mask.diff(dim=-1) <= 1e-6).all())
        assert bool((mask >= 0).all())
        assert not straight or set(mask.flatten().tolist()) == {0.0, 1.0}


def test_cold_and_without_noise_the_relaxation_is_the_rule() -> None:
    hidden, ids, weights = routing()
    tensors, order = router(), slot_order(ids, weights)
    logits = mask_logits(hidden, weights.gather(1, order), tensors)
    top = logits.topk(2).values
    clear = (top[:, 0] - top[:, 1]) > 1e-3 * math.log(1e6)
    assert int(clear.sum()) > T // 2
    soft = gated(hidden, ids, weights, Gate("mask_router", True, tensors, relaxation=Relaxation(1e-3)), E)
    hard = gated(hidden, ids, weights, Gate("mask_router", True, tensors), E)
    torch.testing.assert_close(soft[1][clear], hard[1][clear], atol=1e-4, rtol=0)
    assert torch.equal(soft[0], ids)  # nothing leaves while it is trained


def test_noise_draws_candidates_as_often_as_their_probability() -> None:
    logits = torch.tensor([0.3, -0.5, 1.0, 0.0])
    mask = relaxed_mask(logits.expand(20_000, K), Relaxation(1.0, True, seed=0))
    counts = torch.bincount(mask.sum(-1).long() - 1, minlength=K) / 20_000
    torch.testing.assert_close(counts, logits.softmax(-1), atol=0.015, rtol=0)
    again = relaxed_mask(logits.expand(20_000, K), Relaxation(1.0, True, seed=0))
    assert torch.equal(mask, again)


def test_gradients_reach_every_matrix_of_the_router_through_the_choice() -> None:
    hidden, ids, weights = routing()
    tensors = {name: value.requires_grad_(True) for name, value in router().items()}
    gate = Gate("mask_router", True, tensors, relaxation=Relaxation(1.0, True, seed=0))
    _, left, _ = gated(hidden, ids, weights, gate, E)
    (left * ids).sum().backward()
    assert all(value.grad is not None and bool((value.grad != 0).any()) for value in tensors.values())


def test_a_new_router_keeps_all_with_the_probability_asked_for() -> None:
    hidden, ids, weights = routing()
    made = mask_router(H, K, 16, 0.97, torch.Generator().manual_seed(0))
    p = mask_logits(hidden, weights, made).softmax(-1)
    torch.testing.assert_close(p[:, -1], torch.full((T,), 0.97))
    torch.testing.assert_close(p[:, 0], torch.full((T,), 0.01))


@pytest.mark.parametrize("share", [0.3, 0.6, 0.8, 0.95])
def test_a_shift_meets_the_share_and_drops_where_least_is_lost(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(300, K, generator=generator) + torch.tensor([0.0, 1.0, 2.0, 6.0]) for _ in range(3)]
    assert all(bool((z.argmax(-1) == K - 1).float().mean() > 0.9) for z in logits)  # unshifted nearly all is kept
    shift = shift_to_share(logits, share)
    chosen = [(z - shift * torch.arange(K)).argmax(-1) for z in logits]
    kept = sum(float((1 + n).double().mean()) / K for n in chosen) / len(logits)
    assert share - 1 / 300 <= kept <= share + 1e-9
    for z, n in zip(logits, chosen, strict=True):  # per token no other number is better at this price
        best = z.gather(1, n[:, None]) - shift * n[:, None]
        assert bool((z - shift * torch.arange(K) <= best + 1e-6).all())


def test_a_router_that_begins_with_weights_drops_the_light_ones() -> None:
    hidden, _, weights = routing()
    ranked = weights.sort(-1, descending=True).values
    made = weighing_router(H, K, 16, 2.5, torch.Generator().manual_seed(0))
    z = mask_logits(hidden, ranked, made)
    assert torch.equal(z, mask_logits(-3 * hidden, ranked, made))  # the token does not matter yet
    silu = torch.nn.functional.silu(20 * ranked / 2.5)
    wanted = torch.stack([-5 * silu[:, n + 1 :].sum(-1) for n in range(K)], -1)
    torch.testing.assert_close(z, wanted)
    shift = shift_to_share([z], 0.6)
    price = 5 * silu[:, 1:]
    clear = ((price - shift).abs() > 1e-3).all(-1)  # one token is where the share is met
    kept = (z - shift * torch.arange(K)).argmax(-1) + 1
    assert torch.equal(kept[clear], 1 + (price > shift).sum(-1)[clear]) and int(clear.sum()) >= T - 2
    assert len(kept.unique()) > 2  # a slot stays when it weighs more than the price


def test_the_ends_of_a_shift() -> None:
    logits = [torch.randn(50, K, generator=torch.Generator().manual_seed(0))]
    for share, n in ((1.0, K - 1), (1 / K, 0), (0.1, 0)):
        shift = shift_to_share(logits, share)
        assert bool(((logits[0] - shift * torch.arange(K)).argmax(-1) == n).all())


def test_protected_tokens_keep_all() -> None:
    hidden, ids, weights = routing()
    protected = torch.arange(T) % 7 == 0
    new, left, _ = gated(hidden, ids, weights, Gate("count", True, count=1), E, protected)
    assert torch.equal(new[protected], ids[protected]) and torch.equal(left[protected], weights[protected])
    assert ((new[~protected] != E).sum(-1) == 1).all()


def test_received_attention_sums_over_queries() -> None:
    # rows are queries: every row sums to 1, so a sum over keys would say 1 for every token
    one = torch.tensor([[1.0, 0.0, 0.0], [0.4, 0.6, 0.0], [0.2, 0.3, 0.5]])
    two = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.1, 0.9]])
    found = received_attention(torch.stack([one, two])[None])
    first, second, third = (1 + 0.4 + 0.2 + 1) / 2 / 3, (0.6 + 0.3 + 1 + 0.1) / 2 / 2, (0.5 + 0.9) / 2 / 1
    torch.testing.assert_close(found, torch.tensor([[first, second, third]]))
    cached = torch.cat([torch.zeros(2, 3, 4), torch.stack([one, two])], -1)[None]  # keys of earlier tokens
    torch.testing.assert_close(received_attention(cached), found)


def test_the_important_tokens_of_every_sequence_are_protected() -> None:
    hidden = torch.ones(2, 10, 3)
    hidden[0, 4], hidden[1, 7] = 5.0, -9.0
    attention = torch.full((2, 10), 0.1)
    chosen = most_important(hidden, attention, 0.02)
    assert chosen.nonzero().tolist() == [[0, 4], [1, 7]]  # one each: 2 % of 10 is rounded up
    attention[0, 2] = 1.0
    assert most_important(hidden, attention, 0.02)[0].nonzero().tolist() == [[2]]
    assert int(most_important(hidden, attention, 0.3).sum()) == 6
    assert not most_important(hidden, attention, 0.0).any()
    assert not most_important(hidden[:, :1], attention[:, :1], 0.5).any()  # a single token is being decoded


def test_normalised_weights_are_told_by_their_sums() -> None:
    _, _, weights = routing()
    assert constant_sum(weights)
    assert not constant_sum(weights * torch.linspace(1, 1.1, T)[:, None])
    assert not constant_sum(torch.empty(0, K))
