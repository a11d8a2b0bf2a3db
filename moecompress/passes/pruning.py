"""What every pass that removes experts shares: how many stay, which are protected, groups, and the surgery.

A method only gives a score per expert; the highest of every layer stay. Scores come from the unpruned model: all layers
are judged on the original stream.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from moecompress.arch.surgery import keep_experts, resized_facts
from moecompress.passes.base import Decision, LayerContext, Pass
from moecompress.stats.base import Statistic
from moecompress.stats.experts import ExpertActivity
from moecompress.types import LayerWeights, ModelFacts, MoESite, Stream

SUPER = 10.0  # times the layer's median of the experts' largest outputs
Protected = Literal["super_experts"]
Keep = Annotated[int, Field(ge=1, strict=True)] | Annotated[float, Field(gt=0, le=1, strict=True)]


class Pruning(Pass):
    """Keep the best experts of every layer, the same number in each.

    Super experts (2507.23279: a few experts whose outputs are enormous and without which the model falls apart) are
    told per layer: the largest |output element| on the calibration tokens is over 10 times the median expert's.
    """

    changes: ClassVar[frozenset[str]] = frozenset({"experts", "router"})
    propagate: ClassVar[Stream] = "original"
    removes_experts: ClassVar[bool] = True

    keep: Keep = Field(0.75, description="experts that stay in every layer: a fraction (0.75), or their number (48)")
    protect: tuple[Protected, ...] = Field(("super_experts",), description="experts that stay whatever their score")
    group_policy: Literal["balanced", "ungroup"] = Field(
        "balanced",
        description="routers that choose groups first: keep as many experts in every group, or route without groups",
    )
    top_k: Literal["keep", "lower"] = Field(
        "keep", description="when fewer experts stay than a token uses: refuse, or use fewer per token"
    )
    calibration: str = Field("default", description="name of the calibration set that experts are judged on")
    seed: int = Field(0, ge=0, description="of random choices")

    @abstractmethod
    def scores(self, context: LayerContext) -> Tensor:
        """float64 [E], finite: the higher, the more worth keeping."""

    def needs(self) -> tuple[Statistic, ...]:
        return (ExpertActivity(),)

    def kept(self, site: MoESite) -> int:
        """How many experts stay; a fraction is rounded to what the groups allow."""
        if isinstance(self.keep, int):
            return self.keep
        run = site.groups if self.group_policy == "balanced" else 1
        return max(1, round(self.keep * site.num_experts / run)) * run

    def check(self, facts: ModelFacts) -> list[str]:
        sites = [layer.site for layer in facts.moe_layers if layer.site is not None]
        if len({(site.num_experts, site.top_k) for site in sites}) > 1:
            return ["layers have different numbers of experts"]
        hashed = [layer.index for layer in facts.layers if any(name.endswith("tid2eid") for name in layer.shapes)]
        if hashed:
            return [f"layers {hashed} look experts up by token id, so every expert is in use"]
        return self._count_problems(sites[0])

    def _count_problems(self, site: MoESite) -> list[str]:
        count, groups = self.kept(site), site.groups
        if count > site.num_experts:
            return [f"keep: {self.keep}, the model has {site.num_experts} experts per layer"]
        if count == site.num_experts:
            return []
        problems = []
        if count < site.top_k and self.top_k == "keep":
            problems.append(f"{count} experts stay, every token uses {site.top_k}: keep more, or set top_k: lower")
        if groups > 1 and self.group_policy == "balanced":
            each = count // groups
            if count % groups:
                problems.append(
                    f"keep: {count} does not divide by the router's {groups} groups; or set group_policy: ungroup"
                )
            elif each < 2 or each * site.top_groups < min(site.top_k, count):
                problems.append(
                    f"{each} experts stay in each of {groups} groups, of which a token uses {site.top_groups}: too few "
                    f"for {site.top_k} experts per token; keep more, or set group_policy: ungroup"
                )
        return problems

    def reshape(self, facts: ModelFacts) -> ModelFacts:
        sites = {layer.index: self._site(layer.site) for layer in facts.layers if layer.site is not None}
        layers = (resized_facts(layer, sites[layer.index]) if layer.site else layer for layer in facts.layers)
        return replace(facts, layers=tuple(layers))

    def _site(self, site: MoESite) -> MoESite:
        count = self.kept(site)
        if count == site.num_experts:
            return site
        groups = (site.groups, site.top_groups) if self.group_policy == "balanced" else (1, 1)
        return replace(site, num_experts=count, top_k=min(site.top_k, count), groups=groups[0], top_groups=groups[1])

    def decide(self, context: LayerContext) -> Decision:
        """kept: numbers of the experts that stay. experts: importance, and what became of the others."""
        site = context.layer.site
        if site is None:
            return Decision({})
        scores = self.scores(context)
        activity = context.statistics.get("expert_activity")
        seen = scores.new_zeros(scores.shape) if activity is None else activity["probability"]
        largest = None if activity is None else activity["max_output"]
        protected = super_experts(largest) if largest is not None and "super_experts" in self.protect else []
        first = {expert: rank for rank, expert in enumerate(protected)}
        order = sorted(
            range(len(scores)), key=lambda i: (first.get(i, len(first)), -float(scores[i]), -float(seen[i]), i)
        )
        kept = chosen(order, self.kept(site), site.groups if self.group_policy == "balanced" else 1)
        notes: dict[str, dict[str, Any]] = {str(i): {"importance": float(scores[i])} for i in range(len(scores))}
        for expert in sorted(set(order) - set(kept)):
            notes[str(expert)]["action"] = "pruned"
        for expert in protected:
            if expert in kept:
                notes[str(expert)]["protected"] = "super expert"
        return Decision({"kept": kept, "experts": notes})

    def apply(self, context: LayerContext, decision: Decision) -> LayerWeights:
        if context.layer.site is None:
            return context.weights
        return keep_experts(context.layer, context.weights, decision.data["kept"])


def chosen(order: list[int], count: int, groups: int) -> list[int]:
    """The first `count` experts of `order`, equally many from each of `groups` runs of experts, ascending."""
    size, each = len(order) // groups, count // groups
    kept: list[int] = []
    for group in range(groups):
        kept += [expert for expert in order if expert // size == group][:each]
    return sorted(kept)


def super_experts(largest: Tensor) -> list[int]:
    """Experts whose largest output [E] is over `SUPER` times the median of those with tokens; largest first."""
    used = largest[largest > 0]
    if used.numel() == 0:
        return []
    found = (largest > SUPER * used.median()).nonzero().flatten().tolist()
    return sorted(found, key=lambda i: -float(largest[i]))


def activity_score(statistics: Mapping[str, Mapping[str, Tensor]], b: float, alpha: int, beta: int) -> Tensor:
    """S(b, alpha, beta): sum of g^alpha |E|^beta over an expert's tokens, over count^b (0 without any)"""
    powers = statistics["expert_activity"]["powers"]
    count = powers[:, 0, 0]
    return torch.where(count > 0, powers[:, alpha, beta] / count.clamp_min(1) ** b, 0.0)
