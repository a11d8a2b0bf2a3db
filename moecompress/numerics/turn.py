"""Orthogonal changes of basis of what a matrix receives, applied to activations and, once, to the matrix itself."""

from __future__ import annotations

import torch
from torch import Tensor

from moecompress.numerics.grids import dequantize
from moecompress.types import PROJECTIONS, ExpertWeights, QuantizedTensor, Turn


def turned(x: Tensor, turn: Turn) -> Tensor:
    """x T for x [..., c]; a matrix W [out, c] turned the same way gives (x T)(W T)^T = x W^T.

    Computed in float32 at least; the result has the dtype of x.
    """
    made = _blocks(x, turn.first)
    if turn.order is not None:
        made = made[..., turn.order.to(made.device, torch.int64)]
    if turn.second is not None:
        made = _blocks(made, turn.second)
    return made.to(x.dtype)


def unturned(x: Tensor, turn: Turn) -> Tensor:
    """x T^T: takes `turned` back."""
    made = x
    if turn.second is not None:
        made = _blocks(made, turn.second.t())
    if turn.order is not None:
        back = torch.argsort(turn.order.to(made.device, torch.int64))
        made = made[..., back]
    return _blocks(made, turn.first.t()).to(x.dtype)


def without_turns(expert: ExpertWeights) -> ExpertWeights:
    """The same expert with inputs used as they are: matrices that receive turned inputs dense and turned back."""
    for name in PROJECTIONS:
        turn, weight = expert.turn(name), expert.projection(name)
        if turn is not None:
            values = dequantize(weight) if isinstance(weight, QuantizedTensor) else weight
            expert = expert.with_projection(name, unturned(values, turn)).with_turn(name, None)
    return expert


def turn_matrix(turn: Turn, columns: int) -> Tensor:
    """T as float64 [c, c]."""
    return turned(torch.eye(columns, dtype=torch.float64), turn)


def _blocks(x: Tensor, rotation: Tensor) -> Tensor:
    """Consecutive blocks of the last dimension times `rotation` [b, b]."""
    wide = x if x.dtype == torch.float64 else x.float()
    blocks = wide.unflatten(-1, (-1, rotation.shape[0]))
    return (blocks @ rotation.to(blocks)).flatten(-2)
