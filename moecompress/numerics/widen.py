"""The same values in wider symmetric codes."""

from __future__ import annotations

from dataclasses import replace

import torch

from moecompress.types import QuantizedTensor


def fits_codes(weight: QuantizedTensor, bits: int) -> bool:
    """Whether `widen_codes` can hold these values at `bits`: no zero points, and codes of at most that width."""
    scheme = weight.scheme
    if not scheme.symmetric or weight.zeros is not None:
        return False
    return bits >= 2 if scheme.binary else scheme.bits <= bits


def widen_codes(weight: QuantizedTensor, bits: int) -> QuantizedTensor:
    """Symmetric codes of `bits` bits on the same scales, with exactly equal values (u - 2^(b-1)) * s.

    Binary codes become -1 and +1. Raises ValueError for zero points and for codes wider than `bits`.
    """
    if not fits_codes(weight, bits):
        raise ValueError(f"{weight.scheme} has values outside symmetric {bits}-bit codes on the same scales")
    scheme = weight.scheme
    middle = 1 << (bits - 1)
    if scheme.binary:
        codes = torch.where(weight.codes > 0, middle + 1, middle - 1).to(torch.uint8)
    else:
        codes = weight.codes + (middle - (1 << (scheme.bits - 1))) if scheme.bits != bits else weight.codes
    return QuantizedTensor(codes, weight.scales, None, replace(scheme, bits=bits, binary=False))
