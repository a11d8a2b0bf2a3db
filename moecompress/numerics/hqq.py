"""HQQ: move each group's zero point (or scale) by a half-quadratic solver so that outliers count less. No data.

Half-Quadratic Quantization, Badri and Shaji 2023 (mobiusml.github.io/hqq_blog): minimise |W - dequantize(Q)|_p with
p < 1 by alternating a shrinkage step, which sets large misses aside, and a closed-form step for the zero point.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moecompress.numerics.grids import Grid, GridRule, find_grid, nearest_codes, quantize, zero_points
from moecompress.types import QuantizedTensor, Scheme

_ROWS = 1 << 18  # weights solved at a time


def hqq(
    weight: Tensor,
    scheme: Scheme,
    *,
    grid: GridRule = "minmax",
    scale_dtype: torch.dtype = torch.bfloat16,
    norm: float = 0.7,
    beta: float = 10.0,
    growth: float = 1.01,
    iterations: int = 20,
) -> QuantizedTensor:
    """Codes for `weight` [out, in] on a grid that starts as `find_grid(weight, scheme, grid)`.

    With a zero point the scale stays and the zero point moves: to the mean of u - (W - E) / s, where E is the shrunk
    error; `zero: int` rounds the ones it compares. Symmetric: the zero point is fixed, so the scale moves, to the least
    squares answer for W - E (our extension). Binary: nothing can move that the grid does not already place best.
    norm: p; beta: strength of the shrinkage in units of the group's mean |w|, times `growth` at every iteration.
    Every group keeps the iterate with the least sum |W - dequantize(Q)|, the start among them, so the result is never
    worse than the start in that sum. Raises ValueError as `find_grid` does.
    """
    start = find_grid(weight, scheme, grid, scale_dtype)
    if scheme.binary:
        return quantize(weight, start, scheme)
    rows, columns = weight.shape
    groups = scheme.groups(columns)
    zeros = zero_points(start, scheme)
    scales = start.scales.float()
    step = max(1, _ROWS // columns)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        x = weight[part].float().reshape(-1, groups, columns // groups)
        scales[part], zeros[part] = _solve(
            x, scales[part], zeros[part], scheme, scale_dtype, (norm, beta, growth), iterations
        )
    kept = scales.to(scale_dtype)
    if scheme.symmetric:
        return quantize(weight, Grid(kept, None), scheme)
    return quantize(weight, Grid(kept, zeros.to(torch.uint8 if scheme.zero == "int" else scale_dtype)), scheme)


def _solve(
    x: Tensor,
    scales: Tensor,
    zeros: Tensor,
    scheme: Scheme,
    dtype: torch.dtype,
    shrinkage: tuple[float, float, float],
    iterations: int,
) -> tuple[Tensor, Tensor]:
    """The best scales and zero points [rows, G] found for the groups of x [rows, G, size]."""
    norm, beta, growth = shrinkage
    unit = x.abs().mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    s, z = scales.unsqueeze(-1), zeros.unsqueeze(-1)
    best_s, best_z, least = s.clone(), z.clone(), torch.full_like(s, torch.inf)
    top = (1 << scheme.bits) - 1
    for _ in range(iterations + 1):
        stored = z.round().clamp(0, top) if scheme.zero == "int" else z
        u = nearest_codes(x, s, stored, scheme)
        missed = x - (u - stored) * s
        cost = missed.abs().sum(-1, keepdim=True)
        better = cost < least
        best_s, best_z, least = (
            torch.where(better, new, old) for new, old in ((s, best_s), (stored, best_z), (cost, least))
        )
        if scheme.zero == "int":  # the search goes on between the integers, where it would get stuck
            u = nearest_codes(x, s, z, scheme)
            missed = x - (u - z) * s
        target = x - unit * _shrink(missed / unit, norm, beta)
        s, z = _moved(u, s, z, target, scheme, dtype)
        beta *= growth
    return best_s.squeeze(-1), best_z.squeeze(-1)


def _shrink(value: Tensor, norm: float, beta: float) -> Tensor:
    """The proximal step of |v|^p: sign(v) max(0, |v| - |v|^(p - 1) / beta)."""
    size = value.abs()
    return torch.sign(value) * torch.relu(size - size.clamp_min(1e-30).pow(norm - 1) / beta)


def _moved(
    u: Tensor, s: Tensor, z: Tensor, target: Tensor, scheme: Scheme, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Scale and zero point that fit `target` best with the codes u, as they would be stored but for `zero: int`."""
    if scheme.symmetric:
        q = u - z
        size = q.square().sum(-1, keepdim=True)
        moved = (q * target).sum(-1, keepdim=True) / size.clamp_min(1)
        usable = (size > 0) & (moved.abs() > 0) & torch.isfinite(moved.to(dtype).float())
        return torch.where(usable, moved.to(dtype).float(), s), z
    z = (u - target / s).mean(-1, keepdim=True)
    return s, z if scheme.zero == "int" else z.to(dtype).float()
