"""Which neuron of one expert corresponds to which of another."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moecompress.numerics.neurons import Neurons


def aligned(reference: Neurons, other: Neurons) -> Tensor:
    """The order p of `other`'s neurons, int64 [I], that maximises sum_j <reference_j, other_p(j)> over gate rows, up
    rows (with their biases) and down columns (UNCURL, 2409.01483, with the gate of SwiGLU added): the same order that
    minimises the squared distance, found exactly. Raises ValueError for different widths."""
    first, second = reference.flat(), other.flat()
    if first.shape != second.shape:
        raise ValueError(f"experts of {list(first.shape)} and {list(second.shape)}; allowed: equal widths")
    _, columns = linear_sum_assignment((first @ second.T).double().numpy(), maximize=True)
    return torch.from_numpy(columns)
