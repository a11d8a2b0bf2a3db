"""quantize.hqq: rounding with zero points (or scales) moved so that outliers count less. No data needed."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from moecompress.numerics.hqq import hqq
from moecompress.passes.base import Decision, LayerContext
from moecompress.passes.quantizer import Quantizer, with_rounded
from moecompress.types import LayerWeights, QuantizedTensor, Scheme


class QuantizeHQQ(Quantizer):
    """Half-quadratic quantization: minimises |W - Q|_p, p < 1, over the zero point of every group.

    Its own form has float zero points (`symmetric: false`, `zero: float`), stored like another scale. Symmetric codes,
    which more engines read, have no zero point to move; there the scale is solved for instead.
    """

    name: ClassVar[str] = "quantize.hqq"
    paper: ClassVar[str] = "Half-Quadratic Quantization (Badri and Shaji 2023)"

    group_size: int = Field(64, description="input columns that share one scale; -1 = one scale per output channel")
    symmetric: bool = Field(False, description="no zero points; the scale is solved for instead")
    zero: Literal["int", "float"] = Field("float", description="how zero points are stored when not symmetric")
    grid: Literal["minmax", "mse"] = Field("minmax", description="the range to start from")
    iterations: int = Field(20, ge=0, le=1000, description="steps of the half-quadratic solver")
    norm: float = Field(0.7, gt=0, lt=2, description="p of the error norm |W - Q|_p")

    def scheme_at(self, bits: int) -> Scheme:
        binary = bits == 1 and self.symmetric
        zero = "none" if self.symmetric else self.zero
        return self.with_activation(Scheme(bits, self.group_size, self.symmetric, zero, binary))

    def decide(self, context: LayerContext) -> Decision:
        """Nothing to search between matrices: every target gets the recipe's scheme."""
        return Decision({"bits": self.bits, "targets": sorted(self.schemes(context.layer))})

    def apply(self, context: LayerContext, decision: Decision) -> LayerWeights:
        def solved(weight: Tensor, scheme: Scheme) -> QuantizedTensor:
            return self._solved(weight, scheme, context.scale_dtype)

        def scheme(expert: int | None, name: str) -> Scheme:
            return self.scheme_for(context, expert, name)

        return with_rounded(context.weights, decision.data["targets"], solved, scheme)

    def trial(self, weight: Tensor, bits: int, hessian: Tensor | None, scale_dtype: torch.dtype) -> QuantizedTensor:
        return self._solved(weight, self.scheme_at(bits), scale_dtype)

    def _solved(self, weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> QuantizedTensor:
        return hqq(weight, scheme, grid=self.grid, scale_dtype=scale_dtype, norm=self.norm, iterations=self.iterations)
