"""EAQuant's router calibration (2506.13329): how far to clip each row of a router that is stored in codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moecompress.numerics.distill import Teacher, bucketed, divergence
from moecompress.numerics.grids import dequantize, find_grid, quantize
from moecompress.types import QuantizedTensor, Scheme

RATIOS = tuple(0.35 + 0.65 * step / 100 for step in range(101))  # the last one clips nothing


@dataclass(frozen=True)
class Clipped:
    """codes of a router [R, C], and plain ones that clip nothing, with the objectives of both. ratios: float64 [R],
    share of its range that each row keeps."""

    codes: QuantizedTensor
    plain: QuantizedTensor
    ratios: Tensor
    objective: float
    unclipped: float


def kept_share(experts: int, top_k: int, alpha: float) -> int:
    """EAQuant's m: how many of the original router's leading experts the KL looks at, k + floor(alpha (n - k))."""
    return top_k + int(alpha * (experts - top_k))


def clip_rows(weight: Tensor, ratios: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> QuantizedTensor:
    """`weight` [R, C] in codes whose range is the share `ratios` [R] of each row's own, larger values at its ends."""
    narrowed = weight.float() * ratios.to(weight.device, torch.float32)[:, None]
    return quantize(weight, find_grid(narrowed, scheme, "minmax", scale_dtype), scheme)


def best_clip(
    weight: Tensor,
    bias: Tensor | None,
    inputs: Tensor,
    wanted: Tensor,
    leading: int,
    scheme: Scheme,
    scale_dtype: torch.dtype,
) -> Clipped:
    """The clipping with the least mean squared output error plus KL over the leading outputs and the rest as one class.

    weight [R, C], inputs [n, C], wanted [n, R]: the original router's outputs. Tried are every ratio for all rows
    together and every row's own best by squared error; as the KL ties rows together, these are compared as wholes, and
    clipping nothing is among them: the objective never gets worse. (The published KL leaves the rest out, and so can
    be negative.)
    """
    x, y = inputs.double(), wanted.double()
    shift = torch.zeros(weight.shape[0], dtype=torch.float64) if bias is None else bias.double()
    known = _teacher(y, leading)

    def outputs(ratios: Tensor) -> Tensor:
        return x @ dequantize(clip_rows(weight, ratios, scheme, scale_dtype)).double().t() + shift

    def objective(made: Tensor) -> float:
        return float((made - y).square().mean() + divergence(known, made).mean())

    uniform, errors = [], []
    for ratio in RATIOS:
        made = outputs(torch.full((weight.shape[0],), ratio, dtype=torch.float64))
        uniform.append(objective(made))
        errors.append((made - y).square().mean(0))
    by_row = torch.tensor(RATIOS, dtype=torch.float64)[torch.stack(errors).argmin(0)]
    together = min(range(len(RATIOS)), key=uniform.__getitem__)
    candidates = [
        (uniform[-1], torch.ones_like(by_row)),
        (uniform[together], torch.full_like(by_row, RATIOS[together])),
        (objective(outputs(by_row)), by_row),
    ]
    least, ratios = min(candidates, key=lambda candidate: candidate[0])
    codes, plain = (clip_rows(weight, share, scheme, scale_dtype) for share in (ratios, torch.ones_like(ratios)))
    return Clipped(codes, plain, ratios, least, uniform[-1])


def _teacher(outputs: Tensor, leading: int) -> Teacher:
    count = min(leading, outputs.shape[1] - 1)  # with all but one, the rest is the last one
    ids = outputs.topk(count, dim=-1).indices
    return Teacher(ids.int(), bucketed(outputs, ids))
