"""Uniform grids: which values a group of weights may take, and rounding to the nearest of them.

A group is `group_size` neighbouring input columns of one row; it has one scale and, when asymmetric, one zero point.
Value of code u: (u - z) * s with z = 2^(b-1) when symmetric; binary codes mean -s / +s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moecompress.numerics.packing import row_bytes
from moecompress.types import ExpertWeights, QuantizedTensor, Scheme

GridRule = Literal["minmax", "mse"]

NORM = 3  # errors of the "mse" search are sums of |w - q|^NORM; see find_grid
_COARSE = tuple(1 - i / 20 for i in range(17))  # 1.00, 0.95 ... 0.20 of the min-max scale
_FINE = tuple(sign * i / 100 for i in range(1, 5) for sign in (1, -1))
_CHUNK = 1 << 17  # weights searched at a time: the buffers stay in cache and memory stays small


@dataclass(frozen=True)
class Grid:
    """scales [out, G] in their storage dtype; zeros None, or [out, G]: uint8 (`zero: int`) or the scales' dtype."""

    scales: Tensor
    zeros: Tensor | None


def find_grid(
    weight: Tensor,
    scheme: Scheme,
    grid: GridRule = "minmax",
    scale_dtype: torch.dtype = torch.bfloat16,
    importance: Tensor | None = None,
) -> Grid:
    """Scales and zero points for `weight` (finite, any float dtype, [out, in]).

    minmax, symmetric: s = max|w| / ((2^b - 1) / 2), the convention of compressed-tensors: the largest weight may be
    half a step outside the codes, which at low bits costs less than the wider step of max|w| / (2^(b-1) - 1).
    minmax, asymmetric: s = (max - min) / (2^b - 1) with 0 inside the range, z = -min / s.
    mse: the multiple of the min-max scale, between 0.16 and 1.04, with the least sum of |w - q|^3; the exponent above 2
    protects large weights (GPTQ-style searches use 2.4). Symmetric scales may come out NEGATIVE: the codes reach one
    step further on their negative side, and the sign gives that step to the longer tail of the group.
    Never worse than minmax in that sum. binary: s = mean|w| under both rules, the optimum of the squared error.

    importance: [in], >= 0, weight of each column's error in "mse" and of its |w| in binary (a Hessian's diagonal); a
    group with no importance at all counts as uniform.
    Scales are rounded to `scale_dtype` before anything is derived from them, and kept finite and nonzero: the smallest
    usable value replaces an underflow. A group of zeros has scale 1 and codes that mean 0, except in binary, where only
    scale 0 can say so. Raises ValueError for 16 bits, for one symmetric bit without `binary`, when the group size does
    not divide the columns and when importance has the wrong shape.
    """
    _require_codes(scheme)
    if scheme.bits == 1 and scheme.symmetric and not scheme.binary:
        raise ValueError("one symmetric bit has the values -s and 0 only; allowed: binary=True or a zero point")
    rows, columns = weight.shape
    groups = scheme.groups(columns)
    if importance is not None and importance.shape != (columns,):
        raise ValueError(f"importance: shape {tuple(importance.shape)}; allowed: ({columns},)")
    scales = torch.empty(rows, groups, dtype=scale_dtype, device=weight.device)
    zeros = None
    if not scheme.symmetric:
        zeros = torch.empty_like(scales, dtype=torch.uint8 if scheme.zero == "int" else scale_dtype)
    for part in _row_chunks(rows, columns):
        x = weight[part].float().reshape(-1, columns // groups).t().contiguous()  # [size, rows * G]: groups as columns
        h = None if importance is None else _per_group(importance, groups).repeat(1, x.shape[1] // groups)
        s, z = _binary_grid(x, h, scale_dtype) if scheme.binary else _affine_grid(x, h, scheme, grid, scale_dtype)
        scales[part] = s.view(-1, groups).to(scale_dtype)
        if zeros is not None:
            zeros[part] = z.view(-1, groups).to(zeros.dtype)
    return Grid(scales, zeros)


def quantize(weight: Tensor, grid: Grid, scheme: Scheme) -> QuantizedTensor:
    """Round `weight` [out, in] to the nearest codes of `grid`. Raises ValueError for 16 bits or a misfit of shapes."""
    _require_codes(scheme)
    rows, columns = weight.shape
    groups = scheme.groups(columns)
    if grid.scales.shape != (rows, groups):
        raise ValueError(f"scales: shape {tuple(grid.scales.shape)}; allowed: {(rows, groups)}")
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
    for part in _row_chunks(rows, columns):
        x = weight[part].float().reshape(-1, groups, columns // groups)
        if scheme.binary:
            u = x >= 0
        else:
            z = zero_points(grid, scheme)[part].unsqueeze(-1)
            u = nearest_codes(x, grid.scales[part].float().unsqueeze(-1), z, scheme)
        codes[part] = u.reshape(-1, columns).to(torch.uint8)
    return QuantizedTensor(codes, grid.scales, grid.zeros, scheme)


def dequantize(q: QuantizedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values [out, in] that the codes stand for, computed in float32 and rounded once to `dtype`."""
    rows, columns = q.codes.shape
    if q.scheme.bits == 0:
        return torch.zeros(rows, columns, dtype=dtype, device=q.codes.device)
    u = q.codes.float().reshape(rows, q.scales.shape[1], -1)
    scales = q.scales.float().unsqueeze(-1)
    if q.scheme.binary:
        values = u.mul_(2).sub_(1).mul_(scales)
    else:
        values = u.sub_(zero_points(Grid(q.scales, q.zeros), q.scheme).unsqueeze(-1)).mul_(scales)
    return values.view(rows, columns).to(dtype)


def no_bits(shape: tuple[int, int] | torch.Size, scale_dtype: torch.dtype = torch.bfloat16) -> QuantizedTensor:
    """A matrix [out, in] of which nothing is stored: every value is 0."""
    rows, columns = shape
    codes = torch.zeros(1, 1, dtype=torch.uint8).expand(rows, columns)
    return QuantizedTensor(codes, torch.empty(rows, 0, dtype=scale_dtype), None, Scheme(0))


def is_absent(expert: ExpertWeights) -> bool:
    """Whether an expert's output is always zero because nothing of it is stored: no token need be sent to it."""
    return isinstance(expert.down, QuantizedTensor) and expert.down.scheme.bits == 0


def round_to_nearest(
    weight: Tensor,
    scheme: Scheme,
    *,
    grid: GridRule = "minmax",
    scale_dtype: torch.dtype = torch.bfloat16,
    importance: Tensor | None = None,
) -> QuantizedTensor:
    """`quantize` on the grid that `find_grid` gives; errors as there."""
    return quantize(weight, find_grid(weight, scheme, grid, scale_dtype, importance), scheme)


def stored_bits(shape: tuple[int, ...] | torch.Size, scheme: Scheme, scale_dtype: torch.dtype = torch.bfloat16) -> int:
    """Bits a matrix [out, in] takes when stored: packed rows, scales, zero points (8 bits each, or a scale's width).

    Headers and alignment of a file are not counted. 16 bits: the plain tensor.
    """
    rows, columns = shape
    if scheme.bits == 16:
        return rows * columns * 16
    scale_bits = scale_dtype.itemsize * 8
    zero_bits = {"none": 0, "int": 8, "float": scale_bits}[scheme.zero]
    return rows * (8 * row_bytes(columns, scheme.bits) + scheme.groups(columns) * (scale_bits + zero_bits))


def zero_points(grid: Grid, scheme: Scheme) -> Tensor:
    """z of (u - z) * s, float32 [out, G]; 2^(b-1) when symmetric. Not meaningful for binary."""
    if grid.zeros is None:
        return torch.full_like(grid.scales, 1 << (scheme.bits - 1), dtype=torch.float32)
    return grid.zeros.float()


def nearest_codes(x: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme) -> Tensor:
    """Codes as float32: round(x / s + z) kept inside [0, 2^b - 1]. The one place where values become codes."""
    return torch.div(x, scales).add_(zeros).round_().clamp_(0, (1 << scheme.bits) - 1)


def _require_codes(scheme: Scheme) -> None:
    if scheme.bits in (0, 16):
        raise ValueError(f"{scheme.bits} bits: there are no codes")


def _row_chunks(rows: int, columns: int) -> list[slice]:
    step = max(1, _CHUNK // columns)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _per_group(importance: Tensor, groups: int) -> Tensor:
    """[in] -> [size, G], mean 1 in each group; a group without importance becomes all ones."""
    h = importance.float().reshape(groups, -1).t()
    mean = h.mean(0)
    return torch.where(mean > 0, h / mean, 1.0)


def _round_scales(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 values of `scales` as `dtype` stores them, finite and not zero, with their sign."""
    smallest = 2.0**-24 if dtype == torch.float16 else 2.0**-126  # half subnormals survive; 1 / 2^-126 is finite
    magnitude = scales.abs().clamp(smallest, torch.finfo(dtype).max)
    return torch.copysign(magnitude, scales).to(dtype).float()


def _binary_grid(x: Tensor, h: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    mean = x.abs().mean(0) if h is None else (x.abs() * h).mean(0)
    return mean.clamp(max=torch.finfo(dtype).max), mean


def _affine_grid(
    x: Tensor, h: Tensor | None, scheme: Scheme, grid: GridRule, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Scales [N] (rounded) and zero points of the groups in the columns of x [size, N]."""
    top = (1 << scheme.bits) - 1
    if scheme.symmetric:
        step = x.abs().amax(0) * (2 / top)
        zeros = torch.full_like(step, 1 << (scheme.bits - 1))
    else:
        low, high = x.amin(0).clamp(max=0), x.amax(0).clamp(min=0)
        step = (high - low) / top
        exact = torch.where(step > 0, -low / step, 0.0)
        zeros = exact.round().clamp(0, top) if scheme.zero == "int" else exact.to(dtype).float()
    step = torch.where(step > 0, step, 1.0)
    if grid == "minmax":
        return _round_scales(step, dtype), zeros
    return _search_scales(x, h, step, zeros, scheme, dtype), zeros


def _search_scales(
    x: Tensor, h: Tensor | None, step: Tensor, zeros: Tensor, scheme: Scheme, dtype: torch.dtype
) -> Tensor:
    """The best multiples of `step` [N], rounded to `dtype`: coarse ratios of both signs, then around the best one."""
    unit = x / step  # sizes near 1 whatever the weights are: the powers below neither overflow nor underflow
    best = torch.ones_like(step)
    least = torch.full_like(step, torch.inf)
    for ratio in _ratios(best, both_signs=scheme.symmetric):
        scales = _round_scales(step * ratio, dtype) / step
        q = nearest_codes(unit, scales, zeros, scheme).sub_(zeros).mul_(scales).sub_(unit).abs_()
        cost = q.pow_(NORM) if h is None else q.pow_(NORM).mul_(h)
        error = cost.sum(0)
        better = error < least
        best = torch.where(better, ratio, best, out=best)
        least = torch.where(better, error, least, out=least)
    return _round_scales(step * best, dtype)


def _ratios(best: Tensor, both_signs: bool) -> Iterator[Tensor]:
    """Candidates [N] in turn; `best` is read again, after its owner updated it, when the fine ones start."""
    for ratio in _COARSE:
        yield torch.full_like(best, ratio)
        if both_signs:
            yield torch.full_like(best, -ratio)
    centre = best.clone()
    for step in _FINE:
        yield centre + torch.copysign(torch.full_like(best, step), centre)
