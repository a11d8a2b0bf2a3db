"""TRAIN scope: gradients of a loss on the final logits with respect to chosen tensors of chosen layers.

One path, two ways to walk it. Resident: all layers filled, one ordinary backward pass. Reloaded: a forward pass that
keeps only the hidden states between layers, then the layers once more in reverse, each recomputed with gradients; so
one layer is in memory at a time and the result is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moecompress.errors import message
from moecompress.stream.layers import call_layer, filled_layer
from moecompress.stream.model import StreamModel
from moecompress.stream.outer import outer_weights
from moecompress.stream.prelude import LayerCall, logits, record
from moecompress.stream.streams import TokenRun
from moecompress.types import LayerWeights, TokenBatch

Loss = Callable[[Tensor, TokenBatch], Tensor]  # (logits float32 [B, T, V], batch) -> scalar
Trainables = Mapping[tuple[int, str], Tensor]  # (layer, tensor name inside the layer) -> float32 leaf
Weights = Callable[[int], LayerWeights]


@dataclass(frozen=True)
class TrainContext:
    """What a TRAIN pass decides on. weights(l): the layer as the passes before left it."""

    model: StreamModel
    tokens: Mapping[str, TokenRun]
    weights: Weights

    def forward_backward(
        self, loss: Loss, trainables: Trainables, batch: TokenBatch, *, resident: bool = False
    ) -> tuple[float, dict[tuple[int, str], Tensor]]:
        """Loss value and its gradients; see `forward_backward`."""
        return forward_backward(self.model, self.weights, loss, trainables, batch, resident=resident)


def forward_backward(
    model: StreamModel,
    weights: Weights,
    loss: Loss,
    trainables: Trainables,
    batch: TokenBatch,
    *,
    resident: bool = False,
) -> tuple[float, dict[tuple[int, str], Tensor]]:
    """d loss / d trainables for one batch.

    trainables replace the layer's tensor of the same name (a router, a norm, an attention matrix); quantized experts
    stay constants. resident: keep all layers in memory (faster, for models that fit).
    Returns (loss, {(layer, name): gradient float32}). Raises ValueError for a name the layer does not have.
    """
    leaves = {key: value.detach().float().requires_grad_(True) for key, value in trainables.items()}
    with outer_weights(model.skeleton, model.layers_name, model.read_outer):
        with torch.no_grad():
            hidden, calls = record(model.skeleton, model.layers, batch.ids)
        if resident:
            value, gradients = _resident(model, weights, loss, leaves, batch, hidden, calls)
        else:
            value, gradients = _reloaded(model, weights, loss, leaves, batch, hidden, calls)
    missing = [key for key in leaves if gradients.get(key) is None]
    zeros = {key: torch.zeros_like(leaves[key]) for key in missing}
    return float(value), {**gradients, **zeros}


def _with_leaves(weights: LayerWeights, leaves: Mapping[tuple[int, str], Tensor]) -> LayerWeights:
    own = {name: leaf for (layer, name), leaf in leaves.items() if layer == weights.index}
    unknown = sorted(set(own) - set(weights.tensors))
    if unknown:
        raise ValueError(message(f"layer {weights.index}", f"no tensors {unknown}", ", ".join(sorted(weights.tensors))))
    return replace(weights, tensors={**weights.tensors, **own})


def _resident(
    model: StreamModel,
    weights: Weights,
    loss: Loss,
    leaves: Mapping[tuple[int, str], Tensor],
    batch: TokenBatch,
    hidden: Tensor,
    calls: Sequence[LayerCall],
) -> tuple[Tensor, dict[Any, Tensor]]:
    with ExitStack() as stack, torch.enable_grad():
        for index in range(len(model.layers)):
            layer = stack.enter_context(filled_layer(model, _with_leaves(weights(index), leaves)))
            hidden = call_layer(layer, hidden, calls[index])
        value = loss(logits(model.skeleton, model.layers, batch.ids, hidden), batch)
        if not value.requires_grad:  # none of them has any influence (or there is none)
            return value, {}
        found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return value.detach(), {key: grad for key, grad in zip(leaves, found, strict=True) if grad is not None}


def _reloaded(
    model: StreamModel,
    weights: Weights,
    loss: Loss,
    leaves: Mapping[tuple[int, str], Tensor],
    batch: TokenBatch,
    hidden: Tensor,
    calls: Sequence[LayerCall],
) -> tuple[Tensor, dict[Any, Tensor]]:
    entering = [hidden]
    with torch.no_grad():
        for index in range(len(model.layers)):
            with filled_layer(model, _with_leaves(weights(index), leaves)) as layer:
                entering.append(call_layer(layer, entering[-1], calls[index]))
    last = entering.pop().requires_grad_(True)
    with torch.enable_grad():
        value = loss(logits(model.skeleton, model.layers, batch.ids, last), batch)
        (upstream,) = torch.autograd.grad(value, [last])
    gradients: dict[Any, Tensor] = {}
    lowest = min((layer for layer, _ in leaves), default=len(model.layers))
    for index in reversed(range(lowest, len(model.layers))):
        own = {key: leaf for key, leaf in leaves.items() if key[0] == index}
        start = entering.pop().requires_grad_(True)
        with filled_layer(model, _with_leaves(weights(index), leaves)) as layer, torch.enable_grad():
            out = call_layer(layer, start, calls[index])
            found = torch.autograd.grad(out, [start, *own.values()], upstream, allow_unused=True)
        upstream = found[0]
        gradients.update({key: grad for key, grad in zip(own, found[1:], strict=True) if grad is not None})
    return value.detach(), gradients
