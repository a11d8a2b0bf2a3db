"""On every family: planted clusters are found, super experts stay, and keeping all experts changes nothing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine
import families
import pytest
import torch
from torch import Tensor

from moecompress.numerics.neurons import expert_of, neurons_of
from moecompress.passes.base import Pass
from moecompress.passes.merge_dern import MergeDERN
from moecompress.passes.merge_hc_smoe import MergeHCSMoE
from moecompress.passes.merge_m_smoe import MergeMSMoE
from moecompress.passes.merge_uncurl import MergeUncurl
from moecompress.passes.prune_ean import PruneEAN
from moecompress.passes.prune_easy_ep import PruneEasyEP
from moecompress.passes.prune_frequency import PruneFrequency
from moecompress.passes.prune_gate import PruneGate
from moecompress.passes.prune_random import PruneRandom
from moecompress.passes.prune_reap import PruneREAP
from moecompress.passes.prune_score import PruneScore
from moecompress.stats.base import Statistic
from moecompress.stats.experts import ExpertActivity, TokenContributions
from moecompress.stats.routing import RoutingCounts
from moecompress.stats.similarity import CoActivation, MeanOutputs, RouterGram
from moecompress.stream.collect import Collector
from moecompress.stream.layers import experts_of, filled_layer
from moecompress.stream.model import open_model
from moecompress.stream.streams import run_layer
from moecompress.types import LayerFacts, LayerWeights

IDS = engine.random_ids(3, 16)
PRUNING = (PruneFrequency, PruneGate, PruneEAN, PruneREAP, PruneScore, PruneRandom, PruneEasyEP)
MERGING = (MergeUncurl, MergeHCSMoE, MergeMSMoE)
#: pairs within the groups 0-3 and 4-7: routed alike, and with the same outputs
ROUTED, SAME = ((0, 2), (5, 6)), ((1, 3), (4, 7))


def planted(facts: LayerFacts, weights: LayerWeights) -> LayerWeights:
    """The second of a pair has the first's entries in the router, or its neurons in another order."""
    site, changed = facts.site, {}
    assert site is not None
    for name, dim in facts.expert_dims.items():
        value = weights.tensors[name]
        assert isinstance(value, Tensor)
        order = list(range(value.shape[dim]))
        for first, second in ROUTED:
            order[second] = first
        changed[name] = value.index_select(dim, torch.tensor(order))
    experts = list(weights.experts)
    for first, second in SAME:
        neurons = neurons_of(experts[first], site.gated, site.concatenated)
        shuffled = torch.randperm(site.width, generator=torch.Generator().manual_seed(second))
        experts[second] = expert_of(neurons.take(shuffled), experts[first], site.gated, site.concatenated)
    return weights.with_tensors(changed).with_experts(tuple(experts))


def pairs(step: Any, context: Any) -> list[tuple[int, ...]]:
    """Clusters of more than one expert."""
    return sorted(tuple(found) for found in step.decide(context).data["clusters"].values() if len(found) > 1)


@pytest.mark.parametrize("model_type", engine.STREAMED)
def test_plants_are_found_and_nothing_changes_without_removal(model_type: str, tmp_path: Path) -> None:
    model = open_model(families.save_tiny(model_type, tmp_path / "model", torch.float32))
    facts = model.facts.moe_layers[-1]
    weights, site = model.read_layer(facts.index), facts.site
    assert site is not None
    run = engine.token_run(model, IDS, tmp_path)
    engine.through_layers(model, run, facts.index)
    pruning = [step for step in PRUNING if not step().check(model.facts)]
    assert len(pruning) >= 6
    wanted: list[Statistic] = [ExpertActivity(), RoutingCounts(), CoActivation(), RouterGram(), MeanOutputs()]
    wanted += [TokenContributions()] * (PruneEasyEP in pruning)

    def at(layer: LayerWeights) -> Any:
        collector = Collector(site, wanted)
        run_layer(model, layer, run, "original", collector=collector, write=False)
        known = {"statistics": collector.finished(), "facts": model.facts, "layer": facts, "weights": layer}
        return SimpleNamespace(**known, generator=lambda: torch.Generator().manual_seed(0))

    both = planted(facts, weights)
    context = at(both)
    assert pairs(MergeUncurl(keep=6), context) == sorted(ROUTED)
    assert pairs(MergeHCSMoE(keep=6), context) == pairs(MergeHCSMoE(keep=6, router="mean"), context) == sorted(SAME)

    use = context.statistics["routing_counts"]["tokens"]
    rare = int(torch.where(use > 0, use, use.max() + 1).argmin())
    experts = list(both.experts)
    experts[rare] = experts[rare].with_projection("down", 1e4 * experts[rare].down)  # type: ignore[operator]
    context = at(both.with_experts(tuple(experts)))
    for step in pruning:
        data = step(keep=6).decide(context).data
        assert rare in data["kept"] and data["experts"][str(rare)]["protected"] == "super expert"
    for merge in MERGING:
        data = merge(keep=6).decide(context).data
        assert data["clusters"][str(rare)] == [rare]
        assert data["experts"][str(rare)]["protected"] == "super expert"

    whole: list[Pass] = [step(keep=1.0) for step in pruning]
    whole += [merge(keep=1.0, router=rule) for merge in MERGING for rule in ("representative", "mean", "expert_map")]
    for made in whole:
        assert made.apply(context, made.decide(context)) is context.weights
    with filled_layer(model, context.weights) as layer:
        context.activate = experts_of(layer, site.experts).activate
        decision, after = MergeDERN(keep=1.0).process(context)
    assert after is context.weights and decision.data["layer"] == {"transferred_fraction": 0.0, "plain_pruning": True}
