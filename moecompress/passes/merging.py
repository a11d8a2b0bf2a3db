"""What every pass that merges clusters of experts shares: clusters, weighted means, and what the router does then.

A method says which experts belong together. In each cluster the one chosen most often on the calibration tokens is the
representative; the others' neurons are brought into its order, and all are averaged by how often they are chosen.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from moecompress.arch.surgery import keep_experts, stands_for
from moecompress.errors import UnsupportedModel, message
from moecompress.numerics.clustering import cosine_from_gram
from moecompress.numerics.merging import average, shares
from moecompress.numerics.neurons import expert_of, neurons_of
from moecompress.passes.base import Decision, LayerContext
from moecompress.passes.shrinking import Shrinking, super_experts
from moecompress.stats.base import Statistic
from moecompress.stats.experts import ExpertActivity
from moecompress.stats.routing import RoutingCounts
from moecompress.stats.similarity import CoActivation
from moecompress.types import ExpertWeights, LayerFacts, LayerWeights, MoESite

RouterRule = Literal["representative", "mean", "expert_map"]
Evidence = Mapping[str, Mapping[str, Tensor]]
ROUTER = "the cluster's router row: its representative's, the mean by use, or all rows stay and share the merged expert"


class Merging(Shrinking):
    """Merges clusters of experts into one expert each.

    router: what chooses a merged expert: the row of its representative, the weighted mean of the members' rows, or
    (`expert_map`) all rows as they are: ids share experts, weights of one token's ids that meet in an expert add up,
    the routing stays the original's, and only the native format can say it.
    Super experts are merged with nobody.
    """

    expensive: ClassVar[bool] = True

    router: RouterRule = Field("representative", description=ROUTER)
    align: bool = Field(True, description="bring the members' neurons into the representative's order before averaging")

    @property
    def sharing(self) -> bool:
        return self.router == "expert_map"

    @abstractmethod
    def labels(self, evidence: Evidence, members: Sequence[int], count: int) -> Tensor:
        """int64 [len(members)]: which of `count` clusters each of these experts belongs to."""

    def needs(self) -> tuple[Statistic, ...]:
        protected = (ExpertActivity(),) if self.protect else ()
        return (RoutingCounts(), CoActivation(), *protected)

    def decide(self, context: Any) -> Decision:
        """kept: representatives, ascending. clusters: representative -> its cluster's experts. weights: of every expert
        in its cluster's mean. layer: pairs, how many pairs of one cluster's experts a token chooses on average."""
        site = context.layer.site
        if site is None:
            return Decision({})
        count, first = self.count_in(context.facts, context.layer), context.facts.moe_layers[0].index
        return Decision(self.decide_layer(site, context.statistics, count, first == context.weights.index))

    def decide_layer(self, site: MoESite, evidence: Evidence, count: int, first: bool = False) -> dict[str, Any]:
        """The decision of one layer from its statistics. first: whether it is the model's first with experts."""
        safe = super_experts(evidence) if self.protect else []
        runs = self.runs(site)
        labels = torch.full((site.num_experts,), -1)
        for run in range(runs):
            size, each = site.num_experts // runs, count // runs
            experts = range(run * size, (run + 1) * size)
            self._label_run(evidence, list(experts), each, [i for i in safe if i in experts], labels)
        return self._decided(evidence, labels, safe)

    def _decided(self, evidence: Evidence, labels: Tensor, safe: Sequence[int]) -> dict[str, Any]:
        """labels: int64 [E], the cluster of every expert; -1 = it goes without being merged."""
        use = evidence["routing_counts"]["tokens"].double()
        clusters = {}
        for label in range(int(labels.max()) + 1):
            members = (labels == label).nonzero().flatten().tolist()
            clusters[max(members, key=lambda i: (float(use[i]), -i))] = members
        weights = shares(use, labels)
        return {
            "kept": sorted(clusters),
            "clusters": {str(head): clusters[head] for head in sorted(clusters)},
            "weights": weights.tolist(),
            "experts": _notes(clusters, use, safe),
            "layer": {"pairs": _pairs(evidence, labels)},
        }

    def _label_run(self, evidence: Evidence, experts: list[int], count: int, safe: list[int], labels: Tensor) -> None:
        """Number the clusters of one run of experts in `labels`, after those that are there."""
        if count == len(experts):
            safe = experts
        safe = safe[: max(0, count - 1)] if count < len(experts) else safe
        others, start = [i for i in experts if i not in safe], int(labels.max()) + 1
        for number, expert in enumerate(safe):
            labels[expert] = start + number
        if others:
            found = self.labels(evidence, others, count - len(safe))
            labels[torch.tensor(others)] = torch.where(found < 0, found, found + start + len(safe))

    def apply(self, context: LayerContext, decision: Decision) -> LayerWeights:
        site, weights = context.layer.site, context.weights
        if site is None:
            return weights
        data = decision.of_layer(weights.index)
        if len(data["kept"]) == site.num_experts:
            return weights
        clusters = {int(head): members for head, members in data["clusters"].items()}
        merged = tuple(self._merged(site, weights, head, clusters[head], data["weights"]) for head in data["kept"])
        if self.sharing:
            place = {expert: at for at, head in enumerate(data["kept"]) for expert in clusters[head]}
            sources = tuple(weights.source_ids[head] for head in data["kept"])
            slots = tuple(place[expert] for expert in range(site.num_experts))
            return replace(weights, experts=merged, sources=sources, slots=slots)
        known = stands_for(weights)
        theirs = (sorted(number for i in clusters[head] for number in known[i]) for head in data["kept"])
        made = replace(
            keep_experts(context.layer, weights, data["kept"]), experts=merged, merged=tuple(map(tuple, theirs))
        )
        if self.router == "mean":
            made = made.with_tensors(_mean_rows(context.layer, weights, clusters, data))
        return made

    def _reshaped(self, layer: LayerFacts, count: int) -> LayerFacts:
        made = super()._reshaped(layer, count)
        if made is layer or made.site is None or self.sharing:
            return made
        return replace(made, site=replace(made.site, merged=True))

    def _merged(
        self, site: MoESite, weights: LayerWeights, head: int, members: Sequence[int], shares_: Sequence[float]
    ) -> ExpertWeights:
        if len(members) == 1:
            return weights.experts[head]
        found = [neurons_of(weights.experts[i], site.gated, site.concatenated) for i in members]
        made = average(found, [shares_[i] for i in members], members.index(head), self.align)
        expert = expert_of(made, weights.experts[head], site.gated, site.concatenated)
        biases = [weights.experts[i].down_bias for i in members]
        if any(bias is None for bias in biases):
            return expert
        total = sum(bias.double() * shares_[i] for bias, i in zip(biases, members, strict=True) if bias is not None)
        return replace(expert, down_bias=torch.as_tensor(total).float())


