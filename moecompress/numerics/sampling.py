"""Which token comes next: greedy, sampled, and what a guard against repetition forbids."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def next_tokens(
    logprobs: Tensor, temperature: float, top_p: float, generators: Sequence[torch.Generator] | None = None
) -> Tensor:
    """One token per row, int64 [R]. logprobs: float [R, V], each row log P.

    temperature 0: the most likely one (the lowest id among equals). Otherwise a draw from P^(1 / temperature) cut to
    the smallest set of likely tokens with mass top_p, by generators[r] for row r: no row depends on another.
    """
    if temperature == 0:
        return logprobs.argmax(-1)
    assert generators is not None
    if not logprobs.shape[0]:
        return torch.empty(0, dtype=torch.int64)
    scaled = (logprobs.double() / temperature).softmax(-1)
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    ordered = torch.where(before < top_p, ordered, 0.0)
    drawn = [torch.multinomial(row, 1, generator=own) for row, own in zip(ordered, generators, strict=True)]
    return order.gather(1, torch.stack(drawn))[:, 0]


def repeats(ids: Tensor, vocabulary: int, ngram: int, run: int) -> Tensor:
    """Tokens that would repeat: bool [R, V] for rows ids int64 [R, T].

    ngram n > 0: tokens that would complete n tokens that the row already holds in this order. run m > 0: the token that
    the last m positions all hold. 0 turns a rule off.
    """
    rows, length = ids.shape
    banned = torch.zeros(rows, vocabulary, dtype=torch.bool)
    if ngram > 0 and length >= ngram:
        windows = ids.unfold(1, ngram, 1)
        same = (windows[:, :, :-1] == ids[:, None, length - ngram + 1 :]).all(-1)
        row, at = same.nonzero(as_tuple=True)
        banned[row, windows[row, at, -1]] = True
    if run > 0 and length >= run:
        tail = ids[:, -run:]
        stuck = (tail == tail[:, :1]).all(1).nonzero()[:, 0]
        banned[stuck, ids[stuck, -1]] = True
    return banned


def gumbel(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """float64 noise G such that the k largest of log P + G are k draws from P without replacement."""
    uniform = torch.rand(shape, dtype=torch.float64, generator=generator).clamp(min=math.ulp(0.0))
    return -(-uniform.log()).log()
