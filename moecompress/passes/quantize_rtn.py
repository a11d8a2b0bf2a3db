"""quantize.rtn: round every weight to the nearest point of its grid. No data needed."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from moecompress.numerics.grids import round_to_nearest
from moecompress.passes.base import Decision, LayerContext
from moecompress.passes.quantizer import Quantizer, with_rounded
from moecompress.types import LayerWeights, QuantizedTensor, Scheme


class QuantizeRTN(Quantizer):
    """Round to nearest on min-max or MSE grids (specs: uniform quantizer conventions).

    Symmetric: q in [-2^(b-1), 2^(b-1)-1]; asymmetric: q in [0, 2^b-1] with an integer zero point. 1 bit = binary.
    """

    name: ClassVar[str] = "quantize.rtn"
    paper: ClassVar[str] = "baseline (round to nearest)"

    grid: Literal["minmax", "mse"] = Field("mse", description="min-max range, or the range with least squared error")

    def decide(self, context: LayerContext) -> Decision:
        """Nothing to search: every target gets the recipe's scheme."""
        return Decision({"bits": self.bits, "targets": sorted(self.schemes(context.layer))})

    def apply(self, context: LayerContext, decision: Decision) -> LayerWeights:
        def rounded(weight: Tensor, scheme: Scheme) -> QuantizedTensor:
            return round_to_nearest(weight, scheme, grid=self.grid, scale_dtype=context.scale_dtype)

        def scheme(expert: int | None, name: str) -> Scheme:
            return self.scheme_for(context, expert, name)

        return with_rounded(context.weights, decision.data["targets"], rounded, scheme)

    def trial(self, weight: Tensor, bits: int, hessian: Tensor | None, scale_dtype: torch.dtype) -> QuantizedTensor:
        return round_to_nearest(weight, self.scheme_at(bits), grid=self.grid, scale_dtype=scale_dtype)
