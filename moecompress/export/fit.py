"""Which format can hold which codes: the schemes of an output against those of a target format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from moecompress.numerics.grids import dequantize, round_to_nearest
from moecompress.numerics.widen import fits_codes, widen_codes
from moecompress.types import QuantizedTensor, Scheme, Weight

ExportFormat = Literal["portable", "container", "dense", "gptq"]
CONTAINER_BITS = (4, 8)


@dataclass(frozen=True)
class Fit:
    """The scheme that all matrices get (None: each keeps its own), and what would be lost."""

    scheme: Scheme | None
    losses: tuple[str, ...] = ()


def container_bits(schemes: Iterable[Scheme]) -> int:
    """The narrowest width of a container that holds all codes."""
    widest = max((scheme.bits for scheme in schemes if scheme.bits != 16), default=0)
    return next(bits for bits in CONTAINER_BITS if bits >= widest)


def common_fit(schemes: Collection[Scheme], bits: int | None = None) -> Fit:
    """One scheme for all: of `bits` bits, which no code exceeds, or (None) the one that they already have.

    Exact when every value is an integer code of that width times a scale of the same groups.
    """
    losses = _unplain(schemes)
    coded = [scheme for scheme in schemes if scheme.bits not in (0, 16)]  # zeros fit everywhere
    widths, groups = sorted({s.bits for s in coded}), Counter(s.group_size for s in coded)
    if not coded:
        return Fit(None, (*losses, "nothing to take a scheme from"))
    if len(groups) > 1:
        losses.append(f"several group sizes ({sorted(groups)})")
    if bits is None and any(scheme.binary for scheme in coded):
        losses.append("1-bit codes mean -s and +s, which compressed-tensors cannot say (--format container can)")
    if bits is None and len(widths) > 1:
        losses.append(f"mixed bits ({', '.join(map(str, widths))}) (--format container can hold them)")
    return Fit(Scheme(bits or max(2, widths[-1]), groups.most_common(1)[0][0]), tuple(losses))


def linear_fit(schemes: Collection[Scheme], container: bool) -> Fit:
    """The scheme of the other quantized matrices: their own where they have one, else the container's."""
    if not schemes:
        return Fit(None)
    own = common_fit(schemes)
    return own if not own.losses or not container else common_fit(schemes, container_bits(schemes))


def own_fit(schemes: Collection[Scheme]) -> Fit:
    """Every matrix keeps its scheme (binary: 2-bit codes of the same values); zero points are lost."""
    return Fit(None, tuple(_unplain(schemes)))


def activation_losses(schemes: Iterable[Scheme]) -> list[str]:
    found = sorted({scheme.activation for scheme in schemes} - {"none"})
    return [f"activations are rounded ({', '.join(found)}) when it runs, which the format cannot say"] if found else []


def _unplain(schemes: Collection[Scheme]) -> list[str]:
    losses = activation_losses(schemes)
    if any(scheme.bits == 16 for scheme in schemes):
        losses.append("some experts are not quantized")
    if any(not scheme.symmetric for scheme in schemes):
        losses.append("zero points")
    return losses


def fitted(weight: Weight, scheme: Scheme | None, dtype: torch.dtype) -> QuantizedTensor:
    """The matrix in `scheme` (None: its own, in at least 2 bits): the same values, or rounded again to nearest.

    Only a matrix whose values the scheme cannot hold is rounded; whether that may happen is decided before.
    """
    if isinstance(weight, QuantizedTensor):
        own = weight.scheme
        wanted = scheme or Scheme(max(2, own.bits), own.group_size)
        if own.bits and own.group_size == wanted.group_size and fits_codes(weight, wanted.bits):
            wide = widen_codes(weight, wanted.bits)
            return replace(wide, scheme=wanted)
        values: Tensor = dequantize(weight)
    else:
        wanted = scheme or Scheme(8)
        values = weight.float()
    return round_to_nearest(values, wanted, grid="mse", scale_dtype=dtype)
