"""What passes share that leave out some of a token's experts: gates, renormalisation, families that can have one."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from moecompress.arch.quirks import RESCALED_GATES
from moecompress.gate import Gate
from moecompress.numerics.gating import constant_sum
from moecompress.passes.base import LayerContext, Pass
from moecompress.stats.base import Statistic
from moecompress.stats.routing import TokenSample
from moecompress.types import LayerWeights, ModelFacts, MoESite


class Gating(Pass):
    """A token uses the first n of the K experts that its router chose; the others leave the dispatch.

    Where a family normalises the weights of the chosen experts, those that stay are scaled to the same sum (whatever
    factor follows); elsewhere they keep their weights. Which of both holds is read off the weights themselves.
    """

    changes: ClassVar[frozenset[str]] = frozenset({"router"})
    gates_experts: ClassVar[bool] = True

    renormalise: Literal["auto"] | bool = Field(
        "auto", description="scale what stays to the sum of all weights: where the router normalises, always, or never"
    )
    tokens: int = Field(4096, ge=1, description="calibration tokens per layer whose routing weights are looked at")
    calibration: str = Field("default", description="the calibration set to use")

    def needs(self) -> tuple[Statistic, ...]:
        return (TokenSample(self.tokens),)

    def check(self, facts: ModelFacts) -> list[str]:
        single = [layer.index for layer in facts.moe_layers if layer.site is not None and layer.site.top_k < 2]
        problems = [f"layers {single} use one expert per token: there is none to leave out"] if single else []
        if self.renormalise == "auto" and (reason := RESCALED_GATES.get(facts.model_type)):
            problems.append(
                f"renormalise: auto cannot tell whether weights are normalised: {reason}; set false or true"
            )
        return problems

    def renormalises(self, weights: Tensor) -> bool:
        """Whether this layer's weights [n, K] are scaled after slots were left out."""
        return constant_sum(weights) if self.renormalise == "auto" else self.renormalise


def with_gate(context: LayerContext, gate: Gate) -> LayerWeights:
    """The layer with a gate."""
    return replace(context.weights, gate=gate)


def site_of(facts: ModelFacts, index: int) -> MoESite:
    """The MoE site of a layer that has one."""
    site = facts.layers[index].site
    assert site is not None
    return site
