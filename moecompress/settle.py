"""What a finished layer is once it has been stored: rounded once, and with the values that a loader gives it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moecompress.numerics.grids import dequantize
from moecompress.numerics.turn import without_turns
from moecompress.types import ExpertWeights, LayerWeights, QuantizedTensor, Weight
from moecompress.writing import Format


def settle(weights: LayerWeights, original: LayerWeights, output: Format) -> LayerWeights:
    """The layer as it will be read back: changed tensors rounded once to the stored dtype, dense output dequantized."""

    def settled(value: Weight, dtype: torch.dtype) -> Weight:
        if isinstance(value, QuantizedTensor):
            return dequantize(value, torch.float32).to(dtype) if output == "dense" else value
        return value.to(dtype) if value.is_floating_point() else value

    tensors = {}
    for name, value in weights.tensors.items():
        before = original.tensors[name]
        tensors[name] = value if value is before else settled(value, _dtype(before))
    if not original.experts:
        return replace(weights, tensors=tensors)
    first = original.experts[0]
    dtype = _dtype(first.gate_up)

    def bias(value: Tensor | None, before: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(_dtype(before))

    experts = tuple(
        replace(
            expert,
            gate_up=settled(expert.gate_up, dtype),
            down=settled(expert.down, dtype),
            gate_up_bias=bias(expert.gate_up_bias, first.gate_up_bias),
            down_bias=bias(expert.down_bias, first.down_bias),
        )
        for expert in (map(without_turns, weights.experts) if output == "dense" else weights.experts)
    )
    return replace(weights, tensors=tensors, experts=experts)


def as_loaded(weights: LayerWeights, output: Format) -> LayerWeights:
    """The settled layer with the values it is run with: portable experts are rounded to their scales' dtype.

    transformers expands them so while loading, whatever dtype the model is loaded in. Other matrices keep their codes:
    it expands those in the dtype of the model, which is float32 here and in the reload check.
    """
    if output != "portable":
        return weights

    return weights.with_experts(_AsLoaded(weights.experts))


class _AsLoaded(Sequence[ExpertWeights]):
    """Experts expanded to their scales' dtype when asked for: one at a time, never a dense copy of the layer."""

    def __init__(self, experts: Sequence[ExpertWeights]) -> None:
        self._experts = experts

    def __len__(self) -> int:
        return len(self._experts)

    def __getitem__(self, index: Any) -> Any:
        expert = self._experts[index]
        return replace(expert, gate_up=_expanded(expert.gate_up), down=_expanded(expert.down))


def _expanded(value: Weight) -> Weight:
    return dequantize(value, value.scales.dtype) if isinstance(value, QuantizedTensor) else value


def _dtype(value: Weight | None) -> torch.dtype:
    if value is None:
        return torch.float32
    return value.dtype if isinstance(value, Tensor) else value.scales.dtype
