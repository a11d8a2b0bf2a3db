"""A pruned model computes what the original does with the removed experts masked, in every family."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import engine
import families
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from moecompress.arch.quirks import shape_names
from moecompress.arch.surgery import keep_experts
from moecompress.errors import UnsupportedModel
from moecompress.passes.prune_random import PruneRandom
from moecompress.stream.collect import Collector
from moecompress.stream.model import StreamModel, open_model
from moecompress.stream.resize import with_resized
from moecompress.stream.skeleton import load_config
from moecompress.stream.streams import final_logits, run_layer
from moecompress.types import LayerWeights

KEPT, DROPPED = [0, 1, 3, 4, 6, 7], [2, 5]  # of 8 experts; in two groups of four, three stay in each
# deepseek_v4 has layers that stay whole because they look experts up by token id: tests/passes/test_uneven.py
PRUNED = [name for name in engine.STREAMED if name != "deepseek_v4"]
#: counts that a family's own configuration does not know as a layer of experts
REFUSED = {("dots3_note_text", 1): "two experts per group", ("jamba", 1): "no routed experts"}
STEP = PruneRandom(keep=6, protect=())
IDS = engine.random_ids(3, 16)


def masked(model: StreamModel, weights: LayerWeights) -> LayerWeights:
    """The layer with the removed experts' biases at minus infinity (a logit at minus infinity is not enough there)."""
    changed: dict[str, Tensor] = {}
    for name, dim in model.facts.layers[weights.index].expert_dims.items():
        value = weights.tensors[name]
        if "bias" in name and isinstance(value, Tensor):
            changed[name] = value.index_fill(dim, torch.tensor(DROPPED), -torch.inf)
    return weights.with_tensors(changed)


@contextmanager
def exact_routers(model: StreamModel, *layers: LayerWeights, hidden: Sequence[int] = ()) -> Iterator[list[int]]:
    """Within the context the routers of these layers multiply and normalise in float64 and round once, so that how many
    numbers there are does not show in the last bit; the product is minus infinity for `hidden` experts. Counts the
    products."""
    names = [name for name in model.facts.layers[layers[0].index].expert_dims if name.endswith("weight")]
    routers = {weights.tensors[name].data_ptr() for weights in layers for name in names}  # type: ignore[union-attr]
    found: list[int] = []

    def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None, real: Any = functional.linear) -> Tensor:
        if weight.data_ptr() not in routers:
            return real(inputs, weight, bias)  # type: ignore[no-any-return]
        found.append(1)
        out = real(inputs.double(), weight.double(), None if bias is None else bias.double())
        return out.index_fill(-1, torch.tensor(hidden, dtype=torch.int64), -torch.inf).to(inputs.dtype)  # type: ignore[no-any-return]

    def softmax(values: Tensor, *args: Any, real: Any = torch.softmax, **options: Any) -> Tensor:
        dtype = options.pop("dtype", None) or values.dtype
        return real(values.double(), *args, **options).to(dtype)  # type: ignore[no-any-return]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "linear", linear)
        for owner in (torch, functional, torch.Tensor):
            patch.setattr(owner, "softmax", softmax)
        yield found


