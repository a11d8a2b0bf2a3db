"""merge.dern: the least used experts go, and those of their neurons that fit live on in the others (DERN)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from moecompress.numerics.block import routed
from moecompress.numerics.neurons import Neurons, expert_of, joined, linear_in_up, neurons_of
from moecompress.numerics.segments import Rule, balanced, destinations, rebuilt
from moecompress.passes.base import Decision, Forward, LayerContext
from moecompress.passes.pruning import Pruning, activity_score
from moecompress.stats.base import Statistic
from moecompress.stats.routing import TokenSample
from moecompress.types import ExpertWeights, LayerWeights

SAMPLE = 512  # tokens on which the layer's output is compared with plain pruning


class MergeDERN(Pruning):
    """Experts with the smallest sums of routing weights go. Each of their neurons moves to the retained expert with the
    most similar neuron when the similarity is over `threshold`; every expert is then compressed back to its width by
    spherical k-means (2509.10377; equations after two public implementations). Nothing moves between experts that
    have little in common: `transferred_fraction` 0 in the report means plain pruning.

    Ours: k-means starts from the expert's own neurons, so that a removed copy changes nothing; scale and sign between
    up and down are taken out before neurons are compared; a layer whose output on calibration tokens comes out worse
    than by pruning alone is only pruned (`guard`).
    """

    name: ClassVar[str] = "merge.dern"
    paper: ClassVar[str] = "2509.10377"
    expensive: ClassVar[bool] = True

    counts: Literal["uniform"] = Field("uniform", description="the same number of experts in every layer")
    retain: Literal["gate", "reap"] = Field(
        "gate", description="what stays: the largest sums of routing weights (paper), or REAP's mean weighted outputs"
    )
    threshold: float = Field(0.6, ge=-1, le=1, description="similarity above which a neuron moves")
    gate_weight: float = Field(0.0, ge=0, description="share of the gate rows' cosine in the similarity")
    up_weight: float = Field(0.5, ge=0, description="share of the up rows' cosine")
    down_weight: float = Field(0.5, gt=0, description="share of the down columns' cosine")
    init: Literal["retained", "gate_max"] = Field(
        "retained", description="k-means starts: the expert's own neurons, or the largest gate rows (paper)"
    )
    canonicalise: bool = Field(True, description="undo scales and signs between up and down before comparing")
    router_update: Literal["none", "rows"] = Field(
        "none", description="rows: add to a router row those of the removed experts by the share of neurons taken over"
    )
    guard: bool = Field(True, description="only prune a layer whose output would come out worse")

    def scores(self, context: LayerContext) -> Tensor:
        return activity_score(context.statistics, *((0, 1, 0) if self.retain == "gate" else (1, 1, 1)))

    def needs(self) -> tuple[Statistic, ...]:
        return (*super().needs(), *([TokenSample(SAMPLE)] if self.guard else []))

    def decide(self, context: Any) -> Decision:
        return self.process(context)[0]

    def process(self, context: LayerContext) -> tuple[Decision, LayerWeights]:
        decision = super().decide(context)
        pruned = super().apply(context, decision)
        if context.layer.site is None:
            return decision, pruned
        moves = _moves(self, context, decision)
        said: dict[str, Any] = {"transferred_fraction": moves.fraction}
        made = self._merged(context, moves, pruned) if moves.fraction > 0 else pruned
        if made is not pruned and self.guard:
            said["error_pruned"], said["error_merged"] = (_error(context, layer) for layer in (pruned, made))
            made = made if said["error_merged"] <= said["error_pruned"] else pruned
        merge = made is not pruned
        return Decision({**decision.data, "merge": merge, "layer": {**said, "plain_pruning": not merge}}), made

    def apply(self, context: LayerContext, decision: Decision) -> LayerWeights:
        pruned = super().apply(context, decision)
        if context.layer.site is None or not decision.data["merge"]:
            return pruned
        return self._merged(context, _moves(self, context, decision), pruned)

    def _merged(self, context: LayerContext, moves: _Moves, pruned: LayerWeights) -> LayerWeights:
        site = context.layer.site
        assert site is not None
        experts = list(pruned.experts)
        for place, number in enumerate(moves.kept):
            taken = moves.taken(place)
            if any(len(index) for _, index in taken):
                moved = joined([moves.neurons[expert].take(index) for expert, index in taken])
                weights = torch.cat([torch.full((len(index),), moves.importance[expert]) for expert, index in taken])
                made = rebuilt(moves.neurons[number], moved, moves.importance[number], weights, moves.rule)
                experts[place] = expert_of(made, experts[place], site.gated, site.concatenated)
        made_layer = pruned.with_experts(tuple(experts))
        return made_layer if self.router_update == "none" else _with_rows(context, moves, made_layer)


@dataclass(frozen=True)
class _Moves:
    """Where the neurons of one layer's removed experts go.

    neurons: of every expert, comparable. found: per removed expert the place of the retained one for each of its
    neurons, and the similarity. importance: of every expert.
    """

    neurons: Sequence[Neurons]
    kept: Sequence[int]
    dropped: Sequence[int]
    found: Sequence[tuple[Tensor, Tensor]]
    importance: Sequence[float]
    rule: Rule

    @property
    def fraction(self) -> float:
        """Share of the removed experts' neurons that move."""
        if not self.found:
            return 0.0
        return float(torch.cat([alike > self.rule.threshold for _, alike in self.found]).double().mean())

    def taken(self, place: int) -> list[tuple[int, Tensor]]:
        """(removed expert, its neurons) that move to the retained expert at `place`."""
        return [
            (expert, ((goal == place) & (alike > self.rule.threshold)).nonzero().flatten())
            for expert, (goal, alike) in zip(self.dropped, self.found, strict=True)
        ]


