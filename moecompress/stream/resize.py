"""A model with fewer experts per layer beside the one it comes from: what pruned weights are run in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moecompress.arch.surgery import resized_config, resized_entries
from moecompress.errors import UnsupportedModel, message
from moecompress.stream.model import Resized, StreamModel
from moecompress.stream.skeleton import build_skeleton, replace_experts
from moecompress.types import ModelFacts


def with_resized(model: StreamModel, facts: ModelFacts) -> StreamModel:
    """The model that also runs layers of as many experts as `facts` says; itself when that is its own number.

    facts: the model's, with the same number of experts, experts per token and groups in all MoE layers. The modules are
    built from the changed configuration, as transformers will build them from the output. Raises UnsupportedModel where
    the configuration cannot say it or gives other shapes than the pruned tensors have.
    """
    before, after = model.facts.moe_layers[0].site, facts.moe_layers[0].site
    assert before is not None and after is not None
    if after.num_experts == before.num_experts:
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
        found = {name: tuple(value.shape) for name, value in layers[layer.index].state_dict().items()}
        wrong = [f"{name} {found.get(name)}" for name, shape in layer.shapes.items() if found.get(name) != shape]
        if layer.site is not None:
            if found[f"{layer.site.experts}.down_proj"][0] != layer.site.num_experts:
                wrong.append(f"{layer.site.experts} {found[f'{layer.site.experts}.down_proj']}")
            replace_experts(layers[layer.index], layer.site.experts)
        if wrong:
            text = f"with {after.num_experts} experts, {layer.name} has {', '.join(wrong[:3])}"
            raise UnsupportedModel(message(where, text, then="do not remove experts"))
    resized = Resized(replace(facts, config=raw), raw, config, skeleton)
    return replace(model, resized={**model.resized, after.num_experts: resized})
