"""GPTQ (2210.17323): round column by column, spreading each column's error over the columns not yet rounded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moecompress.numerics.grids import Grid, GridRule, find_grid, nearest_codes, quantize, zero_points
from moecompress.types import QuantizedTensor, Scheme

Order = Literal["none", "act", "gar"]

_LEAF = 16  # columns rounded one after another before their errors reach further columns in one matrix product
_MOST_DAMPING = 10.0  # of the mean diagonal; a sum of x x^T needs far less, whatever rounding did to it


@dataclass(frozen=True)
class GPTQResult:
    """q: the codes. loss: tr((W - Q) H (W - Q)^T) for the W that was aimed at. damping: the fraction that worked."""

    q: QuantizedTensor
    loss: float
    damping: float


def gptq(
    weight: Tensor,
    hessian: Tensor,
    scheme: Scheme,
    *,
    grid: GridRule = "mse",
    order: Order = "gar",
    static_groups: bool = False,
    damping: float = 0.01,
    scale_dtype: torch.dtype = torch.bfloat16,
    delta: Tensor | None = None,
) -> GPTQResult:
    """Codes for `weight` [out, in] that keep W x, for inputs with second moments `hessian` = sum x x^T [in, in].

    order: `act` rounds the columns with the largest diagonal first; `gar` (group-aware) sorts columns inside their
    groups and then the groups, so that groups stay whole. The result is always in the original order.
    static_groups: grids come from the weight as given; otherwise from the weight as corrected when its group begins.
    `mse` and binary grids weigh each column by the Hessian's diagonal.
    damping: fraction of the mean diagonal added to the diagonal; doubled until the Cholesky factorisation succeeds.
    delta: sum (x' - x) x^T [in, in] where W was meant for inputs x' but will see x: the aim becomes the least squares
    answer W + W delta H^-1 (of which the asymmetric term of GPTAQ, 2504.02692, is a column-by-column approximation).

    A column whose input was always 0 has no say in the grid and is rounded to nearest. A Hessian of zeros means no
    data: exactly `round_to_nearest` with the same grid rule, loss 0, damping 0.
    Raises ValueError for shapes that do not fit, a Hessian that is not finite or not positive semidefinite, `act` with
    several groups per row unless `static_groups`, and what `find_grid` refuses.
    """
    size = _check(weight, hessian, delta, scheme, order, static_groups)
    weight, diagonal = weight.float(), hessian.diagonal().float()
    alive = diagonal > 0
    if not bool(alive.any()):
        return GPTQResult(quantize(weight, find_grid(weight, scheme, grid, scale_dtype), scheme), 0.0, 0.0)

    def find(block: Tensor, positions: Tensor) -> Grid:
        return find_grid(block * alive[positions], scheme, grid, scale_dtype, diagonal[positions])

    columns = _column_order(diagonal, size, order)
    unit = float(diagonal[alive].mean())
    factor, damping = _inverse_factor(hessian[columns][:, columns].double() / unit, damping)
    aim = weight[:, columns]
    if delta is not None:
        aim = aim + (aim @ delta[columns][:, columns].float() / unit) @ factor.t() @ factor
    sweep = _Sweep.begin(aim, factor, columns, size, scheme, find)
    if static_groups:
        sweep.set_groups(slice(None), find(weight, torch.arange(len(columns), device=weight.device)))
    sweep.run(0, len(columns), regrid=not static_groups)
    missed = torch.sum((aim - sweep.rest.t()).square_(), dtype=torch.float64)
    damped_loss = torch.sum(sweep.errors.square(), dtype=torch.float64)
    loss = unit * max(0.0, float(damped_loss - damping * missed))
    return GPTQResult(sweep.result(scale_dtype), loss, damping)


@dataclass
class _Sweep:
    """Working memory of one matrix: its columns as rows, in processing order.

    rest: float32 [in, out], rounded values above the current column, corrected aims below it. errors: [in, out], what
    each column missed over its pivot. columns: int64 [in], original positions. scales, zeros: float32 [G, out] by
    original group.
    """

    rest: Tensor
    errors: Tensor
    codes: Tensor
    factor: Tensor
    columns: Tensor
    groups: list[int]
    size: int
    scheme: Scheme
    scales: Tensor
    zeros: Tensor
    find: Callable[[Tensor, Tensor], Grid]

    @classmethod
    def begin(
        cls,
        aim: Tensor,
        factor: Tensor,
        columns: Tensor,
        size: int,
        scheme: Scheme,
        find: Callable[[Tensor, Tensor], Grid],
    ) -> _Sweep:
        rest = aim.t().contiguous()
        scales = rest.new_zeros(len(columns) // size, rest.shape[1])
        codes = torch.empty_like(rest, dtype=torch.uint8)
        groups = (columns // size).tolist()
        return cls(
            rest,
            torch.empty_like(rest),
            codes,
            factor,
            columns,
            groups,
            size,
            scheme,
            scales,
            scales.clone(),
            find,
        )

    def set_groups(self, which: int | slice, grid: Grid) -> None:
        """Store a grid [out, G] or, for one group, [out, 1]."""
        self.scales[which] = grid.scales.t().float()
        self.zeros[which] = zero_points(grid, self.scheme).t()

    def run(self, start: int, stop: int, regrid: bool) -> None:
        """Round columns [start, stop), which already carry the corrections of every column before `start`.

        Halving instead of fixed blocks keeps most of the work in large matrix products. A range that is exactly one
        group is reached with all corrections made, so that is where its grid is found.
        """
        width = stop - start
        if regrid and width == self.size:
            block = self.rest[start:stop].t()
            self.set_groups(self.groups[start], self.find(block, self.columns[start:stop]))
        if width <= min(_LEAF, self.size):
            self._round_columns(start, stop)
            return
        middle = start + (width // self.size // 2 * self.size if width > self.size else width // 2)
        self.run(start, middle, regrid)
        spread = self.factor[start:middle, middle:stop].t()
        self.rest[middle:stop].addmm_(spread, self.errors[start:middle], alpha=-1)
        self.run(middle, stop, regrid)

    def _round_columns(self, start: int, stop: int) -> None:
        pivots = self.factor.diagonal()[start:stop].tolist()
        for i, pivot in enumerate(pivots, start):
            column, error = self.rest[i], self.errors[i]
            s, z = self.scales[self.groups[i]], self.zeros[self.groups[i]]
            if self.scheme.binary:
                code = (column >= 0).float()
                value = code.mul(2).sub_(1).mul_(s)
            else:
                code = nearest_codes(column, s, z, self.scheme)
                value = torch.sub(code, z).mul_(s)
            torch.sub(column, value, out=error).div_(pivot)
            self.codes[i] = code
            column.copy_(value)
            if i + 1 < stop:
                self.rest[i + 1 : stop].addr_(self.factor[i, i + 1 : stop], error, alpha=-1)

    def result(self, scale_dtype: torch.dtype) -> QuantizedTensor:
        codes = torch.empty_like(self.codes.t(), memory_format=torch.contiguous_format)
        codes[:, self.columns] = self.codes.t()
        zeros = None
        if not self.scheme.symmetric:
            zeros = self.zeros.t().to(torch.uint8 if self.scheme.zero == "int" else scale_dtype).contiguous()
        return QuantizedTensor(codes, self.scales.t().to(scale_dtype).contiguous(), zeros, self.scheme)


def _check(
    weight: Tensor, hessian: Tensor, delta: Tensor | None, scheme: Scheme, order: Order, static_groups: bool
) -> int:
    """Columns per group, after refusing what cannot work."""
    inputs = weight.shape[1]
    for name, matrix in (("hessian", hessian), ("delta", delta)):
        if matrix is not None and matrix.shape != (inputs, inputs):
            raise ValueError(f"{name}: shape {tuple(matrix.shape)}; allowed: ({inputs}, {inputs})")
        if matrix is not None and not bool(torch.isfinite(matrix).all()):
            raise ValueError(f"{name}: holds NaN or infinity; allowed: finite sums")
    groups = scheme.groups(inputs)
    if order == "act" and groups > 1 and not static_groups:
        raise ValueError("order 'act' mixes groups; allowed: 'gar', 'none', or 'act' with static_groups")
    return inputs // groups


def _column_order(diagonal: Tensor, size: int, order: Order) -> Tensor:
    """int64 [in]: original position of the column processed at each step; ties keep their order."""
    if order == "none":
        return torch.arange(len(diagonal), device=diagonal.device)
    if order == "act":
        return torch.argsort(diagonal, descending=True, stable=True)
    by_group = diagonal.view(-1, size)
    inside = torch.argsort(by_group, dim=1, descending=True, stable=True)
    outside = torch.argsort(by_group.amax(1), descending=True, stable=True)
    return (inside + torch.arange(len(by_group), device=diagonal.device)[:, None] * size)[outside].flatten()


def _inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """Upper triangular U, float32, with U^T U = (hessian + damping * 1)^-1, and the damping that it took.

    hessian: float64, mean diagonal 1. Factoring it with rows and columns reversed gives U as one triangular inverse,
    without forming the inverse matrix and factoring again. Raises ValueError when no damping is enough.
    """
    eye = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    while damping <= _MOST_DAMPING:
        lower, failed = torch.linalg.cholesky_ex((hessian + damping * eye).flip(0, 1))
        if not int(failed):
            inverse = torch.linalg.solve_triangular(lower, eye, upper=False)
            return inverse.flip(0, 1).float().contiguous(), damping
        damping = max(2 * damping, 0.01)
    raise ValueError("hessian: not positive semidefinite; allowed: a sum of x x^T")
