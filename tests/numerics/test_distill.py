"""Distances from a teacher of which a part is kept."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from moecompress.numerics.distill import bucketed, divergence, teacher


def logits(seed: int, rows: int = 7, size: int = 20) -> torch.Tensor:
    return 3 * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_rest_is_one_class() -> None:
    given = logits(0)
    known = teacher(given, 4)
    p = given.softmax(-1)
    kept = p.gather(1, known.ids.long())
    torch.testing.assert_close(
        known.logs.exp().double(), torch.cat([kept, 1 - kept.sum(1, True)], 1), rtol=1e-5, atol=1e-7
    )
    assert bool((known.logs.exp().sum(1) - 1 < 1e-6).all())


def test_all_tokens_give_the_whole_divergence_and_fewer_never_more() -> None:
    given, other = logits(0), logits(1)
    whole = F.kl_div(other.log_softmax(-1), given.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(divergence(teacher(given, 99), other).double(), whole, rtol=1e-5, atol=1e-6)
    before = torch.zeros(7, dtype=torch.float64)
    for count in (1, 3, 8, 19):
        found = divergence(teacher(given, count), other)
        assert bool((found >= before - 1e-6).all()) and bool((found <= whole + 1e-6).all())
        before = found
    assert float(divergence(teacher(given, 5), given).abs().max()) < 1e-6


def test_gradients_equal_differences() -> None:
    known, student = teacher(logits(0), 3), logits(1).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: divergence(known, x), (student,), eps=1e-6, atol=1e-4)
    assert torch.autograd.gradcheck(lambda x: bucketed(x, known.ids.long()), (student,))
