"""quantize.rtn: round every weight to the nearest point of its grid. No data needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, field_validator
from torch import Tensor

from moecompress.numerics.grids import round_to_nearest
from moecompress.passes.base import (
    TARGETS,
    Decision,
    LayerContext,
    Pass,
    Target,
    group_problems,
    input_columns,
    selected_linears,
)
from moecompress.types import PROJECTIONS, ExpertWeights, LayerFacts, LayerWeights, ModelFacts, Scheme, Weight

Bits = Literal[1, 2, 3, 4, 8]
_ROUTER = ("router", "routers", "gate", "norm", "norms", "embedding", "embeddings", "embed_tokens", "lm_head", "head")


class QuantizeRTN(Pass):
    """Round to nearest on min-max or MSE grids (specs: uniform quantizer conventions).

    Symmetric: q in [-2^(b-1), 2^(b-1)-1]; asymmetric: q in [0, 2^b-1] with an integer zero point. 1 bit = binary.
    """

    name: ClassVar[str] = "quantize.rtn"
    paper: ClassVar[str] = "baseline (round to nearest)"
    changes: ClassVar[frozenset[str]] = frozenset({"experts", "attention", "shared_experts", "dense_mlp"})

    bits: Bits = Field(4, description="code width of every targeted weight; 1 = binary (-s, +s)")
    group_size: int = Field(128, description="input columns that share one scale; -1 = one scale per output channel")
    symmetric: bool = Field(True, description="no zero points")
    grid: Literal["minmax", "mse"] = Field("mse", description="min-max range, or the range with least squared error")
    targets: tuple[Target, ...] = Field(("routed_experts",), description="what is quantized")

    @field_validator("targets", mode="before")
    @classmethod
    def _known_targets(cls, value: object) -> object:
        items = [value] if isinstance(value, str) else value
        for item in items if isinstance(items, list | tuple) else ():
            if item in _ROUTER:
                raise ValueError(
                    f"'{item}' is not quantized: a rounded router sends tokens to other experts, and routers, norms, "
                    f"embeddings and lm_head are small or sensitive; allowed: {', '.join(TARGETS)}"
                )
        return tuple(items) if isinstance(items, list | tuple) else items

    @field_validator("group_size")
    @classmethod
    def _positive_group(cls, value: int) -> int:
        if value == 0 or value < -1:
            raise ValueError(f"{value} is not a group size; allowed: 16, 32, 64, 128, ... or -1 (per channel)")
        return value

    @property
    def scheme(self) -> Scheme:
        binary = self.bits == 1 and self.symmetric
        return Scheme(self.bits, self.group_size, self.symmetric, "none" if self.symmetric else "int", binary)

    def check(self, facts: ModelFacts) -> list[str]:
        problems = group_problems(input_columns(facts, self.targets), self.group_size)
        for target in self.targets:
            if target != "routed_experts" and not any(selected_linears(layer, [target]) for layer in facts.layers):
                problems.append(f"targets: this model has no {target}")
        return problems

    def schemes(self, layer: LayerFacts) -> Mapping[str, Scheme]:
        chosen = dict.fromkeys(selected_linears(layer, self.targets), self.scheme)
        if layer.site is not None and "routed_experts" in self.targets:
            chosen.update(dict.fromkeys(PROJECTIONS, self.scheme))
        return chosen

    def decide(self, context: LayerContext) -> Decision:
        """Nothing to search: every target gets the recipe's scheme."""
        names = sorted(self.schemes(context.layer))
        return Decision({"bits": self.bits, "targets": names})

    def apply(self, context: LayerContext, decision: Decision) -> LayerWeights:
        names = decision.data["targets"]
        weights = context.weights
        if "gate_up" in names:
            weights = weights.with_experts(tuple(self._expert(context, expert) for expert in weights.experts))
        linears = [name for name in names if name not in PROJECTIONS]
        return weights.with_tensors({name: self._round(context, weights.tensors[name]) for name in linears})

    def _expert(self, context: LayerContext, expert: ExpertWeights) -> ExpertWeights:
        for projection in PROJECTIONS:
            expert = expert.with_projection(projection, self._round(context, expert.projection(projection)))
        return expert

    def _round(self, context: LayerContext, weight: Weight) -> Weight:
        if not isinstance(weight, Tensor):
            return weight  # already quantized by an earlier pass, which owns its codes
        return round_to_nearest(weight.float(), self.scheme, grid=self.grid, scale_dtype=context.scale_dtype)
