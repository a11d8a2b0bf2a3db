"""smooth.expert: one scale per channel that suits every expert and the router, folded into the norm before them."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from moecompress.arch.sites import NormFold
from moecompress.numerics.smoothing import channel_scales, unified_scales
from moecompress.passes.base import Decision, LayerContext, Pass
from moecompress.passes.smoothing import (
    dense,
    fold_data,
    smoothed,
    smoothing_problems,
    unsmoothed,
)
from moecompress.stats.base import Statistic
from moecompress.stats.moments import InputMoments
from moecompress.types import ExpertWeights, LayerFacts, LayerWeights, ModelFacts


class SmoothExpert(Pass):
    """EAQuant's smoothing (2506.13329): s_j = max over readers i of max|x_j^i|^alpha / max|W_j^i|^(1 - alpha).

    Readers are the routed experts (x^i: the tokens routed to i; W^i: rows of gate and up), the router and the shared
    experts (x: all tokens). The norm's weight is divided by s and the columns of everything that reads the norm are
    multiplied by it, so the layer's function stays as it is (tried on real inputs, or refused). Experts without tokens
    have no say, but are compensated like all others. It rounds nothing: a `quantize.*` pass with `activation_bits`
    follows.
    """

    name: ClassVar[str] = "smooth.expert"
    paper: ClassVar[str] = "2506.13329"
    changes: ClassVar[frozenset[str]] = frozenset({"norms", "router", "experts", "shared_experts", "attention"})
    transforms_experts: ClassVar[bool] = True

    alpha: float = Field(0.6, ge=0, le=1, description="how much of an activation's spread moves into the weights")
    aggregate: Literal["expert_max", "layer"] = Field(
        "expert_max",
        description="expert_max: the largest of the scales of every expert; layer: one scale from all experts' largest "
        "weights and all tokens (plain SmoothQuant, 2211.10438)",
    )
    router: bool = Field(True, description="the router has a say in the scales; it is compensated in any case")
    shared_experts: bool = Field(True, description="shared experts have a say, too; they are compensated in any case")
    shared: bool = Field(True, description="one scale per layer, folded into the norm before the experts")
    experts: bool = Field(True, description="one scale per expert between up and down")
    calibration: str = Field("default", description="the calibration set to use")

    def needs(self) -> tuple[Statistic, ...]:
        return (InputMoments(),)

    def check(self, facts: ModelFacts) -> list[str]:
        if not (self.shared or self.experts):
            return ["nothing is left to do (works: shared: true, or experts: true)"]
        return smoothing_problems(facts, shared=self.shared, experts=self.experts)

    def decide(self, context: LayerContext) -> Decision:
        """Tensors: `shared` [H], `experts` [E, I]."""
        if context.layer.site is None:
            return Decision({})
        data: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        moments = context.statistics["input_moments"]
        if self.shared:
            fold = context.norm_fold()
            tensors["shared"] = self._shared(context, fold)
            data |= fold_data(fold)
        if self.experts:
            sizes = torch.stack([dense(expert.down).abs().amax(0) for expert in context.weights.experts])
            tensors["experts"] = channel_scales(moments["down.abs_max"], sizes, self.alpha)
        silent = (moments["tokens"] == 0).nonzero().flatten().tolist()
        data["experts"] = {str(number): {"smoothing": "no tokens of its own"} for number in silent}
        return Decision(data, tensors)

    def apply(self, context: LayerContext, decision: Decision) -> LayerWeights:
        if context.layer.site is None:
            return context.weights
        return smoothed(context.weights, context.layer.site, decision.data, decision.tensors)

    def restored(self, layer: LayerFacts, decision: Decision, number: int, expert: ExpertWeights) -> ExpertWeights:
        return unsmoothed(layer, decision, number, expert)

    def _shared(self, context: LayerContext, fold: NormFold) -> Tensor:
        """The unified scale [H]; ones when no token reached any expert."""
        moments, weights = context.statistics["input_moments"], context.weights
        activity, reached = moments["gate_up.abs_max"], moments["tokens"] > 0
        sizes = torch.stack([dense(expert.gate_up).abs().amax(0) for expert in weights.experts])
        everywhere = activity.amax(0)
        if not bool(reached.any()):
            return torch.ones_like(everywhere)
        rows = [*channel_scales(activity[reached], sizes[reached], self.alpha)]
        if self.aggregate == "layer":
            rows = [channel_scales(everywhere, sizes.amax(0), self.alpha)]
        for wanted, names in self._other_readers(context, fold):
            if wanted and names:
                largest = torch.stack([dense(weights.tensors[name]).abs().amax(0) for name in names]).amax(0)
                rows.append(channel_scales(everywhere, largest, self.alpha))
        return unified_scales(torch.stack(rows))

    def _other_readers(self, context: LayerContext, fold: NormFold) -> list[tuple[bool, list[str]]]:
        """(has a say, its matrices) of the router and of the shared experts."""
        site, roles = context.layer.site, context.layer.roles
        assert site is not None
        router = [name for name in fold.readers if name.startswith(f"{site.router}.")]
        shared = [name for name in fold.readers if roles[name] == "shared_experts"]
        return [(self.router, router), (self.shared_experts, shared)]
