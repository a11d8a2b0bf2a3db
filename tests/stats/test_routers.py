"""Sums over what a router sees: loops, batches, merging, and the sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moecompress.numerics.routing import leading
from moecompress.stats.base import RouterObservation, State, Statistic, merge
from moecompress.stats.routers import RouterMoments, RouterSample
from moecompress.stats.routing import row_hash

N, C, R = 40, 6, 5
STATISTICS: list[Statistic] = [
    RouterMoments(C, (0, R)),
    RouterMoments(C, (0, R), top=2),
    RouterMoments(C, (1, 4), top=2),
    RouterSample(9, C, R),
]


def seen() -> RouterObservation:
    generator = torch.Generator().manual_seed(0)
    x, given, wanted = (torch.randn(N, size, generator=generator) for size in (C, R, R))
    chosen = torch.randint(0, R + 1, (N, 2), generator=generator)
    return RouterObservation(torch.randperm(500, generator=generator)[:N], x, given, wanted, chosen)


def part(index: Tensor) -> RouterObservation:
    return RouterObservation(*(value[index] for value in vars(seen()).values()))


def summed(statistic: Statistic, *parts: Tensor) -> State:
    state: State = statistic.init(None)  # type: ignore[arg-type]
    for index in parts:
        statistic.observe_router(state, part(index))
    return state


def close(first: State, second: State) -> None:
    assert list(first) == sorted(first) == list(second)
    for key, value in first.items():
        torch.testing.assert_close(value, second[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_batches_their_order_and_merging_do_not_matter(statistic: Statistic) -> None:
    every = torch.arange(N)
    whole = summed(statistic, every)
    close(summed(statistic, every[25:], every[:7], every[7:25]), whole)
    close(merge(statistic, summed(statistic, every[:13]), summed(statistic, every[13:])), whole)
    assert set(whole) == set(statistic.reduce)


@pytest.mark.parametrize(("top", "span"), [(None, (0, R)), (2, (0, R)), (2, (1, 4))])
def test_moments_by_loops(top: Any, span: Any) -> None:
    found, data = summed(RouterMoments(C, span, top), torch.arange(N)), seen()
    mask = torch.ones(N, R, dtype=torch.bool) if top is None else leading(data.wanted, data.chosen, top)
    for at, row in enumerate(range(*span)):
        gram, residual, tokens = torch.zeros(C, C), torch.zeros(C), 0
        for token in range(N):
            if mask[token, row]:
                x = data.inputs[token]
                gram += torch.outer(x, x)
                residual += (data.wanted[token, row] - data.given[token, row]) * x
                tokens += 1
        torch.testing.assert_close(found["gram"] if top is None else found["gram"][at], gram, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(found["residual"][at].float(), residual, rtol=1e-5, atol=1e-4)
        assert int(found["tokens"][at]) == tokens


def test_the_sample_is_the_declared_one() -> None:
    found, data = summed(RouterSample(9, C, R), torch.arange(N)), seen()
    order = torch.argsort(row_hash(data.rows, 0))[:9]
    wanted = order[torch.argsort(data.rows[order])]
    assert torch.equal(found["rows"], data.rows[wanted])
    assert torch.equal(found["inputs"], data.inputs[wanted]) and torch.equal(found["wanted"], data.wanted[wanted])
