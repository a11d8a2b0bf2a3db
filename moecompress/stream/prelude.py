"""The parts around the decoder layers: what the model computes before layer 0 and after the last layer.

Both are the model's own forward with its layers replaced for the duration of one call: recording layers give the
hidden states that enter layer 0 and the arguments every layer gets; feeding layers give the logits for stored hidden
states. So masks, rotary tables, embedding scales, final norms and soft caps need no family code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moecompress.errors import UnsupportedModel, message


@dataclass(frozen=True)
class LayerCall:
    """Everything a layer is called with besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@contextmanager
def replaced_layers(layers: nn.ModuleList, make: Callable[[int], Callable[..., Tensor]]) -> Iterator[None]:
    """Within the context, layer i's forward is `make(i)`."""
    try:
        for index, layer in enumerate(layers):
            layer.forward = make(index)  # type: ignore[method-assign]
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def record(model: Any, layers: nn.ModuleList, ids: Tensor) -> tuple[Tensor, tuple[LayerCall, ...]]:
    """Hidden states entering layer 0 (float32 [B, T, ...]) and the call of every layer, for ids int64 [B, T].

    Raises UnsupportedModel when a layer is not called exactly once with its hidden states first, or when the layers
    share a mutable store (their results would depend on the order of calls).
    """
    calls: dict[int, LayerCall] = {}
    first: list[Tensor] = []

    def recorder(index: int) -> Callable[..., Tensor]:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            if index in calls:
                raise UnsupportedModel(message(f"layer {index}", "is called twice in one forward"))
            hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
            if not first:
                first.append(hidden)
            calls[index] = LayerCall(rest, kwargs)
            return hidden

        return forward

    with torch.no_grad(), replaced_layers(layers, recorder), _silent_head(model):
        model(input_ids=ids, use_cache=False)
    missing = [index for index in range(len(layers)) if index not in calls]
    if missing:
        raise UnsupportedModel(message("model forward", f"layers {missing} were not called"))
    return first[0], tuple(calls[index] for index in range(len(layers)))


@contextmanager
def _silent_head(model: Any) -> Iterator[None]:
    """Within the context the output matrix is not used: a batch of logits over a large vocabulary takes gigabytes."""
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    before = head.__dict__.get("forward")
    try:
        head.forward = lambda hidden, *_, **__: hidden[..., :1]
        yield
    finally:
        if before is None:
            head.__dict__.pop("forward", None)
        else:
            head.forward = before


def share_equal(call: LayerCall, reference: LayerCall) -> LayerCall:
    """The same call with every tensor that equals the reference's replaced by the reference's (memory, not values)."""

    def shared(value: Any, known: Any) -> Any:
        if isinstance(value, Tensor):
            same = isinstance(known, Tensor) and value.shape == known.shape and value.dtype == known.dtype
            return known if same and torch.equal(value, known) else value
        if isinstance(value, tuple) and isinstance(known, tuple) and len(value) == len(known):
            return tuple(shared(a, b) for a, b in zip(value, known, strict=True))
        return value

    args = tuple(shared(a, b) for a, b in zip(call.args, reference.args, strict=True))
    return LayerCall(args, {k: shared(v, reference.kwargs.get(k)) for k, v in call.kwargs.items()})


def logits(model: Any, layers: nn.ModuleList, ids: Tensor, hidden: Tensor) -> Tensor:
    """Logits float32 [B, T, V] for the hidden states that left the last layer, by the model's own head.

    Gradients flow to `hidden` when they are enabled.
    """

    def feeder(index: int) -> Callable[..., Tensor]:
        last = index == len(layers) - 1
        return lambda *args, **kwargs: hidden if last else (args[0] if args else kwargs["hidden_states"])

    with replaced_layers(layers, feeder):
        out = model(input_ids=ids, use_cache=False)
    return out.logits.float()
