"""What every pass that removes experts shares: which stay, in each layer or over all layers.

A method only gives a score per expert; the highest stay. Scores come from the unpruned model: all layers are judged on
the original stream.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from moecompress.arch.surgery import keep_experts, padding_problem, without_experts
from moecompress.passes.base import Decision, LayerContext, ModelContext, Scope
from moecompress.passes.shrinking import Shrinking, chosen, least_in_group, super_experts
from moecompress.stats.base import Statistic
from moecompress.stats.experts import ExpertActivity
from moecompress.types import LayerFacts, LayerWeights, ModelFacts, MoESite


class Pruning(Shrinking):
    """Keep the best experts: the same number in each layer, or the best of the model.

    uneven_layers: `pad` gives every layer as many experts as the one that keeps most (a plain checkpoint; all of them
    with `counts: global`), where the router has a bias that shuts the empty ones out exactly. `uniformize` keeps the
    rounded mean in every layer instead.
    counts: `global` ranks all experts of the model by their share of their layer's scores, so that layers keep
    different numbers, `keep` of them on average; every layer keeps enough for its router. (2504.06792, F.4: worse than
    equal numbers for EASY-EP. Needs the native format.)
    """

    takes_turned: ClassVar[bool] = True

    counts: Literal["uniform", "global"] = Field(
        "uniform", description="the same number of experts in every layer, or the best of the model"
    )

    uneven_layers: Literal["native", "pad", "uniformize"] = Field(
        "native",
        description="layers with different numbers of experts: native format; empty experts up to the largest number, "
        "which a bias keeps the router from choosing; or all get the mean",
    )

    @abstractmethod
    def scores(self, context: LayerContext) -> Tensor:
        """float64 [E], finite: the higher, the more worth keeping."""

    @property
    def scope(self) -> Scope:  # type: ignore[override]
        return Scope.MODEL if self.ranks_model else Scope.LAYER

    @property
    def ranks_model(self) -> bool:
        """Whether experts of all layers compete."""
        return self.counts == "global" and self.uneven_layers != "uniformize"

    @property
    def uneven(self) -> bool:
        return self.ranks_model and self.uneven_layers == "native"

    def needs(self) -> tuple[Statistic, ...]:
        return (ExpertActivity(),)

    def check(self, facts: ModelFacts) -> list[str]:
        problems = super().check(facts)
        if self.uneven_layers == "pad":
            problems += [text for layer in facts.moe_layers if (text := padding_problem(facts, layer))][:1]
        if self.counts == "global" and isinstance(self.keep, tuple):
            problems.append("counts: global with a list in keep: give the mean, or set counts: uniform")
        elif self.ranks_model and not problems:
            sites = [layer.site for layer in facts.moe_layers if layer.site is not None]
            problems += self.uneven_problems(sites[0], min(self.layer_counts(facts).values()))
        return problems

    def decide(self, context: Any) -> Decision:
        """kept: numbers of the experts that stay; empty: those of them of which only the place stays. experts:
        importance, and what became of the others. By layer under `layers` for `counts: global`."""
        if isinstance(context, ModelContext):
            return self._decide_model(context)
        if context.layer.site is None:
            return Decision({})
        count = self.count_in(context.facts, context.layer)
        total = self._padded(context.facts) if self.uneven_layers == "pad" else count
        return Decision(_layer_decision(self._ranking(context), count, total, self.runs(context.layer.site)))

    def _ranking(self, context: LayerContext) -> dict[str, Tensor]:
        """score, tie-breaking use, and place among the protected (E = not protected), each float64 [E]."""
        scores = self.scores(context).double()
        activity = context.statistics.get("expert_activity")
        seen = torch.zeros_like(scores) if activity is None else activity["probability"].double()
        first = torch.full_like(scores, len(scores))
        for rank, expert in enumerate(super_experts(context.statistics) if self.protect else []):
            first[expert] = rank
        return {"first": first, "score": scores, "seen": seen}

    def measure(self, context: LayerContext) -> Mapping[str, Mapping[str, Tensor]]:
        return {"ranking": self._ranking(context)}

    def _decide_model(self, context: ModelContext) -> Decision:
        rankings = {index: found["ranking"] for index, found in context.statistics.items()}
        expected = self.layer_counts(context.facts)
        sites = {layer.index: layer.site for layer in context.facts.moe_layers if layer.site is not None}
        counts = self._global_counts(rankings, sites, expected)
        layers = {
            str(index): _layer_decision(
                ranking,
                counts[index],
                self._padded(context.facts) if self.uneven_layers == "pad" else counts[index],
                self.runs(sites[index]),
            )
            for index, ranking in rankings.items()
        }
        return Decision({"layers": layers})

    def _global_counts(
        self, rankings: Mapping[int, Mapping[str, Tensor]], sites: Mapping[int, MoESite], expected: Mapping[int, int]
    ) -> dict[int, int]:
        """Layer -> experts that stay: the least it needs, then the best of the model, a run of groups at a time."""
        counts, offers = {}, []
        for index, ranking in rankings.items():
            runs, experts = self.runs(sites[index]), sites[index].num_experts
            if expected[index] == experts:
                counts[index] = experts
                continue
            order, least = _order(ranking), sites[index].top_k
            if runs > 1:
                least = max(least, runs * least_in_group(sites[index], experts))
            protected = int((ranking["first"] < experts).sum())
            counts[index] = min(experts, max(least, -(-protected // runs) * runs))
            share = ranking["score"] / ranking["score"].sum().clamp_min(torch.finfo(torch.float64).tiny)
            for count in range(counts[index] + runs, experts + 1, runs):
                gained = set(chosen(order, count, runs)) - set(chosen(order, count - runs, runs))
                offers.append((-sum(float(share[expert]) for expert in gained), index, runs))
        for _, index, runs in sorted(offers):
            if sum(counts.values()) + runs <= sum(expected.values()):
                counts[index] += runs
        return counts

    def count_in(self, facts: ModelFacts, layer: LayerFacts) -> int:
        if self.uneven_layers != "uniformize" or not isinstance(self.keep, tuple) or layer.site is None:
            return super().count_in(facts, layer)
        counts = [super(Pruning, self).count_in(facts, other) for other in facts.moe_layers]
        run = self.runs(layer.site)
        return max(1, round(sum(counts) / len(counts) / run)) * run

    def reshape(self, facts: ModelFacts) -> ModelFacts:
        if self.uneven_layers != "pad":
            return super().reshape(facts)
        count = self._padded(facts)
        return replace(facts, layers=tuple(self._reshaped(layer, count) for layer in facts.layers))

    def _padded(self, facts: ModelFacts) -> int:
        """How many experts every layer has with the empty ones."""
        sites = [layer.site for layer in facts.moe_layers if layer.site is not None]
        return sites[0].num_experts if self.ranks_model else max(self.layer_counts(facts).values())

    def apply(self, context: LayerContext, decision: Decision) -> LayerWeights:
        site = context.layer.site
        if site is None:
            return context.weights
        data = decision.of_layer(context.weights.index)
        made = keep_experts(context.layer, context.weights, data["kept"])
        return without_experts(context.layer, made, [data["kept"].index(expert) for expert in data["empty"]])


def _order(ranking: Mapping[str, Tensor]) -> list[int]:
    """Experts, the most worth keeping first: protected ones, then by score, use and number."""
    first, scores, seen = (ranking[key].tolist() for key in ("first", "score", "seen"))
    return sorted(range(len(scores)), key=lambda i: (first[i], -scores[i], -seen[i], i))


def _layer_decision(ranking: Mapping[str, Tensor], count: int, total: int, runs: int) -> dict[str, Any]:
    """count: experts that stay; total: with the empty ones, which stand in the places of the next best."""
    order, scores = _order(ranking), ranking["score"].tolist()
    kept, places = chosen(order, count, runs), chosen(order, total, runs)
    notes: dict[str, dict[str, Any]] = {str(i): {"importance": score} for i, score in enumerate(scores)}
    for expert in sorted(set(order) - set(kept)):
        notes[str(expert)]["action"] = "pruned"
    for expert in kept:
        if ranking["first"][expert] < len(scores):
            notes[str(expert)]["protected"] = "super expert"
    return {"kept": places, "empty": sorted(set(places) - set(kept)), "experts": notes}


def activity_score(statistics: Mapping[str, Mapping[str, Tensor]], b: float, alpha: int, beta: int) -> Tensor:
    """S(b, alpha, beta): sum of g^alpha |E|^beta over an expert's tokens, over count^b (0 without any)"""
    powers = statistics["expert_activity"]["powers"]
    count = powers[:, 0, 0]
    return torch.where(count > 0, powers[:, alpha, beta] / count.clamp_min(1) ** b, 0.0)
