"""AWQ (2306.00978): candidate scales that protect active channels, and ranges clipped by their output error."""

from __future__ import annotations

import torch
from torch import Tensor

from moecompress.numerics.grids import GridRule, dequantize, round_to_nearest
from moecompress.types import Scheme

_ROWS = 1 << 20  # weights times group size whose errors are formed at a time


def scale_candidates(activity: Tensor, steps: int = 20) -> Tensor:
    """float32 [steps, c] from the mean |x| of every input channel, activity [c]: a^(i / steps), geometric centre 1.

    Row 0 is all ones (no smoothing). A channel never active counts as the least active one; all zeros give all ones.
    """
    a = activity.float()
    alive = a > 0
    if not bool(alive.any()):
        return torch.ones(steps, len(a))
    a = torch.where(alive, a, a[alive].min())
    powers = (a / a.max())[None] ** (torch.arange(steps)[:, None] / steps)
    powers = powers.clamp_min(1e-4)
    return powers / (powers.amax(1, keepdim=True) * powers.amin(1, keepdim=True)).sqrt()


def clip_steps(
    weight: Tensor,
    inputs: Tensor,
    scheme: Scheme,
    *,
    grid: GridRule = "minmax",
    scale_dtype: torch.dtype = torch.bfloat16,
    steps: int = 10,
    levels: int = 20,
) -> Tensor:
    """How far to clip every group of `weight` [out, in]: uint8 [out, G], i = limit max|w| (1 - i / levels), i < steps.

    The i with the least squared error of the group's own output, sum_t (x_t (w - q))^2 over `inputs` [n, in], the least
    clipped of equals. Not clipping is a candidate, so the error never grows.
    """
    rows, columns = weight.shape
    groups = scheme.groups(columns)
    x = inputs.float().reshape(len(inputs), groups, columns // groups).transpose(0, 1)
    moments = x.transpose(1, 2) @ x  # [G, g, g]
    best = torch.zeros(rows, groups, dtype=torch.uint8)
    chunk = max(1, _ROWS // columns)
    for start in range(0, rows, chunk):
        w = weight[start : start + chunk].float()
        least = torch.full((len(w), groups), torch.inf)
        for i in range(steps):
            tried = clipped(w, torch.full((len(w), groups), i, dtype=torch.uint8), levels)
            missed = dequantize(round_to_nearest(tried, scheme, grid=grid, scale_dtype=scale_dtype)) - w
            missed = missed.reshape(len(w), groups, -1).transpose(0, 1)
            error = ((missed @ moments) * missed).sum(-1).t()
            better = error < least
            best[start : start + chunk][better] = i
            least = torch.where(better, error, least)
    return best


def clipped(weight: Tensor, steps: Tensor, levels: int = 20) -> Tensor:
    """`weight` [out, in] with every group held within max|w| (1 - i / levels), i = steps uint8 [out, G]."""
    blocks = weight.reshape(weight.shape[0], steps.shape[1], -1)
    limit = blocks.abs().amax(-1) * (1 - steps.to(weight.dtype) / levels)
    return blocks.clamp(-limit.unsqueeze(-1), limit.unsqueeze(-1)).reshape(weight.shape)
