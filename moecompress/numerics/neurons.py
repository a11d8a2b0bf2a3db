"""An expert as a set of neurons: what each reads and where it writes. The order of neurons does not matter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from moecompress.errors import UnsupportedModel, message
from moecompress.numerics.grids import dequantize
from moecompress.types import ExpertWeights, QuantizedTensor, Weight


class Neurons(NamedTuple):
    """inputs: float32 [I, P, H], the rows of gate and up (P = 2) or the one row (P = 1). bias: [I, P] or None.
    outputs: [I, H], the columns of down."""

    inputs: Tensor
    bias: Tensor | None
    outputs: Tensor

    def take(self, index: Tensor) -> Neurons:
        """These neurons in this order."""
        bias = None if self.bias is None else self.bias[index]
        return Neurons(self.inputs[index], bias, self.outputs[index])

    def flat(self) -> Tensor:
        """[I, (P + 1) H (+ P)]: everything of a neuron in one row."""
        parts = [self.inputs.flatten(1), self.outputs, *([] if self.bias is None else [self.bias])]
        return torch.cat(parts, 1)

    def scaled(self, factor: Tensor) -> Neurons:
        """What is read last (up) times factor [I], what is written divided by it: the same function where the
        activation is linear in up."""
        inputs = self.inputs.clone()
        inputs[:, -1] *= factor[:, None]
        bias = self.bias
        if bias is not None:
            bias = bias.clone()
            bias[:, -1] *= factor
        return Neurons(inputs, bias, self.outputs / factor[:, None])


def neurons_of(expert: ExpertWeights, gated: bool, concatenated: bool) -> Neurons:
    """The neurons of an expert in canonical layout. gated, concatenated: as in MoESite.

    Raises UnsupportedModel for an expert whose inputs are turned into another basis.
    """
    if expert.gate_up_turn is not None or expert.down_turn is not None:
        raise UnsupportedModel(message("experts", "are rotated already", then="merge or prune before rotate.*"))
    bias = expert.gate_up_bias
    split = None if bias is None else _split(bias.float()[:, None], gated, concatenated)[:, :, 0]
    return Neurons(_split(_dense(expert.gate_up), gated, concatenated), split, _dense(expert.down).T.contiguous())


def expert_of(neurons: Neurons, like: ExpertWeights, gated: bool, concatenated: bool) -> ExpertWeights:
    """An expert of these neurons, float32; the bias of its output is that of `like`."""
    bias = None
    if neurons.bias is not None:
        bias = _join(neurons.bias[:, :, None], gated, concatenated)[:, 0]
    gate_up = _join(neurons.inputs, gated, concatenated)
    return replace(like, gate_up=gate_up, down=neurons.outputs.T.contiguous(), gate_up_bias=bias)


def joined(parts: Sequence[Neurons]) -> Neurons:
    """The neurons of several experts (or parts of them) one after the other."""
    inputs, biases, outputs = zip(*parts, strict=True)
    return Neurons(torch.cat(inputs), None if biases[0] is None else torch.cat(biases), torch.cat(outputs))


def linear_in_up(activate: Callable[[Tensor], Tensor], gated: bool, concatenated: bool) -> bool:
    """Whether a neuron's activation is proportional to what its up row reads, sign included.

    activate: [n, 2I] -> [n, I] (or [n, I] -> [n, I]).
    """
    if not gated:
        return False
    rows = torch.randn(8, 2, 16, generator=torch.Generator().manual_seed(0)) * 4
    factors = torch.tensor([1.0, 2.0, -1.0, 0.5] * 2)
    other = rows.clone()
    other[:, 1] *= factors[:, None]
    before, after = (activate(_join(values, gated, concatenated).T) for values in (rows, other))
    return torch.allclose(after, before * factors, rtol=1e-5, atol=1e-6)


def _split(rows: Tensor, gated: bool, concatenated: bool) -> Tensor:
    """[P I, H] -> [I, P, H]"""
    if not gated:
        return rows[:, None]
    return rows.unflatten(0, (2, -1)).transpose(0, 1) if concatenated else rows.unflatten(0, (-1, 2))


def _join(split: Tensor, gated: bool, concatenated: bool) -> Tensor:
    """[I, P, H] -> [P I, H]"""
    return (split.transpose(0, 1) if gated and concatenated else split).flatten(0, 1).contiguous()


def _dense(weight: Weight) -> Tensor:
    return dequantize(weight) if isinstance(weight, QuantizedTensor) else weight.float()
