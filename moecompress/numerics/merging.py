"""Several experts as one: weighted averages of aligned neurons."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moecompress.numerics.matching import aligned
from moecompress.numerics.neurons import Neurons


def shares(weights: Tensor, labels: Tensor) -> Tensor:
    """weights [N] >= 0 divided by their sum in each cluster, float64; a cluster of zeros counts everyone alike."""
    weights = weights.double()
    out = torch.empty_like(weights)
    for label in labels.unique().tolist():
        members = labels == label
        total = weights[members].sum()
        out[members] = weights[members] / total if total > 0 else 1 / float(members.sum())
    return out


def average(members: Sequence[Neurons], weights: Sequence[float], reference: int = 0, align: bool = True) -> Neurons:
    """The weighted mean of experts of equal width, every member's neurons brought into the order of the reference's.

    weights: of sum 1. align: False takes the neurons as they come (HC-SMoE). A lone member, or members equal but for
    their order, come back unchanged up to rounding.
    """
    if len(members) == 1:
        return members[0]
    total: list[Tensor | None] = [None, None, None]
    for number, (member, weight) in enumerate(zip(members, weights, strict=True)):
        if align and number != reference:
            member = member.take(aligned(members[reference], member))
        for place, part in enumerate(member):
            if part is not None:
                known = total[place]
                total[place] = part.double() * weight if known is None else known + part.double() * weight
    inputs, bias, outputs = (None if part is None else part.float() for part in total)
    assert inputs is not None and outputs is not None
    return Neurons(inputs, bias, outputs)
