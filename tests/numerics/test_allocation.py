"""Allocation of bits: equal to brute force, never over budget, maximal, deterministic; a gap that is really proven."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moecompress.numerics.allocation import (
    Infeasible,
    Problem,
    Solution,
    highs,
    pmq,
    pmq_cost,
    pulp_model,
    solve,
    solve_pulp,
)

seeds = st.integers(0, 2**32 - 1)


def random_problem(seed: int, units: int = 6, choices: int = 4) -> Problem:
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(1, units + 1)), int(rng.integers(1, choices + 1)))
    cost, size = rng.lognormal(0, 2, shape), rng.integers(1, 40, shape)
    if rng.random() < 0.3:  # ties
        cost, size = cost.round(), size // 8
    budget = rng.integers(size.min(1).sum(), size.max(1).sum() + 3)
    return Problem.of(cost, size, int(budget))


def answers(problem: Problem) -> list[tuple[float, int, tuple[int, ...]]]:
    """(cost, size, choice) of everything within the budget."""
    units, choices = problem.cost.shape
    found = []
    for choice in itertools.product(range(choices), repeat=units):
        size = sum(int(problem.size[u, c]) for u, c in enumerate(choice))
        if size <= problem.budget:
            found.append((sum(float(problem.cost[u, c]) for u, c in enumerate(choice)), size, choice))
    return found


def large(units: int, seed: int = 0, *, mixed: bool = False) -> Problem:
    """Log-normal sensitivities, errors falling about 4 times per bit; matrices of one or of three sizes."""
    rng = np.random.default_rng(seed)
    widths = np.array([1, 2, 3, 4])
    cost = rng.lognormal(0, 2, (units, 1)) * 2.0 ** (-2 * widths) * rng.lognormal(0, 0.2, (units, 4))
    weights = rng.choice([7168, 4096, 1536], (units, 1)) if mixed else np.ones((units, 1), dtype=np.int64)
    size = weights * (4 * widths + 1)
    return Problem.of(cost, size, int(size.sum() * 0.22))


@pytest.mark.parametrize("solver", [solve, highs])
@given(seed=seeds)
@settings(max_examples=60, deadline=None)
def test_equal_to_brute_force(solver: Callable[[Problem], Solution], seed: int) -> None:
    problem = random_problem(seed)
    found, best = solver(problem), min(answers(problem))[0]
    assert found.cost == pytest.approx(best, rel=1e-9, abs=1e-12)
    assert found.size <= problem.budget and found.bound <= best + 1e-9 * (1 + best) and found.gap <= 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_the_pulp_model_is_the_same_problem(seed: int, tmp_path: Path) -> None:
    import pulp

    problem = random_problem(seed)
    best = min(answers(problem))[0]
    assert solve_pulp(problem).cost == pytest.approx(best, rel=1e-9)
    model = pulp_model(problem)
    model.writeMPS(str(tmp_path / "a.mps"))
    model.writeLP(str(tmp_path / "a.lp"))
    _, again = pulp.LpProblem.fromMPS(str(tmp_path / "a.mps"))
    again.solve(pulp.PULP_CBC_CMD(msg=False, gapRel=0, threads=1))
    top = float(problem.cost.max())
    assert pulp.value(again.objective) * top / 1e3 == pytest.approx(best, rel=1e-6)
    assert "budget" in (tmp_path / "a.lp").read_text()


@given(seed=seeds)
@settings(max_examples=40, deadline=None)
def test_more_budget_never_costs_more_and_what_is_left_is_too_little(seed: int) -> None:
    problem = random_problem(seed, units=30)
    found = solve(problem)
    for unit, choice in enumerate(found.choice):
        for other in range(problem.cost.shape[1]):
            extra = int(problem.size[unit, other] - problem.size[unit, choice])
            cheaper = problem.cost[unit, other] < problem.cost[unit, choice]
            assert not (cheaper and found.size + extra <= problem.budget), "one more change would have fit"
    more = solve(Problem.of(problem.cost, problem.size, problem.budget + 7))
    assert more.cost <= found.cost * (1 + 1e-9) + found.cost * more.gap


@given(seed=seeds)
@settings(max_examples=30, deadline=None)
def test_order_and_scale_do_not_matter(seed: int) -> None:
    problem = random_problem(seed, units=12)
    found = solve(problem)
    turn = np.random.default_rng(seed).permutation(len(problem.cost))
    turned = solve(Problem.of(problem.cost[turn], problem.size[turn], problem.budget))
    assert turned.cost == pytest.approx(found.cost, rel=1e-9, abs=1e-12)
    for factor in (1e-6, 1e6):
        scaled = solve(Problem.of(problem.cost * factor, problem.size, problem.budget))
        assert scaled.cost == pytest.approx(found.cost * factor, rel=1e-9, abs=1e-12)
    assert (solve(problem).choice == found.choice).all()


def test_the_ends_of_the_budget() -> None:
    cost = np.array([[8.0, 4.0, 2.0], [9.0, 3.0, 1.0]])
    assert solve(Problem.of(cost, [1, 2, 3], 2)).choice.tolist() == [0, 0]
    assert solve(Problem.of(cost, [1, 2, 3], 100)).choice.tolist() == [2, 2]
    with pytest.raises(Infeasible, match="budget: 1; the least that is possible is 2") as caught:
        Problem.of(cost, [1, 2, 3], 1)
    assert caught.value.least == 2


def test_a_choice_that_costs_no_less_is_never_bought() -> None:
    assert solve(Problem.of([[1.0, 1.0, 1.0]] * 3, [3, 1, 2], 9)).choice.tolist() == [1, 1, 1]
    assert solve(Problem.of([[0.0, 0.0]] * 2, [1, 2], 4)).choice.tolist() == [0, 0]


@pytest.mark.parametrize("mixed", [False, True])
def test_a_large_instance_has_a_small_gap_that_highs_confirms(mixed: bool) -> None:
    found = solve(large(2000, mixed=mixed), core=0)
    reference = highs(large(2000, mixed=mixed), gap=1e-6)
    assert found.gap < 1e-3 and found.size <= large(2000, mixed=mixed).budget
    assert found.bound <= reference.cost * (1 + 1e-9)
    assert found.cost <= reference.cost * (1 + 1e-3)


def test_a_hundred_thousand_items_have_a_proven_gap() -> None:
    problem = large(58 * 256 * 3, mixed=True)
    found = solve(problem)
    assert problem.cost.size > 100_000
    assert found.gap < 1e-4 and found.size <= problem.budget


@pytest.mark.parametrize(
    ("cost", "size", "text"),
    [
        ([1.0], [1], "shape"),
        ([[1.0, np.nan]], [1, 2], "not finite"),
        ([[1.0, -1.0]], [1, 2], "negative"),
        ([[1.0, 2.0]], [1.0, 2.0], "whole numbers"),
        ([[1.0, 2.0]], [-1, 2], "negative"),
    ],
)
def test_no_problem_at_all(cost: Any, size: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Problem.of(cost, size, 10)


def pmq_by_force(cost: Any, bits: tuple[int, ...], budget: int) -> float:
    must = sorted(bits)[-2:] if len(bits) > 1 else []
    best = np.inf
    for choice in itertools.product(range(len(bits)), repeat=len(cost)):
        widths = [bits[c] for c in choice]
        if sum(widths) <= budget and all(width in widths for width in must):
            best = min(best, sum(cost[e][c] for e, c in enumerate(choice)))
    return float(best)


@given(seed=seeds, bits=st.sampled_from([(1, 2, 3), (3, 1, 2), (2, 4), (1, 2, 4, 8), (4,)]))
@settings(max_examples=60, deadline=None)
def test_pmq_is_the_published_program(seed: int, bits: tuple[int, ...]) -> None:
    rng = np.random.default_rng(seed)
    experts = int(rng.integers(2, 7))
    cost = rng.lognormal(0, 2, (experts, len(bits)))
    must = sorted(bits)[-2:] if len(bits) > 1 else []
    least = sum(must) + (experts - len(must)) * min(bits)
    budget = int(rng.integers(least, experts * max(bits) + 2))
    found = pmq(cost, bits, budget)
    paid = sum(cost[e, bits.index(width)] for e, width in enumerate(found))
    assert sum(found) <= budget and set(must) <= set(found)
    assert paid == pytest.approx(pmq_by_force(cost, bits, budget), rel=1e-12)


def test_pmq_spends_bits_where_the_cost_is() -> None:
    cost = np.array([1.0, 100.0, 1.0, 1.0])[:, None] * np.array([0.6, 0.5, 0.2])
    assert pmq(cost, [1, 2, 3], 8)[1] == 3


def test_pmq_names_the_least_budget_and_what_does_not_fit() -> None:
    with pytest.raises(Infeasible, match="budget: 10; the least that is possible is 11"):
        pmq(np.ones((8, 3)), [1, 2, 3], 10)
    with pytest.raises(ValueError, match=r"shape \(8, 2\) for bits \[1, 2, 3\]"):
        pmq(np.ones((8, 2)), [1, 2, 3], 16)
    with pytest.raises(ValueError, match="at least 2, one for each of"):
        pmq(np.ones((1, 3)), [1, 2, 3], 3)
    with pytest.raises(ValueError, match="not finite"):
        pmq(np.full((4, 3), np.nan), [1, 2, 3], 8)


def test_the_two_rules_of_pmq() -> None:
    tokens, weights, errors = [10, 30], [1.0, 3.0], np.array([[2.0, 1.0], [4.0, 3.0]])
    shares = np.array([0.25, 0.75])
    assert np.allclose(pmq_cost(tokens, weights, errors), (shares**2.5)[:, None] * errors)
    assert np.allclose(pmq_cost(tokens, weights, errors, "paper"), (shares**2)[:, None] * errors**2)
    assert np.allclose(pmq_cost([0, 0], [0.0, 0.0], errors, "paper"), 0.25 * errors**2)
    with pytest.raises(ValueError, match="allowed: released, paper"):
        pmq_cost(tokens, weights, errors, "other")
