"""Activations rounded per token while the model runs: symmetric int4 or int8 codes, one scale per row."""

from __future__ import annotations

import torch
from torch import Tensor

from moecompress.types import Scheme

WIDTHS = (4, 8)


def activation_codes(x: Tensor, bits: int, clip: float = 1.0) -> tuple[Tensor, Tensor]:
    """Codes int8 [..., c] and scales float32 [..., 1] of x [..., c]: s = clip max_j |x_j| / (2^(b-1) - 1) per row.

    q = round half to even (x / s), held within [-2^(b-1), 2^(b-1) - 1]; everything in float32. A row's scale depends on
    that row alone, so batches do not matter. A row of zeros has scale 1 and codes 0, one with NaN or Inf such a scale.
    clip: share of the largest |x| that keeps a code of its own, in (0, 1]; what lies beyond saturates.
    Raises ValueError for other widths and clip ratios. Source: per-token dynamic rounding as in QuaRot (2404.00456).
    """
    if bits not in WIDTHS or not 0 < clip <= 1:
        raise ValueError(f"activations of {bits} bits clipped at {clip}; allowed: {WIDTHS} bits, 0 < clip <= 1")
    top = 2 ** (bits - 1) - 1
    values = x.float()
    scales = values.abs().amax(-1, keepdim=True) * (clip / top)
    scales = torch.where(scales == 0, 1.0, scales)  # not `> 0`, which NaN is not
    codes = torch.round(values / scales).clamp_(-top - 1, top)
    return codes.to(torch.int8), scales


def rounded_activations(x: Tensor, bits: int, clip: float = 1.0) -> Tensor:
    """What a matrix with rounded inputs multiplies: codes times scales, in the dtype of x [..., c]."""
    codes, scales = activation_codes(x, bits, clip)
    return (codes * scales).to(x.dtype)


def rounded_as(scheme: Scheme, inputs: Tensor) -> Tensor:
    """What a matrix stored so multiplies: its inputs [..., c] rounded per token, or as they are.

    Gradients pass straight through the rounding.
    """
    if scheme.activation_bits is None:
        return inputs
    rounded = rounded_activations(inputs, scheme.activation_bits, scheme.activation_clip)
    return inputs + (rounded - inputs).detach() if inputs.requires_grad else rounded