def router_similarity(evidence: Evidence, members: Sequence[int], centred: bool = False) -> Tensor:
    """Cosine of the router logits of these experts over all tokens, [n, n]. Raises UnsupportedModel without logits."""
    if not int(evidence["router_gram"]["tokens"]):
        found = "the router gives no logit per expert"
        raise UnsupportedModel(message("merging by router logits", found, then="use merge.hc_smoe"))
    index = torch.tensor(list(members))
    return cosine_from_gram(evidence["router_gram"]["gram"], centred)[index][:, index]


def _mean_rows(
    layer: LayerFacts, weights: LayerWeights, clusters: Mapping[int, Sequence[int]], data: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Router tensors with one weighted mean per cluster; rows after those of the experts stay."""
    rows: dict[str, Tensor] = {}
    mixing = torch.zeros(len(data["kept"]), len(weights.experts), dtype=torch.float64)
    for place, head in enumerate(data["kept"]):
        for expert in clusters[head]:
            mixing[place, expert] = data["weights"][expert]
    for name, dim in layer.expert_dims.items():
        value = weights.tensors[name]
        assert isinstance(value, Tensor)
        moved = value.double().movedim(dim, 0)
        count = len(weights.experts)
        mean = torch.tensordot(mixing, moved[:count], 1)
        rows[name] = torch.cat([mean, moved[count:]]).movedim(0, dim).float()
    return rows


def _notes(clusters: Mapping[int, Sequence[int]], use: Tensor, safe: Sequence[int]) -> dict[str, dict[str, Any]]:
    notes: dict[str, dict[str, Any]] = {
        str(i): {"importance": float(value), "action": "pruned"} for i, value in enumerate(use)
    }
    for head, members in clusters.items():
        del notes[str(head)]["action"]
        if head in safe:
            notes[str(head)]["protected"] = "super expert"
        for expert in members:
            if expert != head:
                notes[str(expert)]["action"] = f"merged into {head}"
    return notes


def _pairs(evidence: Evidence, labels: Tensor) -> float:
    together = (labels[:, None] == labels[None, :]) & (labels[:, None] >= 0)
    pairs = evidence["co_activation"]["pairs"].double().triu(1)
    return float((pairs * together).sum() / evidence["routing_counts"]["total"].clamp_min(1))
