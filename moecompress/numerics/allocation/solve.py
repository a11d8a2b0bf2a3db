"""Our solver: Lagrange multiplier, greedy fill, and an exact core where one is small enough.

The knapsack's relaxation has at most one fractional unit, so the multiplier finds nearly everything; the dual value
proves how near. Hundreds of thousands of items take about a second.
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from moecompress.numerics.allocation.exact import highs
from moecompress.numerics.allocation.problem import Problem, Solution

Choice = NDArray[np.int64]
_STEPS = 200  # halvings of the multiplier's interval at most: float64 is used up well before
_CORE = 400  # items (unit, choice) that are left to a branch and bound


def solve(problem: Problem, *, tolerance: float = 1e-9, core: int = _CORE) -> Solution:
    """A choice within the budget, with a proven gap.

    tolerance: a relative gap that needs no further work; otherwise, when at most `core` items can still be part of a
    better choice, those are solved exactly. The same problem always gets the same answer; among equal costs the
    smaller size, then the first choice. No single change of one unit that costs less fits the rest of the budget.
    """
    top = float(problem.cost.max())
    scaled = Problem(problem.cost / top if top > 0 else problem.cost, problem.size, problem.budget)
    order = np.argsort(scaled.size, axis=1, kind="stable")  # ties of the argmin below go to the smaller size
    cost, size = np.take_along_axis(scaled.cost, order, 1), np.take_along_axis(scaled.size, order, 1)
    sorted_problem = Problem(cost, size, problem.budget)
    price = _price(sorted_problem)
    bound = _dual(sorted_problem, price)
    choice = _filled(sorted_problem, (cost + price * size).argmin(1))
    found = sorted_problem.solution(choice, bound)
    if found.gap > tolerance:
        found = _with_core(sorted_problem, found, price, core)
    final = np.take_along_axis(order, found.choice[:, None], 1)[:, 0]
    return problem.solution(final, found.bound * top if top > 0 else 0.0)


def _chosen(problem: Problem, price: float) -> Choice:
    return (problem.cost + price * problem.size).argmin(1)


def _dual(problem: Problem, price: float) -> float:
    """Lower bound of every choice within the budget (weak duality; also right when rounding hurt `price`)."""
    return float((problem.cost + price * problem.size).min(1).sum()) - price * problem.budget


def _price(problem: Problem) -> float:
    """The least price per size at which the cheapest choices fit the budget."""

    def fits(price: float) -> bool:
        return int(problem.pick(problem.size, _chosen(problem, price)).sum()) <= problem.budget

    if fits(0.0):
        return 0.0
    low, high = 0.0, 1e-12
    while not fits(high):
        low, high = high, high * 16
    for _ in range(_STEPS):
        middle = (low + high) / 2 if low > high / 4 else max(high / 16, (low * high) ** 0.5)
        if middle in (low, high):
            break
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _filled(problem: Problem, choice: Choice) -> Choice:
    """Spend what is left: the change with the most saving per size first, until none fits."""
    choice = choice.copy()
    left = problem.budget - int(problem.pick(problem.size, choice).sum())

    def offers(unit: int) -> list[tuple[float, int, int]]:
        extra = problem.size[unit] - problem.size[unit, choice[unit]]
        gain = problem.cost[unit, choice[unit]] - problem.cost[unit]
        useful = np.flatnonzero((gain > 0) & (extra <= left))
        return [(-float(gain[c]) / max(1, int(extra[c])), unit, int(c)) for c in useful]

    extra = problem.size - problem.pick(problem.size, choice)[:, None]
    gain = problem.pick(problem.cost, choice)[:, None] - problem.cost
    hopeful = np.flatnonzero(((gain > 0) & (extra <= left)).any(1))
    heap = [offer for unit in hopeful for offer in offers(int(unit))]
    heapq.heapify(heap)
    while heap:
        _, unit, target = heapq.heappop(heap)
        more = int(problem.size[unit, target] - problem.size[unit, choice[unit]])
        if more > left or problem.cost[unit, target] >= problem.cost[unit, choice[unit]]:
            continue  # an offer from before the unit changed, or before the rest was spent
        choice[unit] = target
        left -= more
        for offer in offers(unit):
            heapq.heappush(heap, offer)
    return choice


def _with_core(problem: Problem, found: Solution, price: float, most: int) -> Solution:
    """Solve exactly what the bound leaves open: units of which more than one choice can be in a better solution."""
    reduced = problem.cost + price * problem.size
    base = reduced.argmin(1)
    excess = reduced - reduced.min(1, keepdims=True)
    slack = found.cost - found.bound
    open_choices = excess <= slack * (1 + 1e-6) + 1e-15
    units = np.flatnonzero(open_choices.sum(1) > 1)
    if units.size == 0 or int(open_choices[units].sum()) > most:
        return found
    fixed = np.ones(len(base), dtype=bool)
    fixed[units] = False
    rest = problem.budget - int(problem.pick(problem.size, base)[fixed].sum())
    costs = np.where(open_choices[units], problem.cost[units], problem.cost.max() * (1 + len(base)))
    part = highs(Problem(costs, problem.size[units], rest))
    choice = base.copy()
    choice[units] = part.choice
    better = problem.solution(_filled(problem, choice), found.bound)
    if part.gap > 1e-12:
        return better if better.cost < found.cost else found
    best = better if better.cost <= found.cost else found
    return problem.solution(best.choice, best.cost)  # nothing outside the core can be cheaper
