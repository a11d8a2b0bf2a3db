"""What becomes of every checkpoint tensor, in the words that the plan prints."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from moecompress.stream.inventory import Owner
from moecompress.stream.model import StreamModel
from moecompress.types import PROJECTIONS, Scheme
from moecompress.writing import Format


def tensor_actions(
    model: StreamModel,
    owned: Mapping[str, Owner],
    schemes: Mapping[int, Mapping[str, Scheme]],
    output: Format,
    shares: Mapping[str, tuple[int, int]],
    dropped: Collection[str],
) -> dict[str, str]:
    """What happens to every checkpoint tensor, in words that the plan prints."""
    bits: dict[str, str] = {}
    for layer in model.facts.layers:
        chosen = schemes[layer.index]
        source = model.expert_sources.get(layer.index)
        for projection in PROJECTIONS:
            if source is not None and projection in chosen:
                for key in source.projections[projection].assembly.keys:
                    bits[key] = _describe(chosen[projection], output)
        for name, scheme in chosen.items():
            assembly = model.key_map.assemblies.get(f"{layer.name}.{name}")
            for key in assembly.keys if assembly else ():
                bits[key] = _describe(scheme, output)
    plain = set(model.reader.names())
    actions = {}
    for key in owned:
        fewer = f"keep {shares[key][0]} of {shares[key][1]} {_unit(model, shares[key][1])}" if key in shares else None
        if key in dropped:
            actions[key] = "drop"
        elif key not in plain:
            actions[key] = "consume (FP8 scale)"
        elif key in bits:
            actions[key] = f"{fewer}, {bits[key]}" if fewer else bits[key]
        elif fewer:
            actions[key] = fewer
        else:
            same = model.reader.logical_dtype(key) == model.index.tensors[key].dtype
            actions[key] = "copy" if same else "dequantize to bfloat16"
    return actions


def _unit(model: StreamModel, count: int) -> str:
    sizes = {layer.site.num_experts for layer in model.facts.moe_layers if layer.site is not None}
    return "experts" if count in sizes else "rows"


def _describe(scheme: Scheme, output: Format) -> str:
    group = "per channel" if scheme.group_size == -1 else f"group {scheme.group_size}"
    kind = "binary" if scheme.binary else "symmetric" if scheme.symmetric else "asymmetric"
    rounded = ", written dense" if output == "dense" else ""
    inputs = "" if scheme.activation == "none" else f", inputs {scheme.activation}"
    return f"quantize {scheme.bits}-bit {kind}, {group}{inputs}{rounded}"
