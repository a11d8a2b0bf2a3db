"""How repetitive token rows are."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor


def compressed_share(row: Tensor) -> float:
    """Size after zlib (level 9) over the size before, of the ids as little-endian int32; small = repetitive."""
    raw = row.to(torch.int32).contiguous().numpy().astype("<i4").tobytes()
    return len(zlib.compress(raw, 9)) / len(raw)


def distinct_share(row: Tensor, ngram: int = 4) -> float:
    """Different n-grams over all n-grams of ids [T]; 1 = no n-gram comes twice."""
    windows = row.unfold(0, ngram, 1)
    return windows.unique(dim=0).shape[0] / windows.shape[0]
