"""On every family: the order of experts does not matter, and copies of experts merge without loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine
import families
import pytest
import torch
from torch import Tensor

from moecompress.arch.quirks import NO_RESIDUAL
from moecompress.experts import Experts
from moecompress.numerics.neurons import expert_of, linear_in_up, neurons_of
from moecompress.passes.base import Decision
from moecompress.passes.merge_dern import MergeDERN
from moecompress.passes.merge_uncurl import MergeUncurl
from moecompress.stats.experts import ExpertActivity, TokenContributions
from moecompress.stats.similarity import CoActivation, MeanOutputs, RouterGram
from moecompress.stream.collect import Collector
from moecompress.stream.layers import experts_of, filled_layer
from moecompress.stream.model import StreamModel, open_model
from moecompress.stream.streams import run_layer
from moecompress.types import ExpertWeights, LayerFacts, LayerWeights

IDS = engine.random_ids(3, 16)
STATISTICS = (ExpertActivity(), CoActivation(), RouterGram(), MeanOutputs())
SCORES = (("expert_activity", "powers"), ("expert_activity", "max_output"), ("mean_outputs", "mean"))
KEPT = [0, 2, 3, 4, 5, 6, 7]


def last_layer(model_type: str, folder: Path) -> tuple[StreamModel, LayerFacts, LayerWeights]:
    model = open_model(families.save_tiny(model_type, folder / "model", torch.float32))
    facts = model.facts.moe_layers[-1]
    return model, facts, model.read_layer(facts.index)


def reordered(facts: LayerFacts, weights: LayerWeights, order: Sequence[int]) -> LayerWeights:
    """Expert i is expert order[i], with its row of the router."""
    changed: dict[str, Any] = {}
    for name, dim in facts.expert_dims.items():
        value = weights.tensors[name]
        assert isinstance(value, Tensor)
        changed[name] = value.index_select(dim, torch.tensor([*order, *range(len(order), value.shape[dim])]))
    return weights.with_tensors(changed).with_experts(tuple(weights.experts[i] for i in order))


@pytest.mark.parametrize("model_type", engine.STREAMED)
def test_the_order_of_experts_does_not_matter(model_type: str, tmp_path: Path) -> None:
    """Within the groups of a router: another order, the same function, and statistics in that order."""
    model, facts, weights = last_layer(model_type, tmp_path)
    run = engine.token_run(model, IDS, tmp_path, streams=("original", "compressed"))
    for index in range(facts.index):
        for stream in ("original", "compressed"):
            run_layer(model, model.read_layer(index), run, stream)
    order = [3, 1, 0, 2, 6, 7, 5, 4]  # two groups of four, where there are groups
    judged = [] if model_type in NO_RESIDUAL else [TokenContributions()]
    pair = [Collector(facts.site, (*STATISTICS, *judged)) for _ in range(2)]
    run_layer(model, weights, run, "original", collector=pair[0])
    run_layer(model, reordered(facts, weights, order), run, "compressed", collector=pair[1])
    outputs = [run.store(stream, facts.index + 1).read(0, 3) for stream in ("original", "compressed")]
    assert engine.difference(outputs[1], outputs[0]) < 1e-5
    first, second = (collector.finished() for collector in pair)
    for name, key in (*SCORES, *[("token_contributions", "score")] * len(judged)):
        torch.testing.assert_close(second[name][key], first[name][key][order], rtol=1e-4, atol=1e-5)
    for name, key in (("router_gram", "gram"), ("co_activation", "pairs")):
        torch.testing.assert_close(second[name][key], first[name][key][order][:, order], rtol=1e-4, atol=1e-4)
    slots = first["co_activation"]["pairs"].diagonal()
    assert torch.equal(slots.double(), first["expert_activity"]["powers"][:, 0, 0])


def twin(facts: LayerFacts, experts: Experts, expert: ExpertWeights) -> ExpertWeights:
    """The same function by other weights: neurons in another order, scaled and turned where that is free."""
    site = facts.site
    assert site is not None
    neurons = neurons_of(expert, site.gated, site.concatenated)
    if linear_in_up(experts.activate, site.gated, site.concatenated):
        neurons = neurons.scaled(torch.tensor([1.0, -2.0, 0.5, -1.0]).repeat(site.width)[: site.width])
    order = torch.randperm(site.width, generator=torch.Generator().manual_seed(3))
    return expert_of(neurons.take(order), expert, site.gated, site.concatenated)


@pytest.mark.parametrize("model_type", engine.STREAMED)
def test_copies_merge_without_loss(model_type: str, tmp_path: Path) -> None:
    """Expert 1 is a permuted copy of expert 0: averaged after alignment, or its neurons moved, 0 stays as it is."""
    model, facts, weights = last_layer(model_type, tmp_path)
    site = facts.site
    assert site is not None
    inputs = torch.randn(30, site.hidden, generator=torch.Generator().manual_seed(0))
    with filled_layer(model, weights) as layer, torch.no_grad():
        experts = experts_of(layer, site.experts)
        wanted = experts.run_expert(weights.experts[0], inputs)[1]
        copy = twin(facts, experts, weights.experts[0])
        torch.testing.assert_close(experts.run_expert(copy, inputs)[1], wanted, rtol=1e-3, atol=1e-4)
        plain = neurons_of(weights.experts[0], site.gated, site.concatenated)
        order = torch.randperm(site.width, generator=torch.Generator().manual_seed(4))
        permuted = expert_of(plain.take(order), weights.experts[0], site.gated, site.concatenated)
        single = {str(i): [i] for i in KEPT[1:]}
        data = {"kept": KEPT, "clusters": {"0": [0, 1], **single}, "weights": [0.3, 0.7, *[1.0] * 6]}
        planted = weights.with_experts((weights.experts[0], permuted, *weights.experts[2:]))
        context: Any = SimpleNamespace(layer=facts, weights=planted, activate=experts.activate)
        for router in ("representative", "expert_map"):
            made = MergeUncurl(router=router).apply(context, Decision(data))
            found = experts.run_expert(made.experts[0], inputs)[1]
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
            assert made.experts[1] is weights.experts[2]
        assert made.slots == (0, 0, 1, 2, 3, 4, 5, 6) and made.choices == 8
        planted = weights.with_experts((weights.experts[0], copy, *weights.experts[2:]))
        context = replace_weights(context, planted)
        notes = {str(i): {"importance": 1.0 + i} for i in range(8)}
        decision = Decision({"kept": KEPT, "empty": [], "experts": notes, "merge": True})
        made = MergeDERN(threshold=0.9).apply(context, decision)
        found = experts.run_expert(made.experts[0], inputs)[1]
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
        assert made.experts[1] is weights.experts[2]  # nothing moved there


@pytest.mark.parametrize("model_type", engine.STREAMED)
def test_the_order_of_neurons_does_not_matter_to_a_merge(model_type: str, tmp_path: Path) -> None:
    """Two experts with little in common become one expert, in whatever order the second one's neurons come."""
    model, facts, weights = last_layer(model_type, tmp_path)
    site = facts.site
    assert site is not None
    inputs = torch.randn(30, site.hidden, generator=torch.Generator().manual_seed(0))
    clusters = {"2": [2, 3], **{str(i): [i] for i in range(8) if i not in (2, 3)}}
    data = {"kept": [0, 1, 2, 4, 5, 6, 7], "clusters": clusters, "weights": [1.0, 1.0, 0.6, 0.4, *[1.0] * 4]}
    order = torch.randperm(site.width, generator=torch.Generator().manual_seed(5))
    neurons = neurons_of(weights.experts[3], site.gated, site.concatenated).take(order)
    other = expert_of(neurons, weights.experts[3], site.gated, site.concatenated)
    outputs = []
    with filled_layer(model, weights) as layer, torch.no_grad():
        experts = experts_of(layer, site.experts)
        for third in (weights.experts[3], other):
            given = weights.with_experts((*weights.experts[:3], third, *weights.experts[4:]))
            context: Any = SimpleNamespace(layer=facts, weights=given, activate=experts.activate)
            made = MergeUncurl().apply(context, Decision(data)).experts[2]
            outputs.append(experts.run_expert(made, inputs)[1])
        head = experts.run_expert(weights.experts[2], inputs)[1]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-3, atol=1e-4)
    assert engine.difference(outputs[0], head) > 0.05  # they did merge


def replace_weights(context: Any, weights: LayerWeights) -> Any:
    return SimpleNamespace(**{**vars(context), "weights": weights})
