"""Which role every checkpoint tensor plays: the ground for plans, manifests and size tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moecompress.checkpoint.portable_reader import PortableReader
from moecompress.stream.model import StreamModel
from moecompress.types import Role


@dataclass(frozen=True)
class Owner:
    """Where a checkpoint tensor belongs. layer: None outside the decoder layers; part: e.g. 'expert 3'."""

    role: Role
    layer: int | None


def owners(model: StreamModel) -> Mapping[str, Owner]:
    """Every tensor of the checkpoint (FP8 scale companions included) -> its owner, each exactly once."""
    found: dict[str, Owner] = {}
    for layer in model.facts.layers:
        if layer.index in model.expert_sources:
            keys = model.expert_sources[layer.index].checkpoint_keys
            found.update(dict.fromkeys(keys, Owner("routed_experts", layer.index)))
        for name, role in layer.roles.items():
            assembly = model.key_map.assemblies.get(f"{layer.name}.{name}")
            for key in assembly.keys if assembly else ():
                found.setdefault(key, Owner(role, layer.index))
        if model.native is not None:
            found.update(_native_owners(model, layer.index))
    embedding = _module_name(model, model.skeleton.get_input_embeddings())
    head = _module_name(model, model.skeleton.get_output_embeddings())
    for target, assembly in model.key_map.assemblies.items():
        module = target.rpartition(".")[0]
        outer: Role = "embedding" if module == embedding else "lm_head" if module == head else "other"
        if outer == "other" and "norm" in module.rpartition(".")[2]:
            outer = "norm"
        for key in assembly.keys:
            found.setdefault(key, Owner(outer, None))
    for key in model.index.tensors:
        main = model.reader.logical_name(key) if isinstance(model.reader, PortableReader) else key
        found.setdefault(key, found.get(main.removesuffix("_scale_inv"), Owner("other", None)))
    return found


def _native_owners(model: StreamModel, index: int) -> dict[str, Owner]:
    assert model.native is not None
    layer = model.facts.layers[index]
    found: dict[str, Owner] = {}
    for key in model.index.tensors:
        module = key.rpartition(".")[0]
        if not key.startswith(layer.name + "."):
            continue
        if module in model.native.experts:
            found[key] = Owner("routed_experts", index)
        elif module in model.native.linears:
            found[key] = Owner(layer.roles[f"{module}.weight".removeprefix(layer.name + ".")], index)
    return found


def _module_name(model: StreamModel, module: object) -> str | None:
    return next((name for name, found in model.skeleton.named_modules() if found is module), None)