def _moves(step: MergeDERN, context: LayerContext, decision: Decision) -> _Moves:
    site = context.layer.site
    assert site is not None
    canonical = step.canonicalise and linear_in_up(context.activate, site.gated, site.concatenated)
    shares = (step.gate_weight, step.up_weight, step.down_weight)
    rule = Rule(step.threshold, *shares, canonical=canonical, init=step.init)
    neurons = [neurons_of(expert, site.gated, site.concatenated) for expert in context.weights.experts]
    if canonical:
        neurons = [balanced(one) for one in neurons]
    kept = list(decision.data["kept"])
    dropped = [i for i in range(len(neurons)) if i not in set(kept)]
    found = destinations([neurons[i] for i in dropped], [neurons[i] for i in kept], rule)
    importance = [decision.data["experts"][str(i)]["importance"] for i in range(len(neurons))]
    return _Moves(neurons, kept, dropped, found, importance, rule)


def _with_rows(context: LayerContext, moves: _Moves, layer: LayerWeights) -> LayerWeights:
    """Router rows of the retained experts plus those of the removed ones, by the share of neurons taken over."""
    changed = {}
    for name, dim in context.layer.expert_dims.items():
        before, after = context.weights.tensors[name], layer.tensors[name]
        if "bias" in name or not isinstance(before, Tensor) or not isinstance(after, Tensor):
            continue
        rows, source = after.float().movedim(dim, 0).clone(), before.float().movedim(dim, 0)
        for place in range(len(moves.kept)):
            for expert, index in moves.taken(place):
                rows[place] += len(index) / len(moves.neurons[expert].outputs) * source[expert]
        changed[name] = rows.movedim(0, dim)
    return layer.with_tensors(changed)


def _error(context: LayerContext, made: LayerWeights) -> float:
    """Relative squared error of the routed experts' output on a sample of tokens, which `made` routes itself."""
    wanted = _output(context.forward, context.weights.experts, context.statistics["token_sample"])
    sample = context.collect([TokenSample(SAMPLE)], made)["token_sample"]
    found = _output(context.forward, made.experts, sample)
    return float((found - wanted).double().square().sum() / wanted.double().square().sum().clamp_min(1e-30))


def _output(forward: Forward, experts: Sequence[ExpertWeights], sample: Mapping[str, Tensor]) -> Tensor:
    """What the routed experts make of the sampled tokens, float32 [n, H]."""
    hidden, weights = sample["hidden"].float(), sample["weights"].float()
    out = torch.zeros_like(hidden)
    for expert, rows, slots in routed(sample["ids"], len(experts)):
        out.index_add_(0, rows, forward(experts[expert], hidden[rows]) * weights[rows, slots][:, None])
    return out