@pytest.mark.parametrize("model_type", PRUNED)
def test_pruned_is_masked_bit_for_bit(model_type: str, tmp_path: Path) -> None:
    """Sums over 6 and over 8 numbers round differently in float32; with the routers' sums in float64 all is equal."""
    source = open_model(families.save_tiny(model_type, tmp_path / "model", torch.float32))
    assert STEP.check(source.facts) == []
    model = with_resized(source, STEP.reshape(source.facts))
    run = engine.token_run(model, IDS, tmp_path, streams=("original", "compressed"))
    for index, facts in enumerate(model.facts.layers):
        whole = masked(model, model.read_layer(index))
        few = model.read_layer(index)
        logs = [None if facts.site is None else Collector(facts.site, (), (), range(3)) for _ in range(2)]
        with exact_routers(model, whole, hidden=DROPPED) as products:
            run_layer(model, whole, run, "original", collector=logs[0])
        if facts.site is not None:
            assert products, "the mask was not applied"
            assert keep_experts(facts, few, range(8)) is few
            before, few = few.tensors, keep_experts(facts, few, KEPT)
            assert {name for name, value in few.tensors.items() if value is not before[name]} == set(facts.expert_dims)
        with exact_routers(model, few):
            run_layer(model, few, run, "compressed", collector=logs[1])
        if logs[0] is not None and logs[1] is not None:
            chosen, numbers = logs[0].log.joined()[1], torch.tensor(KEPT)[logs[1].log.joined()[1]]
            assert not set(chosen.flatten().tolist()) & set(DROPPED)
            assert torch.equal(chosen.sort(-1).values, numbers.sort(-1).values)
    for (_, wanted), (_, found) in zip(
        final_logits(model, run, "original"), final_logits(model, run, "compressed"), strict=True
    ):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("model_type", PRUNED)
def test_config_json_says_other_counts_in_every_spelling(model_type: str, tmp_path: Path) -> None:
    """Three experts of which a token uses two, without groups; then one, of which it uses one."""
    source = open_model(families.save_tiny(model_type, tmp_path))
    site = source.facts.moe_layers[0].site
    assert site is not None
    for count, used in ((3, 2), (1, 1)):
        step = PruneRandom(keep=count, protect=(), top_k="lower", group_policy="ungroup")
        refused = PruneRandom(keep=count, protect=(), group_policy="ungroup").check(source.facts)
        assert step.check(source.facts) == [] and bool(refused) == (count < site.top_k)
        if (model_type, count) in REFUSED:
            with pytest.raises(UnsupportedModel, match=REFUSED[model_type, count]):
                with_resized(source, step.reshape(source.facts))
            continue
        made = with_resized(source, step.reshape(source.facts)).resized[count]
        (tmp_path / "config.json").write_text(json.dumps(made.raw_config))
        config = load_config(tmp_path)
        before = shape_names(source.config.get_text_config(), 8, 2, site.width)
        after = shape_names(config.get_text_config(), count, used, site.width)
        assert before["experts"] and before["top_k"]
        assert all(set(before[key]) <= set(after[key]) for key in ("experts", "top_k"))
        assert all(getattr(config.get_text_config(), name) == 1 for name in before["groups"] + before["top_groups"])


def test_only_experts_and_their_router_entries_change(tmp_path: Path) -> None:
    model = open_model(families.save_tiny("deepseek_v3", tmp_path, torch.float32))
    facts, before = model.facts.layers[1], model.read_layer(1)
    after = keep_experts(facts, before, KEPT)
    assert after.sources == tuple(KEPT) and all(after.experts[i] is before.experts[k] for i, k in enumerate(KEPT))
    changed = {name for name, value in after.tensors.items() if value is not before.tensors[name]}
    assert changed == {"mlp.gate.weight", "mlp.gate.e_score_correction_bias"}
    for name in changed:
        assert torch.equal(after.tensors[name], before.tensors[name][torch.tensor(KEPT)])  # type: ignore[arg-type,index]
    site = replace(facts.site, num_experts=6)  # type: ignore[type-var]
    again = keep_experts(replace(facts, site=site), after, [0, 2, 5])
    assert again.sources == (0, 3, 7) and keep_experts(facts, before, range(8)) is before


@pytest.mark.parametrize("kept", [[], [0, 8], [3, 1], [2, 2], [-1, 3]])
def test_impossible_choices_are_refused(kept: list[int], tmp_path: Path) -> None:
    model = open_model(families.save_tiny("qwen3_moe", tmp_path))
    with pytest.raises(ValueError, match="experts to keep"):
        keep_experts(model.facts.layers[0], model.read_layer(0), kept)
