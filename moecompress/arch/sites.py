"""Find the routed experts of a model by the interface that transformers gives them, not by family.

Every class decorated with transformers' `use_experts_implementation` carries the flags `is_transposed`,
`is_concatenated`, `has_bias`, `has_gate` and the marker `_is_expert_parallel`; nothing else does. This module only
looks at attributes, so it needs no transformers import.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from moecompress.arch.quirks import UNSUPPORTED, UNSUPPORTED_OPTIONS, router_names
from moecompress.errors import UnsupportedModel, message
from moecompress.types import LayerFacts, MoESite, Role

_ATTENTION = ("attn", "attention", "mixer", "mamba", "conv", "linear_attn", "ssm", "kda", "indexer")
_DENSE = ("mlp", "feed_forward", "ffn", "moe", "fc")
_SHARED = ("shared",)
_MLP_LINEARS = ("gate_proj", "up_proj", "down_proj", "gate_up_proj")
_NEVER_QUANTIZED = ("gate", "router", "shared_expert_gate")


@dataclass(frozen=True)
class NormFold:
    """norm: name of the norm's weight inside the layer. offset: 1 for norms that multiply by 1 + weight, else 0.

    readers: names of all other weights [*, H] that read the norm's output (router, shared experts, ...); the routed
    experts read it always.
    """

    norm: str
    offset: float
    readers: tuple[str, ...]


def is_experts(module: nn.Module) -> bool:
    """Whether `module` is a standard stacked experts module of transformers 5.x."""
    return hasattr(module, "_is_expert_parallel") and hasattr(module, "is_transposed")


def find_layers(model: nn.Module, model_type: str) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder layers: the largest ModuleList that holds standard experts modules.

    Raises UnsupportedModel when the model has no routed experts, or none with the standard interface.
    """
    if model_type in UNSUPPORTED:
        raise UnsupportedModel(
            message(f"model type '{model_type}'", UNSUPPORTED[model_type], then="use another checkpoint or family")
        )
    config: Any = model.config
    for key, reason in UNSUPPORTED_OPTIONS.items():
        if value := getattr(config.get_text_config(), key, None):
            raise UnsupportedModel(message(f"model type '{model_type}'", f"{key} is {value}: {reason}", "0"))
    best: tuple[int, str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not any(is_experts(m) for m in module.modules()):
            continue
        size = sum(p.numel() for p in module.parameters())
        if best is None or size > best[0]:
            best = (size, name, module)
    if best is None:
        raise UnsupportedModel(
            message(
                f"model type '{model_type}'",
                "no routed experts with transformers' standard experts interface",
                allowed="Mixture-of-Experts families such as mixtral, qwen3_moe, deepseek_v3, gpt_oss, olmoe",
                then="a dense model needs another tool (llm-compressor, GPTQModel)",
            )
        )
    return best[1], best[2]


def find_site(layer: nn.Module, layer_name: str, model_type: str, top_k: int) -> MoESite | None:
    """The MoE site of one decoder layer, or None for a dense layer.

    Raises UnsupportedModel when a layer has several expert groups or no recognisable router.
    """
    found = [(name, module) for name, module in layer.named_modules() if is_experts(module)]
    if not found:
        return None
    if len(found) > 1:
        names = ", ".join(name for name, _ in found)
        raise UnsupportedModel(message(layer_name, f"several expert groups in one layer ({names})", "one"))
    name, experts = found[0]
    gate_up_name = "gate_up_proj" if experts.has_gate else "up_proj"
    gate_up, down = getattr(experts, gate_up_name), experts.down_proj
    rows, hidden = (2, 1) if experts.is_transposed else (1, 2)
    if experts.has_gate and gate_up.shape[rows] % 2:
        raise UnsupportedModel(message(f"{layer_name}.{name}", f"gate_up_proj has {gate_up.shape[rows]} rows", "even"))
    width = gate_up.shape[rows] // (2 if experts.has_gate else 1)
    if gate_up.shape[0] != down.shape[0]:
        raise UnsupportedModel(
            message(f"{layer_name}.{name}", f"{gate_up.shape[0]} gate_up but {down.shape[0]} down experts", "equal")
        )
    router = _find_router(layer, name, layer_name, model_type)
    return MoESite(
        experts=name,
        router=router,
        extra_rows=extra_rows(layer.get_submodule(router), gate_up.shape[0]),
        num_experts=gate_up.shape[0],
        top_k=top_k,
        hidden=gate_up.shape[hidden],
        width=width,
        gate_up_name=gate_up_name,
        gated=bool(experts.has_gate),
        concatenated=bool(experts.is_concatenated),
        transposed=bool(experts.is_transposed),
        has_bias=bool(experts.has_bias),
    )


def _find_router(layer: nn.Module, experts: str, layer_name: str, model_type: str) -> str:
    parent_name = experts.rpartition(".")[0]
    parent = layer.get_submodule(parent_name) if parent_name else layer
    for child in router_names(model_type):
        if isinstance(getattr(parent, child, None), nn.Module):
            return f"{parent_name}.{child}" if parent_name else child
    children = ", ".join(name for name, _ in parent.named_children())
    raise UnsupportedModel(message(f"{layer_name}.{parent_name}", f"no router among {children}", "gate or router"))


def extra_rows(router: nn.Module, experts: int) -> int:
    """Rows of a router's matrix after those of its `experts` routed experts: it gates shared experts, too (inkling)."""
    shared, weight = getattr(router, "n_shared_experts", None), getattr(router, "weight", None)
    return shared if isinstance(shared, int) and weight is not None and len(weight) == experts + shared else 0


def role_of(name: str, site: MoESite | None, shape: tuple[int, ...]) -> Role:
    """The role of one non-expert tensor by its name inside the layer (`mlp.shared_expert.up_proj.weight`).

    Only names decide, so that a new family needs no entry: the router subtree and one-row gates are `router`,
    children called shared* are `shared_experts`, token mixers are `attention`, 1-D tensors are `norm` or `other`.
    """
    parts = name.split(".")
    if site is not None and (name.startswith(site.router + ".") or parts[-2:-1] == ["shared_expert_gate"]):
        return "router"
    if site is not None and len(shape) <= 2 and site.num_experts in shape and len(parts) <= 2 and "bias" in parts[-1]:
        return "router"  # correction biases that live on the block (minimax_m2, afmoe, lfm2_moe)
    if any(part.startswith(_SHARED) for part in parts):
        return "shared_experts"
    if any("norm" in part for part in parts):
        return "norm"
    if parts[-2:-1] and parts[-2] in _MLP_LINEARS:
        return "dense_mlp"  # also where the MLP sits in a block called mixer (nemotron_h)
    if any(key in part for part in parts[:-1] for key in _ATTENTION):
        return "attention"
    if any(key in part for part in parts[:-1] for key in _DENSE):
        return "dense_mlp"
    return "other"


def router_matrix(layer: LayerFacts) -> tuple[str, str | None] | None:
    """Names of the matrix [R, H] between hidden state and experts (R >= E: rows of shared experts may follow) and of
    its bias [R] or None; None where the layer has no such matrix, or several."""
    if layer.site is None:
        return None
    inside = f"{layer.site.router}."
    found = [
        name
        for name, shape in layer.shapes.items()
        if name.startswith(inside)
        and name.endswith(".weight")
        and len(shape) == 2
        and shape[0] >= layer.site.num_experts
    ]
    if len(found) != 1:
        return None
    bias = f"{found[0].removesuffix('weight')}bias"
    return found[0], bias if layer.shapes.get(bias) == layer.shapes[found[0]][:1] else None


def shared_gates(layer: LayerFacts) -> dict[str, str]:
    """Linear weight of a shared expert -> weight of the one-row sigmoid gate that multiplies the expert's output."""
    gates = [name for name in layer.shapes if name.endswith("shared_expert_gate.weight") and layer.shapes[name][0] == 1]
    pairs = ((gate.removesuffix("_gate.weight") + ".", gate) for gate in gates)
    return {name: gate for prefix, gate in pairs for name in layer.linears if name.startswith(prefix)}


def expert_dims(shapes: Mapping[str, tuple[int, ...]], site: MoESite | None) -> dict[str, int]:
    """Tensor inside the layer -> its dimension that runs over the routed experts.

    Everything of the router, and biases that live beside it on the MoE block, with a dimension of that size.
    """
    if site is None:
        return {}
    block = site.experts.rpartition(".")[0]
    found = {}
    for name, shape in shapes.items():
        parent, _, leaf = name.rpartition(".")
        if name.startswith(f"{site.router}.") or (parent == block and "bias" in leaf):
            sizes = [size for size in (site.num_experts, site.num_experts + site.extra_rows) if size in shape]
            if sizes:
                found[name] = shape.index(sizes[0])
    return found


def quantizable_linears(layer: nn.Module, site: MoESite | None) -> tuple[str, ...]:
    """Names (with `.weight`) of nn.Linear matrices of the layer that a quantizer may touch: no routers, no gates.

    No subclasses of nn.Linear either: those use their weight in a way of their own (deepseek_v4's grouped output).
    """
    names = []
    for name, module in layer.named_modules():
        if type(module) is not nn.Linear or module.out_features == 1:
            continue
        if name.rpartition(".")[2] in _NEVER_QUANTIZED:
            continue
        if site is not None and (name == site.router or name.startswith((site.router + ".", site.experts + "."))):
            continue
        names.append(f"{name}.weight")
    return tuple(names)
