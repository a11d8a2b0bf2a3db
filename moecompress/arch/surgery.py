"""Change the number of routed experts: of a layer's facts and tensors, of a configuration, of empty modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moecompress.arch.quirks import router_names, shape_names
from moecompress.arch.sites import extra_rows
from moecompress.types import LayerFacts, LayerWeights, ModelFacts, MoESite, QuantizedTensor, Weight

_NEVER = -1e4  # a bias that loses against every score


def resized_facts(layer: LayerFacts, site: MoESite) -> LayerFacts:
    """The facts of a MoE layer once its site is `site`: shapes of router tensors follow the number of experts."""
    shapes, before = dict(layer.shapes), layer.site.choices if layer.site else 0
    for name, dim in layer.expert_dims.items():
        size = site.choices + shapes[name][dim] - before  # rows after those of the experts stay
        shapes[name] = (*shapes[name][:dim], size, *shapes[name][dim + 1 :])
    return replace(layer, site=site, shapes=shapes)


def keep_experts(layer: LayerFacts, weights: LayerWeights, kept: Sequence[int]) -> LayerWeights:
    """The layer with these of its experts, in this order: experts, router rows and correction biases.

    kept: numbers among the layer's present experts. Everything else stays the same object. Raises ValueError for
    numbers that are out of range or not ascending, and for a router that has codes.
    """
    if list(kept) != sorted(set(kept)) or not kept or not 0 <= kept[0] <= kept[-1] < len(weights.experts):
        raise ValueError(f"experts to keep: {list(kept)}; allowed: ascending numbers below {len(weights.experts)}")
    if len(kept) == len(weights.experts):
        return weights
    if weights.slots is not None:
        raise ValueError("experts that several ids of the router share cannot be removed")
    changed: dict[str, Weight] = {}
    for name, dim in layer.expert_dims.items():
        value = weights.tensors[name]
        if isinstance(value, QuantizedTensor):
            raise ValueError(f"{name} is quantized; routers are not")
        after = range(len(weights.experts), value.shape[dim])
        changed[name] = value.index_select(dim, torch.tensor([*kept, *after]))
    sources = tuple(weights.source_ids[i] for i in kept)
    experts = tuple(weights.experts[i] for i in kept)
    merged = None if weights.merged is None else tuple(weights.merged[i] for i in kept)
    return replace(weights.with_tensors(changed), experts=experts, sources=sources, merged=merged)


def stands_for(weights: LayerWeights) -> tuple[tuple[int, ...], ...]:
    """For every expert the numbers in the checkpoint of those that it stands for."""
    return tuple((number,) for number in weights.source_ids) if weights.merged is None else weights.merged


def padding_problem(facts: ModelFacts, layer: LayerFacts) -> str | None:
    """Why empty experts cannot be kept out of this layer's routing exactly; None where a bias does it.

    A correction bias decides who is chosen where every expert is scored by itself; the bias of a router's matrix, where
    the weights are those of the chosen alone. With a softmax over all experts an empty one would take its share.
    """
    biases = [name for name in layer.expert_dims if "bias" in name]
    assert layer.site is not None
    if biases and (facts.scoring == "sigmoid" or f"{layer.site.router}.bias" in biases):
        return None
    return "uneven_layers: pad: this router has no bias that keeps empty experts out exactly; use native or uniformize"


def without_experts(layer: LayerFacts, weights: LayerWeights, empty: Sequence[int]) -> LayerWeights:
    """The layer with zeros for these of its experts, which its router never chooses (see `padding_problem`)."""
    if not empty:
        return weights
    changed: dict[str, Weight] = {}
    for name, dim in layer.expert_dims.items():
        value = weights.tensors[name]
        assert isinstance(value, Tensor)
        changed[name] = value.index_fill(dim, torch.tensor(empty), _NEVER if "bias" in name else 0.0)
    experts = list(weights.experts)
    for place in empty:
        parts = vars(experts[place]).items()
        zeros = {name: torch.zeros_like(part) for name, part in parts if isinstance(part, Tensor)}
        experts[place] = replace(experts[place], **zeros)  # type: ignore[arg-type]
    return weights.with_tensors(changed).with_experts(tuple(experts))


def resized_config(config: Any, before: MoESite, after: MoESite) -> Any:
    """A copy of a transformers config whose counts are those of `after`; `before`: what it says now.

    Raises ValueError when it has no entry for a count that changes, or does not allow the new one.
    """
    made = deepcopy(config)
    text = made.get_text_config()
    for name, value in _changes(config.get_text_config(), before, after).items():
        setattr(text, name, value)
    if callable(check := getattr(text, "validate", None)):  # what transformers does when it reads the output
        try:
            check()
        except Exception as error:
            raise ValueError(str(error.__cause__ or error)) from error
    return made


def resized_entries(raw: Mapping[str, Any], config: Any, before: MoESite, after: MoESite) -> dict[str, Any]:
    """config.json with the counts of `after`, every spelling of an entry written (`num_experts` and its alias)."""
    text = config.get_text_config()
    changes = _changes(text, before, after)
    nested = (key for key, value in raw.items() if isinstance(value, dict) and getattr(config, key, None) is text)
    key = next(nested, None)
    return {**raw, **changes} if key is None else {**raw, key: {**raw[key], **changes}}


def _changes(text: Any, before: MoESite, after: MoESite) -> dict[str, int]:
    names = shape_names(text, before.num_experts, before.top_k, before.width)
    pairs = {
        "experts": (before.num_experts, after.choices),
        "top_k": (before.top_k, after.top_k),
        "groups": (before.groups, after.groups),
        "top_groups": (before.top_groups, after.top_groups),
        "width": (before.width, after.width),
    }
    changes: dict[str, int] = {}
    for key, (old, new) in pairs.items():
        if old == new:
            continue
        if not names[key]:
            raise ValueError(f"the config of {text.model_type} has no entry for {key} ({old})")
        changes.update(dict.fromkeys(names[key], new))
    return changes


def resize_experts(block: nn.Module, experts: nn.Module, model_type: str, before: int, after: int) -> None:
    """Make `block` (the parent of `experts`) expect `after` routed experts instead of `before`.

    Router tensors lose or gain rows in their first dimension of size `before` ([E, H], [E], [1, E]), correction
    biases that live on the block too; integer attributes such as `num_experts` follow, and the experts' own stacked
    tensors where `experts` still has them. Tensors are new and empty, on the device of the old ones.
    """
    for name in list(experts._parameters):
        if experts._parameters[name] is not None and experts._parameters[name].shape[:1] == (before,):  # type: ignore[union-attr]
            _resize(experts, name, before, after)
    routers = [child for name in router_names(model_type) if isinstance(child := getattr(block, name, None), nn.Module)]
    for module in [part for router in routers for part in router.modules()]:
        extra = extra_rows(module, before)
        for name in list(module._parameters) + list(module._buffers):
            _resize(module, name, before, after)
            if extra:
                _resize(module, name, before + extra, after + extra)
    for name in list(block._parameters) + list(block._buffers):
        if "bias" in name:
            _resize(block, name, before, after)
    for module in (block, experts, *(part for router in routers for part in router.modules())):
        for name, value in _counts(module, before):
            setattr(module, name, value + after - before)
        if isinstance(module, nn.Linear) and module.out_features == before:
            module.out_features = after


def resized_layer(layer: nn.Module, site: MoESite, model_type: str, count: int) -> nn.Module:
    """A copy of an empty decoder layer whose router and experts are of `count` experts instead of the site's.

    Computed buffers are copied, everything else has no memory (the meta device).
    """
    made = deepcopy(layer)
    parent = site.experts.rpartition(".")[0]
    block = made.get_submodule(parent) if parent else made
    resize_experts(block, made.get_submodule(site.experts), model_type, site.num_experts, count)
    return made


def _resize(module: nn.Module, name: str, before: int, after: int) -> None:
    value = module._parameters.get(name, module._buffers.get(name))
    if value is None or before not in value.shape:
        return
    shape = list(value.shape)
    shape[shape.index(before)] = after
    made = torch.empty(shape, dtype=value.dtype, device=value.device)
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(made, requires_grad=value.requires_grad)
    else:
        module._buffers[name] = made


def _counts(module: nn.Module, before: int) -> Iterator[tuple[str, int]]:
    """Attributes that count routed experts (num_experts, n_routed_experts, num_local_experts, ...), alone or with the
    shared ones (n_total_experts), and their values."""
    total = before + getattr(module, "n_shared_experts", 0) if hasattr(module, "n_total_experts") else before
    for name, value in list(vars(module).items()):
        if type(value) is int and value in (before, total) and name.endswith("experts") and "shared" not in name:
            yield name, value
