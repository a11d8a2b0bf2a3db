"""Fill one decoder layer of the skeleton with weights, run it, empty it again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moecompress.dispatch import ExpertObserver
from moecompress.errors import UnsupportedModel, message
from moecompress.experts import Experts, materialise
from moecompress.gate import Gate
from moecompress.numerics.activation import rounded_as
from moecompress.stream.attention import watched_attention
from moecompress.stream.model import StreamModel
from moecompress.stream.prelude import LayerCall
from moecompress.types import ExpertWeights, LayerWeights, MoESite, QuantizedTensor, Scheme

RouterTap = Callable[[Tensor], None]
LinearTap = Callable[[str, Tensor], None]
GateTap = Callable[[str, Tensor], None]


@contextmanager
def filled_layer(model: StreamModel, weights: LayerWeights) -> Iterator[nn.Module]:
    """The decoder layer with `weights` in float32 (experts stay as they are and are expanded one at a time).

    Linears whose scheme rounds their inputs do so. May be nested: leaving brings back what was there before.
    """
    facts = model.facts.layers[weights.index]
    layer = model.module_of(weights)
    empty: dict[str, Tensor] = {}
    before: tuple[Sequence[ExpertWeights], Tensor | None, Gate | None] = ((), None, None)
    stack, hooks = ExitStack(), []
    try:
        for name, value in weights.tensors.items():
            if isinstance(value, QuantizedTensor) and value.scheme.activation != "none":
                module = layer.get_submodule(name.removesuffix(".weight"))
                hooks.append(module.register_forward_pre_hook(_rounding_hook(value.scheme)))
            dense = materialise(value, torch.float32) if isinstance(value, QuantizedTensor) else value
            empty[name] = _swap(layer, name, dense.float() if dense.is_floating_point() else dense)
        if facts.site is not None:
            experts = experts_of(layer, facts.site.experts)
            before = experts.weights, experts.sharing, experts.gate
            experts.weights, experts.sharing, experts.gate = weights.experts, _sharing(weights), weights.gate
            stack.enter_context(watched_attention(layer, experts))
        with stack:
            yield layer
    finally:
        for hook in hooks:
            hook.remove()
        for name, value in empty.items():
            _swap(layer, name, value)
        if facts.site is not None:
            experts = experts_of(layer, facts.site.experts)
            experts.weights, experts.sharing, experts.gate = before
            experts.kept = None


def _sharing(weights: LayerWeights) -> Tensor | None:
    """Id of the router (the one after the last means skip) -> place of its expert; None where each has its own."""
    return None if weights.slots is None else torch.tensor([*weights.slots, len(weights.experts)])


def _rounding_hook(scheme: Scheme) -> Callable[[nn.Module, Any], Any]:
    return lambda _module, args: (rounded_as(scheme, args[0]), *args[1:])


def experts_of(layer: nn.Module, name: str) -> Experts:
    """Our experts module inside a layer."""
    module = layer.get_submodule(name)
    assert isinstance(module, Experts)
    return module


def _swap(layer: nn.Module, name: str, value: Tensor) -> Tensor:
    """Put `value` in place of a parameter or buffer; returns what was there."""
    parent, _, leaf = name.rpartition(".")
    owner = layer.get_submodule(parent) if parent else layer
    before: Tensor | None
    if leaf in owner._parameters:
        before = owner._parameters[leaf]
        bare = isinstance(value, nn.Parameter) or value.requires_grad  # a new Parameter would cut the gradient off
        owner._parameters[leaf] = value if bare else nn.Parameter(value, requires_grad=False)  # type: ignore[assignment]
    else:
        before = owner._buffers[leaf]
        owner._buffers[leaf] = value
    assert before is not None
    return before


def call_layer(layer: nn.Module, hidden: Tensor, call: LayerCall) -> Tensor:
    """One forward of a filled layer. hidden float32 [B, T, ...] -> same shape.

    Raises UnsupportedModel when the layer returns more than hidden states or changes a store it was handed.
    """
    stores = {key: dict(value) for key, value in call.kwargs.items() if isinstance(value, MutableMapping)}
    out: Any = layer(hidden, *call.args, **call.kwargs)
    if isinstance(out, tuple):
        if any(value is not None for value in out[1:]):
            raise UnsupportedModel(message(type(layer).__name__, "hands more than hidden states to the next layer"))
        out = out[0]
    for key, before in stores.items():
        now = call.kwargs[key]
        if len(now) != len(before) or any(now[name] is not value for name, value in before.items()):
            raise UnsupportedModel(message(type(layer).__name__, f"shares '{key}' with later layers"))
    return out  # type: ignore[no-any-return]


@contextmanager
def watched(
    layer: nn.Module,
    site: MoESite | None,
    observer: ExpertObserver | None,
    tap: RouterTap | None,
    linears: Sequence[str] = (),
    on_linear: LinearTap | None = None,
) -> Iterator[None]:
    """Within the context the layer's experts report to `observer`, its router's first output goes to `tap`, and the
    inputs of the Linears with the weights `linears` (names inside the layer) go to `on_linear`."""
    handles = []
    if site is not None:

        def routed(_module: nn.Module, _args: Any, out: Any) -> None:
            if tap is not None:
                tap((out[0] if isinstance(out, tuple) else out).detach())

        handles.append(layer.get_submodule(site.router).register_forward_hook(routed))
        experts_of(layer, site.experts).observer = observer
    for name in linears:
        module = layer.get_submodule(name.removesuffix(".weight"))
        handles.append(module.register_forward_pre_hook(_linear_hook(name, on_linear)))
    try:
        yield
    finally:
        if site is not None:
            experts_of(layer, site.experts).observer = None
        for handle in handles:
            handle.remove()


def _linear_hook(name: str, on_linear: LinearTap | None) -> Callable[[nn.Module, Any], None]:
    def hook(_module: nn.Module, args: Any) -> None:
        if on_linear is not None:
            on_linear(name, args[0].detach())

    return hook


@contextmanager
def gates_told(layer: nn.Module, gates: Iterable[str], on_gate: GateTap) -> Iterator[None]:
    """Within the context every call of a shared expert is announced to `on_gate` with what its output will be
    multiplied by, [tokens], before its Linears run. gates: weights of the one-row sigmoid gates."""

    def hook(gate: str) -> Callable[[nn.Module, Any], None]:
        module = layer.get_submodule(gate.removesuffix(".weight"))
        return lambda _module, args: on_gate(gate, module(args[0].detach()).sigmoid().reshape(-1))

    names = {gate: gate.removesuffix("_gate.weight") for gate in gates}
    handles = [layer.get_submodule(name).register_forward_pre_hook(hook(gate)) for gate, name in names.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
