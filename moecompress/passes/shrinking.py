"""What every pass shares that leaves fewer experts: how many stay in each layer, what may not be done, which are safe.

Layers that look experts up by token id use every expert of theirs and are left whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from moecompress.arch.surgery import resized_facts
from moecompress.passes.base import Pass
from moecompress.types import LayerFacts, ModelFacts, MoESite, Stream

SUPER = 10.0  # times the layer's median of the experts' largest outputs
Protected = Literal["super_experts"]
One = Annotated[int, Field(ge=1, strict=True)] | Annotated[float, Field(gt=0, le=1, strict=True)]
Keep = One | Annotated[tuple[One, ...], Field(min_length=1)]


class Shrinking(Pass):
    """Leaves fewer experts in every layer.

    Super experts (2507.23279: a few experts whose outputs are enormous and without which the model falls apart) are
    told per layer: the largest |output element| on the calibration tokens is over 10 times the median expert's.
    """

    changes: ClassVar[frozenset[str]] = frozenset({"experts", "router"})
    propagate: ClassVar[Stream] = "original"
    removes_experts: ClassVar[bool] = True

    keep: Keep = Field(
        0.75, description="experts that stay in every layer: a fraction (0.75), their number (48), or one per MoE layer"
    )
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

    @property
    def sharing(self) -> bool:
        """Whether the router stays as it is and its ids share experts."""
        return False

    def kept(self, site: MoESite, keep: float | int | None = None) -> int:
        """How many experts stay of `site`; a fraction is rounded to what the groups allow."""
        wanted = self.keep if keep is None else keep
        assert not isinstance(wanted, tuple)
        if isinstance(wanted, int):
            return wanted
        run = self.runs(site)
        return max(1, round(wanted * site.num_experts / run)) * run

    def runs(self, site: MoESite) -> int:
        """Runs of experts of which equally many stay."""
        return site.groups if self.group_policy == "balanced" and not self.sharing else 1

    def count_in(self, facts: ModelFacts, layer: LayerFacts) -> int:
        """How many experts stay in a MoE layer. Needs as many entries of a list `keep` as there are MoE layers."""
        site = layer.site
        assert site is not None
        if whole(layer) and not self.sharing:
            return site.num_experts
        if not isinstance(self.keep, tuple):
            return self.kept(site)
        return self.kept(site, self.keep[[other.index for other in facts.moe_layers].index(layer.index)])

    def layer_counts(self, facts: ModelFacts) -> dict[int, int]:
        """Layer -> experts that stay there."""
        return {layer.index: self.count_in(facts, layer) for layer in facts.moe_layers}

    def check(self, facts: ModelFacts) -> list[str]:
        sites = [layer.site for layer in facts.moe_layers if layer.site is not None]
        if len({(site.num_experts, site.top_k) for site in sites}) > 1:
            return ["layers have different numbers of experts"]
        if any(site.shared_ids is not None for site in sites):
            return ["ids of the router already share experts (router: expert_map): do that last"]
        if isinstance(self.keep, tuple) and len(self.keep) != len(sites):
            return [f"keep: {len(self.keep)} entries for {len(sites)} layers with experts"]
        counts = self.layer_counts(facts)
        problems = {problem for layer in facts.moe_layers for problem in self._problems(layer, counts[layer.index])}
        if not problems and len(set(counts.values())) > 1 and not self.sharing:
            problems |= set(self.uneven_problems(sites[0], min(counts.values())))
        return sorted(problems)

    def uneven_problems(self, site: MoESite, least: int) -> list[str]:
        """What forbids different numbers of experts per layer, of which the smallest is `least`."""
        if least < site.top_k:
            return [f"{least} experts stay in a layer, every token uses {site.top_k}: uneven layers cannot lower that"]
        if site.groups > 1 and self.group_policy == "ungroup":
            return ["group_policy ungroup needs the same number of experts in every layer"]
        return []

    def _problems(self, layer: LayerFacts, count: int) -> list[str]:
        site = layer.site
        assert site is not None
        groups = site.groups
        if count > site.num_experts:
            return [f"keep: {count}, the model has {site.num_experts} experts per layer"]
        if count == site.num_experts or self.sharing:
            return []
        problems = []
        if count < site.top_k and self.top_k == "keep":
            problems.append(f"{count} experts stay, every token uses {site.top_k}: keep more, or set top_k: lower")
        if self.runs(site) > 1:
            each = count // groups
            if count % groups:
                problems.append(
                    f"keep: {count} does not divide by the router's {groups} groups; or set group_policy: ungroup"
                )
            elif each < least_in_group(site, count):
                problems.append(
                    f"{each} experts stay in each of {groups} groups, of which a token uses {site.top_groups}: too few "
                    f"for {site.top_k} experts per token; keep more, or set group_policy: ungroup"
                )
        return problems

    def reshape(self, facts: ModelFacts) -> ModelFacts:
        counts = self.layer_counts(facts)
        layers = (self._reshaped(layer, counts.get(layer.index, 0)) for layer in facts.layers)
        return replace(facts, layers=tuple(layers))

    def _reshaped(self, layer: LayerFacts, count: int) -> LayerFacts:
        site = layer.site
        if site is None or count == site.num_experts:
            return layer
        if self.sharing:
            return replace(layer, site=replace(site, num_experts=count, shared_ids=site.num_experts))
        groups = (site.groups, site.top_groups) if self.runs(site) == site.groups else (1, 1)
        top_k = min(site.top_k, count)
        made = replace(site, num_experts=count, top_k=top_k, groups=groups[0], top_groups=groups[1])
        return resized_facts(layer, made)


def least_in_group(site: MoESite, count: int) -> int:
    """Experts that every group of the router must keep: its score takes two, and chosen groups fill a token's slots."""
    return max(2, -(-min(site.top_k, count) // site.top_groups))


def whole(layer: LayerFacts) -> bool:
    """Whether the layer looks experts up by token id, so that none of them can go."""
    return any(name.endswith("tid2eid") for name in layer.shapes)


def super_experts(statistics: Mapping[str, Mapping[str, Tensor]]) -> list[int]:
    """Experts whose largest output is over `SUPER` times the median of those with tokens; largest first.

    statistics: with `expert_activity`, or without it (none can be told then).
    """
    if "expert_activity" not in statistics:
        return []
    largest = statistics["expert_activity"]["max_output"]
    used = largest[largest > 0]
    if used.numel() == 0:
        return []
    found = (largest > SUPER * used.median()).nonzero().flatten().tolist()
    return sorted(found, key=lambda i: -float(largest[i]))


def chosen(order: list[int], count: int, groups: int) -> list[int]:
    """The first `count` experts of `order`, equally many from each of `groups` runs of experts, ascending."""
    size, each = len(order) // groups, count // groups
    kept: list[int] = []
    for group in range(groups):
        kept += [expert for expert in order if expert // size == group][:each]
    return sorted(kept)
