"""A model with fewer experts per layer beside the one it comes from: what pruned weights are run in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from moecompress.arch.surgery import resized_config, resized_entries, resized_layer
from moecompress.errors import UnsupportedModel, message
from moecompress.stream.model import Resized, StreamModel
from moecompress.stream.skeleton import build_skeleton, replace_experts
from moecompress.types import LayerFacts, ModelFacts


def with_resized(model: StreamModel, facts: ModelFacts) -> StreamModel:
    """The model that also runs layers of as many experts as `facts` says; itself when that is its own shape.

    facts: the model's, with the same number of experts, experts per token, groups and width in all MoE layers. The
    modules are built from the changed configuration, as transformers will build them from the output. Raises
    UnsupportedModel where the configuration cannot say it or gives other shapes than the pruned tensors have.
    """
    before, after = model.facts.moe_layers[0].site, facts.moe_layers[0].site
    assert before is not None and after is not None
    if replace(after, num_experts=after.choices, shared_ids=None) == before:
        return model
    where = f"model type '{model.facts.model_type}'"
    try:
        config = resized_config(model.config, before, after)
        raw = resized_entries(model.raw_config, model.config, before, after)
    except ValueError as error:
        raise UnsupportedModel(message(where, f"experts cannot be removed: {error}")) from error
    trusted = not type(model.skeleton).__module__.startswith("transformers.")  # its code runs already
    skeleton: Any = build_skeleton(config, trust_remote_code=trusted)
    layers = skeleton.get_submodule(model.layers_name)
    for layer in facts.layers:
        _check_layer(layers[layer.index], layer)
        if layer.site is not None:
            replace_experts(layers[layer.index], layer.site.experts)
    resized = Resized(replace(facts, config=raw), raw, config, skeleton)
    return replace(model, resized={**model.resized, after.choices: resized})


def check_uneven(model: StreamModel, facts: ModelFacts) -> None:
    """Whether layers can have numbers of experts of their own, as `facts` says; the loader resizes them likewise.

    Raises UnsupportedModel, naming the tensor, where a resized layer has other shapes than the pruned tensors.
    """
    for old, new in zip(model.facts.layers, facts.layers, strict=True):
        if old.site is None or new.site is None or old.site.num_experts == new.site.choices:
            continue
        module = resized_layer(model.layers[old.index], old.site, model.facts.model_type, new.site.choices)
        _check_layer(module, new)


def _check_layer(module: nn.Module, layer: LayerFacts) -> None:
    """Whether an empty decoder layer has the shapes of its facts."""
    found = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    wrong = [f"{name} {found.get(name)}" for name, shape in layer.shapes.items() if found.get(name) != shape]
    site = layer.site
    if site is None:
        text = f"{layer.name} has {', '.join(wrong[:3])}"
    else:
        shape = found.get(f"{site.experts}.down_proj", ())
        if not shape:
            text = f"with {site.choices} experts, {layer.name} has no routed experts"
            raise UnsupportedModel(message("the changed configuration", text, then="keep more experts"))
        size = shape[1] if site.transposed else shape[2]
        if (shape[0], size) != (site.choices, site.width):
            wrong.append(f"{site.experts} {shape}")
        text = f"with {site.choices} experts of width {site.width}, {layer.name} has {', '.join(wrong[:3])}"
    if wrong:
        raise UnsupportedModel(message("the changed configuration", text, then="keep the experts as they are"))
