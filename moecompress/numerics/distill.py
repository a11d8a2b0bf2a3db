"""Distances of next-token distributions from a teacher of which only the likeliest tokens are kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Teacher:
    """Some of a teacher's log-probabilities: ids int32 [T, n], logs float32 [T, n + 1], the last one of all others."""

    ids: Tensor
    logs: Tensor


def teacher(logits: Tensor, count: int) -> Teacher:
    """The `count` likeliest tokens of logits [T, V] (all but one of them at most), and the rest as one class."""
    ids = logits.topk(min(count, logits.shape[-1] - 1), dim=-1).indices
    return Teacher(ids.int(), bucketed(logits, ids).float())


def bucketed(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities [T, n + 1] of the tokens ids [T, n] and, last, of all others together. Differentiable."""
    whole = logits.logsumexp(-1, keepdim=True)
    others = logits.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(-1, ids), others], -1) - whole


def divergence(known: Teacher, logits: Tensor) -> Tensor:
    """KL(teacher || student) [T] in nats over the teacher's tokens and the rest: never negative, and at most the KL
    over the whole vocabulary, which 2603.02217 uses. logits: the student's, [T, V]."""
    p = known.logs.exp()
    missed = torch.where(p > 0, known.logs - bucketed(logits, known.ids.long()), 0.0)
    return (p * missed).sum(-1)
