"""The multiple-choice knapsack: every unit takes exactly one of its choices, sizes stay within one budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Costs = NDArray[np.float64]
Sizes = NDArray[np.int64]


class Infeasible(ValueError):
    """The budget is below the smallest possible size, which `least` holds."""

    def __init__(self, budget: int, least: int) -> None:
        super().__init__(f"budget: {budget}; the least that is possible is {least}")
        self.budget, self.least = budget, least


@dataclass(frozen=True)
class Problem:
    """cost: float64 [U, C], finite and >= 0. size: int64 [U, C], >= 0, in bits or bytes. budget: most that may be used.

    Sizes are integers, so that what is used is exact.
    """

    cost: Costs
    size: Sizes
    budget: int

    @classmethod
    def of(cls, cost: ArrayLike, size: ArrayLike, budget: int) -> Problem:
        """Checked arrays. size may be [C], the same for every unit.

        Raises ValueError for shapes, costs or sizes that are no problem at all, Infeasible for a budget too small.
        """
        costs = np.asarray(cost, dtype=np.float64)
        raw = np.asarray(size)
        if costs.ndim != 2 or min(costs.shape) < 1:
            raise ValueError(f"cost: shape {costs.shape}; allowed: [units, choices], at least one of each")
        if not np.issubdtype(raw.dtype, np.integer):
            raise ValueError(f"size: {raw.dtype}; allowed: whole numbers")
        sizes = np.broadcast_to(raw.astype(np.int64), costs.shape)
        if not np.isfinite(costs).all() or (costs < 0).any():
            raise ValueError("cost: negative or not finite; allowed: finite numbers of at least 0")
        if (sizes < 0).any():
            raise ValueError("size: negative; allowed: whole numbers of at least 0")
        least = int(sizes.min(1).sum())
        if budget < least:
            raise Infeasible(int(budget), least)
        return cls(costs, np.ascontiguousarray(sizes), int(budget))

    def pick(self, values: NDArray[Any], choice: NDArray[np.int64]) -> NDArray[Any]:
        """values [U, C] at choice [U]."""
        picked: NDArray[Any] = np.take_along_axis(values, choice[:, None], 1)[:, 0]
        return picked

    def solution(self, choice: NDArray[np.int64], bound: float) -> Solution:
        """`choice` with its cost and size, and the gap to a proven lower bound."""
        cost = float(self.pick(self.cost, choice).sum())
        gap = max(0.0, cost - bound) / cost if cost > 0 else 0.0
        return Solution(choice, cost, int(self.pick(self.size, choice).sum()), min(bound, cost), gap)


@dataclass(frozen=True)
class Solution:
    """choice: int64 [U]. cost, size: of it. bound: nothing within the budget costs less. gap: (cost - bound) / cost."""

    choice: NDArray[np.int64]
    cost: float
    size: int
    bound: float
    gap: float
