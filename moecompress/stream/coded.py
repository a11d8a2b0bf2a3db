"""A 4-bit copy of a layer's experts for generating in little memory: rounded to nearest, packed, expanded one at a
time when it is used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from moecompress.checkpoint.native import RecordLayout, decode, encode, record_layout
from moecompress.numerics.grids import find_grid, quantize
from moecompress.types import PROJECTIONS, ExpertWeights, Scheme

GROUP = 32  # columns per scale, where they divide the row


class CodedExperts(Sequence[ExpertWeights]):
    """Experts as native records; indexing decodes one."""

    def __init__(self, experts: Sequence[ExpertWeights]) -> None:
        """experts: quantized ones, all with the same layout."""
        self.layout: RecordLayout = record_layout(experts[0])
        self._rows: list[Tensor] = [encode(self.layout, expert) for expert in experts]
        self._biases = [(expert.gate_up_bias, expert.down_bias) for expert in experts]

    @overload
    def __getitem__(self, index: int) -> ExpertWeights: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[ExpertWeights]: ...
    def __getitem__(self, index: int | slice) -> ExpertWeights | Sequence[ExpertWeights]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        made = decode(self.layout, self._rows[index])
        return ExpertWeights(made.gate_up, made.down, *self._biases[index])

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def nbytes(self) -> int:
        return sum(row.nbytes for row in self._rows)


def rtn4(experts: Sequence[ExpertWeights]) -> CodedExperts:
    """The experts with symmetric min-max 4-bit codes in groups of 32 columns (the whole row where 32 does not divide).

    bfloat16 scales. Routers, attention and everything else stay as they are.
    """
    return CodedExperts([_rounded(expert) for expert in experts])


def _rounded(expert: ExpertWeights) -> ExpertWeights:
    for name in PROJECTIONS:
        weight = expert.projection(name)
        assert isinstance(weight, Tensor)  # plan refuses compressed sources
        scheme = Scheme(4, GROUP if weight.shape[1] % GROUP == 0 else -1)
        coded = quantize(weight, find_grid(weight, scheme, "minmax", torch.bfloat16), scheme)
        expert = expert.with_projection(name, coded)
    return expert
