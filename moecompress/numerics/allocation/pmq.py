"""PMQ's integer program (2410.06270, MC-MoE), solved exactly per layer by dynamic programming."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moecompress.numerics.allocation.problem import Costs, Infeasible

EXPONENTS = {"released": (1.0, 1.5, 1.0), "paper": (1.0, 1.0, 2.0)}  # of frequency, routing weight, error


def pmq_cost(tokens: ArrayLike, weights: ArrayLike, errors: ArrayLike, rule: str = "released") -> Costs:
    """Costs [E, C] = phi^a w^b eps^c of one layer.

    tokens [E]: how often each expert is chosen; weights [E]: its summed routing probability; both become shares of
    their sums (all zero counts as equal). errors [E, C]: norm of the block's output error when only this expert is
    rounded to width c. rule: `released` has exponents (1, 1.5, 1), which reproduces the authors' published
    allocations; `paper` has (1, 1, 2) as the text says.
    """
    if rule not in EXPONENTS:
        raise ValueError(f"rule: {rule!r}; allowed: {', '.join(EXPONENTS)}")
    a, b, c = EXPONENTS[rule]
    usage = _share(tokens) ** a * _share(weights) ** b
    return usage[:, None] * np.asarray(errors, dtype=np.float64) ** c


def pmq(cost: ArrayLike, bits: Sequence[int], budget: int) -> list[int]:
    """Bits per expert of one layer with the least sum of costs.

    cost: [E, C], finite, one column per entry of `bits`; budget: total bits of the layer, the most that may be used
    (E times the mean). At least one expert gets each of the two highest widths, as in the released solver; with a
    single width there is nothing to choose. Among equal sums the answer with fewer bits, then the one that gives less
    to later experts.
    Raises ValueError for a misfit of shapes, and for fewer experts than the two widths need; Infeasible (with the
    least possible budget) for a budget too small.
    """
    costs = np.asarray(cost, dtype=np.float64)
    widths = [int(width) for width in bits]
    if costs.ndim != 2 or costs.shape[1] != len(widths) or not len(costs) or len(set(widths)) != len(widths):
        raise ValueError(
            f"cost: shape {costs.shape} for bits {widths}; allowed: [experts, {len(widths)}], bits distinct"
        )
    if not np.isfinite(costs).all():
        raise ValueError("cost: not finite; allowed: finite numbers")
    must = _must(widths)
    if len(costs) < len(must):
        raise ValueError(f"cost: {len(costs)} expert; allowed: at least {len(must)}, one for each of {must} bits")
    least = pmq_least(widths, len(costs))
    if budget < least:
        raise Infeasible(int(budget), least)
    budget = min(int(budget), max(widths) * len(costs))
    return _backtrack(*_table(costs, widths, must, budget), widths, must)


def pmq_least(bits: Sequence[int], experts: int) -> int:
    """The least total bits of a layer: one expert at each of the two highest widths, the others at the lowest."""
    must = _must(bits)
    return sum(must) + (experts - len(must)) * min(bits)


def _must(bits: Sequence[int]) -> list[int]:
    return sorted(bits)[-2:] if len(bits) > 1 else []


def _share(values: ArrayLike) -> Costs:
    array = np.asarray(values, dtype=np.float64)
    total = array.sum()
    return array / total if total > 0 else np.full_like(array, 1 / max(1, array.size))


def _flag(width: int, must: Sequence[int]) -> int:
    return 1 << must.index(width) if width in must else 0


def _table(
    costs: Costs, widths: Sequence[int], must: Sequence[int], budget: int
) -> tuple[Costs, NDArray[np.int16], NDArray[np.int8]]:
    """Best sums of all experts [states, budget + 1], and for every expert the choice and the state before it.

    A state is the set of obligatory widths that some expert already has.
    """
    states = 1 << len(must)
    best = np.full((states, budget + 1), np.inf)
    best[0, 0] = 0.0
    taken = np.full((len(costs), states, budget + 1), -1, dtype=np.int16)
    before = np.zeros((len(costs), states, budget + 1), dtype=np.int8)
    order = sorted(range(len(widths)), key=lambda c: widths[c])
    for expert, row in enumerate(costs):
        after = np.full_like(best, np.inf)
        for c in order:
            width = widths[c]
            for state in range(states):
                target = state | _flag(width, must)
                sums = best[state, : budget + 1 - width] + row[c]
                better = sums < after[target, width:]
                after[target, width:][better] = sums[better]
                taken[expert, target, width:][better] = c
                before[expert, target, width:][better] = state
        best = after
    return best, taken, before


def _backtrack(
    best: Costs,
    taken: NDArray[np.int16],
    before: NDArray[np.int8],
    widths: Sequence[int],
    must: Sequence[int],
) -> list[int]:
    state = (1 << len(must)) - 1
    used = int(best[state].argmin())
    chosen: list[int] = []
    for expert in reversed(range(len(taken))):
        c = int(taken[expert, state, used])
        chosen.append(widths[c])
        state, used = int(before[expert, state, used]), used - widths[c]
    return chosen[::-1]
