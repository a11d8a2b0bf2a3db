"""Choosing rows for their routing: greedy cover against its definition, brute force, and what it promises."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moecompress.numerics.ebss import sigma
from moecompress.numerics.selection import cover, fill_evenly, rule


def pools(rows: int = 7, experts: int = 4) -> st.SearchStrategy[Tensor]:
    row = st.lists(st.integers(0, 9), min_size=experts, max_size=experts)
    return st.lists(row, min_size=1, max_size=rows).map(torch.tensor)


def test_the_rule_is_the_papers() -> None:
    assert rule(2.0, 8, 4096, 64) == 1024  # OLMoE in EAQuant
    assert rule(2.0, 4, 512, 60) == 69  # 68.27, never fewer


@settings(max_examples=150, deadline=None)
@given(pools(), st.integers(1, 30))
def test_every_expert_gets_what_the_pool_allows(counts: Tensor, wanted: int) -> None:
    need = counts.sum(0).clamp(max=wanted)
    chosen = cover(counts, need)
    assert len(set(chosen)) == len(chosen)
    assert bool((counts[chosen].sum(0) >= need).all())
    for skipped in chosen[-1:]:  # the last row was needed
        assert bool((counts[[row for row in chosen if row != skipped]].sum(0) < need).any())
    for stop in range(len(chosen)):  # each choice is the greedy one, ties to the lower number
        left = (need - counts[chosen[:stop]].sum(0)).clamp(min=0)
        gains = {
            row: sum(min(int(c), int(o)) / max(1, int(n)) for c, o, n in zip(counts[row], left, need, strict=True))
            for row in range(len(counts))
            if row not in chosen[:stop]
        }
        assert gains[chosen[stop]] == pytest.approx(max(gains.values()))
    assert cover(counts, need, limit=1) == chosen[:1]


def test_greedy_is_near_the_smallest_cover() -> None:
    """Of all sets of rows that satisfy the rule, greedy's is at most (1 + ln of the needs) times the smallest."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        counts = torch.randint(0, 4, (9, 5), generator=generator)
        need = counts.sum(0).clamp(max=4)
        smallest = next(
            size
            for size in range(10)
            if any(bool((counts[list(rows)].sum(0) >= need).all()) for rows in itertools.combinations(range(9), size))
        )
        assert smallest <= len(cover(counts, need)) <= smallest + 1


def test_even_rows_lower_sigma_most() -> None:
    generator = torch.Generator().manual_seed(1)
    counts = torch.randint(0, 20, (12, 2, 4), generator=generator)
    made = fill_evenly(counts, [3], 5, length=10)
    assert made[0] == 3 and len(set(made)) == 5
    for stop in range(1, 5):
        free = [row for row in range(12) if row not in made[:stop]]
        after = {row: float(sigma(counts[[*made[:stop], row]].sum(0), 10 * (stop + 1))) for row in free}
        assert after[made[stop]] == min(after.values())
    drawn = counts[:5].sum(0)
    assert float(sigma(counts[made].sum(0), 50)) < float(sigma(drawn, 50))
    assert len(fill_evenly(counts, [], 99, length=10)) == 12
