"""smooth.awq: move scales from active channels into the weights that read them, so that rounding hurts them less."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from moecompress.numerics.awq import clip_steps, clipped, scale_candidates
from moecompress.numerics.grids import GridRule, dequantize, round_to_nearest
from moecompress.passes.base import Decision, LayerContext, Pass, group_problems, input_columns
from moecompress.passes.quantizer import Bits, positive_group, scheme_of
from moecompress.passes.sampled import intermediate
from moecompress.passes.smoothing import dense, fold_data, scaled_between, smoothed, smoothing_problems, unsmoothed
from moecompress.stats.base import Statistic
from moecompress.stats.moments import Weighting
from moecompress.stats.routing import TokenSample
from moecompress.stream.fold import scaled_inputs
from moecompress.types import (
    PROJECTIONS,
    ExpertWeights,
    LayerFacts,
    LayerWeights,
    ModelFacts,
    Projection,
)


class SmoothAWQ(Pass):
    """AWQ (2306.00978) for experts: one scale per layer from the norm into router, routed and shared experts; one
    scale per expert from up into down; then, if asked, clipping. It rounds nothing: a `quantize.*` pass follows.

    The scales leave the layer's function as it is (tried on real inputs, or refused); clipping does not. Give `bits`,
    `group_size`, `symmetric` and `grid` as the quantizer that follows has them: the search rounds with these.
    """

    name: ClassVar[str] = "smooth.awq"
    paper: ClassVar[str] = "2306.00978"
    changes: ClassVar[frozenset[str]] = frozenset({"norms", "router", "experts", "shared_experts", "attention"})
    transforms_experts: ClassVar[bool] = True

    bits: Bits = Field(4, description="code width the search rounds to")
    group_size: int = Field(128, description="input columns that share one scale in the search; -1 = per channel")
    symmetric: bool = Field(True, description="no zero points in the search")
    grid: GridRule = Field("mse", description="range rule of the search")
    shared: bool = Field(
        True, description="one scale per layer, folded into the norm before the experts and the router"
    )
    experts: bool = Field(True, description="one scale per expert between up and down")
    clip: bool = Field(False, description="clip groups to the range with the least output error (for grid: minmax)")
    weighting: Weighting = Field(
        "affinity", description="affinity: candidates are judged by errors weighed with the tokens' routing weights"
    )
    power: Literal[1, 2] = Field(2, description="exponent of the routing weight: 2 the output error, 1 MoEQuant's")
    ratios: int = Field(20, ge=2, le=100, description="exponents tried per search, 0 among them")
    tokens: int = Field(512, ge=1, description="sampled tokens per layer on which candidates are judged")
    calibration: str = Field("default", description="the calibration set to use")

    @field_validator("group_size")
    @classmethod
    def _positive_group(cls, value: int) -> int:
        return positive_group(value)

    @property
    def _power(self) -> int:
        return self.power if self.weighting == "affinity" else 0

    def needs(self) -> tuple[Statistic, ...]:
        return (TokenSample(self.tokens),)

    def check(self, facts: ModelFacts) -> list[str]:
        problems = group_problems(input_columns(facts, ("routed_experts",)), self.group_size)
        if not (self.shared or self.experts or self.clip):
            problems.append("nothing is left to do (works: shared: true, experts: true, or clip: true)")
        return problems + smoothing_problems(facts, shared=self.shared, experts=self.experts)

    def decide(self, context: LayerContext) -> Decision:
        """Tensors: `shared` [H] and `experts` [E, I] scales, `clip.gate_up`, `clip.down` uint8 [E, out, G] steps."""
        if context.layer.site is None:
            return Decision({})
        data: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        weights, sample = context.weights, context.statistics["token_sample"]
        if self.shared:
            fold = context.norm_fold()
            tensors["shared"], data["ratio"] = self._shared(context, sample)
            data |= fold_data(fold)
            weights = scaled_inputs(weights, fold, tensors["shared"])
            sample = {**sample, "hidden": sample["hidden"].float() / tensors["shared"]}
        if self.experts:
            found = [self._between(context, weights, sample, number) for number in range(len(weights.experts))]
            tensors["experts"] = torch.stack([scale for scale, _ in found])
            data["expert_ratios"] = [ratio for _, ratio in found]
            weights = scaled_between(weights, context.layer.site, tensors["experts"])
        if self.clip:
            for projection in PROJECTIONS:
                tensors[f"clip.{projection}"] = self._clip(context, weights, sample, projection)
        return Decision(data, tensors)

    def apply(self, context: LayerContext, decision: Decision) -> LayerWeights:
        weights, site, tensors = context.weights, context.layer.site, decision.tensors
        if site is None:
            return weights
        weights = smoothed(weights, site, decision.data, tensors)
        for projection in PROJECTIONS:
            if f"clip.{projection}" in tensors:
                weights = _clipped(weights, projection, tensors[f"clip.{projection}"])
        return weights

    def restored(self, layer: LayerFacts, decision: Decision, number: int, expert: ExpertWeights) -> ExpertWeights:
        return unsmoothed(layer, decision, number, expert)

    def _shared(self, context: LayerContext, sample: Mapping[str, Tensor]) -> tuple[Tensor, float]:
        """The candidate with the least squared error of all experts' outputs when gate and up are rounded under it."""
        candidates = scale_candidates(sample["hidden"].float().abs().mean(0), self.ratios)
        errors = torch.zeros(len(candidates), dtype=torch.float64)
        for number, expert in enumerate(context.weights.experts):
            inputs, gates = _routed(sample, number, self._power)
            if len(inputs) == 0:
                continue
            wanted = context.forward(expert, inputs)
            for i, scale in enumerate(candidates):
                tried = replace(expert, gate_up=self._rounded(dense(expert.gate_up), scale, context.scale_dtype))
                errors[i] += ((context.forward(tried, inputs) - wanted) * gates).double().square().sum()
        best = int(errors.argmin())
        return candidates[best], best / self.ratios

    def _between(
        self, context: LayerContext, weights: LayerWeights, sample: Mapping[str, Tensor], number: int
    ) -> tuple[Tensor, float]:
        """The same for the scale between up and down of one expert; ones for an expert without sampled tokens."""
        down = dense(weights.experts[number].down)
        middle, gates = _intermediate(context, weights, sample, number, self._power)
        candidates = scale_candidates(
            middle.abs().mean(0) if len(middle) else down.new_zeros(down.shape[1]), self.ratios
        )
        if len(middle) == 0:
            return candidates[0], 0.0
        weighted = middle * gates
        errors = [
            float((weighted @ (self._rounded(down, scale, context.scale_dtype) - down).t()).double().square().sum())
            for scale in candidates
        ]
        best = min(range(len(errors)), key=errors.__getitem__)
        return candidates[best], best / self.ratios

    def _rounded(self, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        scheme = scheme_of(self.bits, self.group_size, self.symmetric)
        return dequantize(round_to_nearest(weight * scale, scheme, grid=self.grid, scale_dtype=dtype)) / scale

    def _clip(
        self, context: LayerContext, weights: LayerWeights, sample: Mapping[str, Tensor], projection: Projection
    ) -> Tensor:
        scheme = scheme_of(self.bits, self.group_size, self.symmetric)
        made = []
        for number, expert in enumerate(weights.experts):
            inputs, gates = _routed(sample, number, self._power)
            if projection == "down":
                inputs, gates = _intermediate(context, weights, sample, number, self._power)
            weight = dense(expert.projection(projection))
            made.append(clip_steps(weight, inputs * gates, scheme, grid=self.grid, scale_dtype=context.scale_dtype))
        return torch.stack(made)


def _routed(sample: Mapping[str, Tensor], number: int, power: int) -> tuple[Tensor, Tensor]:
    """Sampled tokens of one expert, float32 [n, H], and what their errors count before they are squared, [n, 1]: the
    routing weight to the power / 2."""
    rows, slots = (sample["ids"] == number).nonzero(as_tuple=True)
    return sample["hidden"][rows].float(), sample["weights"][rows, slots].float().abs()[:, None] ** (power / 2)


def _intermediate(
    context: LayerContext, weights: LayerWeights, sample: Mapping[str, Tensor], number: int, power: int
) -> tuple[Tensor, Tensor]:
    """What `down` of one expert receives for its sampled tokens, [n, I], and what their errors count [n, 1]."""
    inputs, gates = _routed(sample, number, power)
    return intermediate(context, weights.experts[number], inputs), gates


def _clipped(weights: LayerWeights, projection: Projection, steps: Tensor) -> LayerWeights:
    return weights.with_experts(
        tuple(
            expert.with_projection(projection, clipped(dense(expert.projection(projection)), steps[number]))
            for number, expert in enumerate(weights.experts)
        )
    )
