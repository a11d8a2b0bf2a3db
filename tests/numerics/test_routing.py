"""Routers as numbers: the ridge against least squares in float64, distances against their definitions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moecompress.numerics.routing import (
    distinct,
    leading,
    merged_outputs,
    ridge,
    routing_divergence,
    routing_probabilities,
    set_agreement,
)

N, C, R = 60, 12, 5


def made(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs [N, C], targets [N, R] and a present router [R, C], float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, C, generator=generator, dtype=torch.float64)
    y = torch.randn(N, R, generator=generator, dtype=torch.float64)
    return x, y, torch.randn(R, C, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("strength", [0.0, 1e-3, 1e-2, 1.0])
def test_the_ridge_is_least_squares(strength: float) -> None:
    """Rows sqrt(lam) I with targets sqrt(lam) W beside the data make the ridge an ordinary least-squares problem."""
    x, y, w = made()
    root = (strength * x.square().sum(0).mean()).sqrt()
    inputs = torch.cat([x, root * torch.eye(C, dtype=x.dtype)])
    targets = torch.cat([y, root * w.t()])
    wanted = torch.linalg.lstsq(inputs, targets).solution.t()
    found = ridge(w, x.t() @ x, (y - x @ w.t()).t() @ x, strength)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_rows_are_solved_by_themselves() -> None:
    x, y, w = made()
    gram, residual = x.t() @ x, (y - x @ w.t()).t() @ x
    whole = ridge(w, gram, residual, 0.01)
    rows = [ridge(w[i : i + 1], gram, residual[i : i + 1], 0.01) for i in range(R)]
    torch.testing.assert_close(torch.cat(rows), whole, rtol=1e-12, atol=1e-14)


def test_nothing_missed_changes_nothing() -> None:
    x, _, w = made()
    singular = x[:3].t() @ x[:3]
    assert torch.equal(ridge(w, singular, torch.zeros(R, C), 0.0), w)
    assert torch.equal(ridge(w, torch.zeros(C, C), torch.zeros(R, C), 0.01), w)


def test_a_stronger_ridge_stays_closer() -> None:
    x, y, w = made()
    gram, residual = x.t() @ x, (y - x @ w.t()).t() @ x
    distances = [float((ridge(w, gram, residual, s) - w).norm()) for s in (0.0, 1e-2, 1e-1, 1.0, 10.0)]
    assert distances == sorted(distances, reverse=True)


def test_what_cannot_be_solved_is_told() -> None:
    x, y, w = made()
    few = x[:4]
    with pytest.raises(ValueError, match=f"fewer than {C} directions"):
        ridge(w, few.t() @ few, (y[:4] - few @ w.t()).t() @ few, 0.0)
    with pytest.raises(ValueError, match="not finite"):
        ridge(w, torch.full((C, C), torch.inf), torch.ones(R, C), 0.01)


def test_leading_outputs_by_loops() -> None:
    _, y, _ = made(3)
    chosen = torch.randint(0, R + 1, (N, 2), generator=torch.Generator().manual_seed(0))
    found = leading(y, chosen, 2)
    for token in range(N):
        order = sorted(range(R), key=lambda i: -float(y[token, i]))
        wanted = set(order[:2]) | {int(i) for i in chosen[token] if i < R}
        assert {i for i in range(R) if found[token, i]} == wanted
    assert bool(leading(y, chosen, R + 3).all())


RULES: dict[Any, Any] = {
    "softmax": lambda x: x.exp(),
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
    "sqrt_softplus": lambda x: (1 + x.exp()).log().sqrt(),
    "probabilities": lambda x: x,
}


@pytest.mark.parametrize("scoring", RULES)
def test_distributions_and_their_divergence(scoring: Any) -> None:
    _, y, _ = made()
    logits = y.abs() if scoring == "probabilities" else y
    p = RULES[scoring](logits)
    p = p / p.sum(1, keepdim=True)
    torch.testing.assert_close(routing_probabilities(logits, scoring), p)
    other = logits.roll(1, 0)
    q = p.roll(1, 0)
    wanted = float(F.kl_div(q.log(), p, reduction="batchmean"))
    assert routing_divergence(logits, other, scoring) == pytest.approx(wanted, rel=1e-9) and wanted > 0
    assert routing_divergence(logits, logits, scoring) == 0.0


CLUSTERS = ((0, 3), (1,), (2, 4, 5))  # 6 and what follows are gone


def test_a_merged_expert_gets_the_probability_of_all_its_members() -> None:
    y = torch.randn(50, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    made = merged_outputs(y, CLUSTERS).softmax(1)
    kept = y[:, [0, 3, 1, 2, 4, 5]].softmax(1)
    for place, columns in enumerate(((0, 1), (2,), (3, 4, 5))):
        torch.testing.assert_close(made[:, place], kept[:, list(columns)].sum(1), rtol=1e-12, atol=1e-12)
    alone = merged_outputs(y, ((4,), (0,)))
    assert torch.equal(alone, y[:, [4, 0]])


def test_pairs_of_equal_outputs_merge_into_that_output() -> None:
    y = torch.randn(50, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(merged_outputs(y.repeat(1, 2), ((0, 3), (1, 4), (2, 5))), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scoring", RULES)
def test_divergence_of_merged_experts_by_loops(scoring: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    y, z = (torch.randn(20, n, generator=generator, dtype=torch.float64) for n in (8, 3))
    if scoring == "probabilities":
        y, z = y.abs(), z.abs()
    total = 0.0
    for row, other in zip(y, z, strict=True):
        raw, made = RULES[scoring](row), RULES[scoring](other)
        shares = [sum(float(raw[i]) for i in cluster) for cluster in CLUSTERS]
        p, q = ([v / sum(values) for v in values] for values in (shares, made.tolist()))
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert routing_divergence(y, z, scoring, CLUSTERS) == pytest.approx(total / 20, rel=1e-9)
    if scoring == "softmax":
        assert abs(routing_divergence(y, merged_outputs(y, CLUSTERS), scoring, CLUSTERS)) < 1e-12
    apart = tuple((i,) for i in (5, 1, 3))
    assert routing_divergence(y, z, scoring, apart) == pytest.approx(routing_divergence(y[:, [5, 1, 3]], z, scoring))


def test_what_is_named_twice_counts_once() -> None:
    found = distinct(torch.tensor([[3, 1, 3, 1], [2, 0, -1, -1]]))
    assert [sorted(set(row) - {-1}) for row in found.tolist()] == [[1, 3], [0, 2]]
    assert [sum(v >= 0 for v in row) for row in found.tolist()] == [2, 2]


def test_agreement_of_sets() -> None:
    first, second = torch.tensor([[0, 1], [2, 3]]), torch.tensor([[1, 0], [3, 4]])
    assert set_agreement(first, second) == pytest.approx((1 + 1 / 3) / 2)
