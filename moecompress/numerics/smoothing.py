"""Channel scales that move the spread of activations into weights (SmoothQuant, 2211.10438; EAQuant, 2506.13329)."""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST = 1e-5  # smallest activity, weight and scale that are told apart from nothing


def channel_scales(activity: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """s = a^alpha / w^(1 - alpha), float32 [..., c]: x / s and W s are to be rounded in place of x and W.

    activity: largest |x| of every input channel, [..., c]. weights: largest |W| of every column, [..., c].
    A channel that is never active counts as the least active of its row; a row without activity has scales 1.
    """
    a, w = activity.float(), weights.float().clamp_min(_LEAST)
    alive = a > 0
    least = torch.where(alive, a, torch.inf).amin(-1, keepdim=True)
    scales = torch.where(alive, a, least) ** alpha / w ** (1 - alpha)
    return torch.where(torch.isfinite(least), scales.clamp_min(_LEAST), 1.0)


def unified_scales(readers: Tensor) -> Tensor:
    """One scale per channel for everything that reads it: the largest that a reader asks for. [n, c] -> [c].

    No reader then meets a channel larger than its own scale would have left it (EAQuant, aggregation by maximum).
    """
    return readers.amax(0)
