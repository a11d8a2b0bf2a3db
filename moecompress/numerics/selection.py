"""Which rows of a pool make a calibration set in which every expert has enough tokens (EAQuant, 2506.13329)."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor

from moecompress.numerics.ebss import sigma


def rule(ratio: float, top_k: int, length: int, experts: int) -> int:
    """Tokens each expert should see: r k N / n with N tokens of one sequence, rounded up."""
    return ceil(ratio * top_k * length / experts)


def cover(counts: Tensor, need: Tensor, limit: int | None = None) -> list[int]:
    """Rows, in the order chosen, that together give every expert its need; at most `limit` of them.

    counts: int64 [P, M] tokens of each pool row at each expert; need: int64 [M]. Greedy: each time the row that fills
    the largest share of the open needs, sum_m min(count, open) / need; the lower row number among equals. Rows that
    fill nothing are never chosen, so needs above what the pool holds do not matter.
    """
    chosen: list[int] = []
    left = need.clone()
    weight = 1.0 / need.clamp(min=1).double()
    free = torch.ones(counts.shape[0], dtype=torch.bool)
    while bool((left > 0).any()) and (limit is None or len(chosen) < limit):
        gain = (torch.minimum(counts, left.clamp(min=0)).double() * weight).sum(-1)
        best = int(torch.where(free, gain, -1.0).argmax())
        if not bool(free[best]) or float(gain[best]) <= 0:
            break
        chosen.append(best)
        free[best] = False
        left -= counts[best]
    return chosen


def fill_evenly(counts: Tensor, chosen: Sequence[int], rows: int, length: int) -> list[int]:
    """`chosen` and more rows up to `rows`: each time the one after which sigma is smallest. counts: int64 [P, L, E]."""
    made = list(chosen)
    total = counts[made].sum(0)
    free = torch.ones(counts.shape[0], dtype=torch.bool)
    free[made] = False
    while len(made) < min(rows, counts.shape[0]):
        after = sigma(total + counts, length * (len(made) + 1))
        best = int(torch.where(free, after, torch.inf).argmin())
        made.append(best)
        free[best] = False
        total = total + counts[best]
    return made
