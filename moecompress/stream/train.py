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
from torch import Tensor, nn

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
Term = Callable[[int, nn.Module], Tensor]  # (layer, its module just after it ran) -> scalar that is added to the loss
GATE = "gate."  # how the names of a gate's tensors start among the trainables of a layer


@dataclass(frozen=True)
class TrainContext:
    """What a TRAIN pass decides on. weights(l): the layer as the passes before left it.

    tokens: by name; both streams are behind the last layer. statistics: what `measure` kept, by layer. resident:
    whether the whole model fits into memory. note: tells the user something. source(l): the layers of the original
    stream, where a first pass has put both streams into another basis; None = the checkpoint's.
    """

    model: StreamModel
    tokens: Mapping[str, TokenRun]
    weights: Weights
    statistics: Mapping[int, Mapping[str, Mapping[str, Tensor]]]
    generator: Callable[..., torch.Generator]
    resident: bool
    note: Callable[[str], None]
    source: Weights | None = None

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
    term: Term | None = None,
) -> tuple[float, dict[tuple[int, str], Tensor]]:
    """d loss / d trainables for one batch.

    trainables replace the layer's tensor of the same name (a router, a norm, an attention matrix), or with the name
    `gate.<tensor>` that of its gate; quantized experts stay constants. resident: keep all layers in memory (faster, for
    models that fit). term: what every layer with trainables adds to the loss besides.
    Returns (loss, {(layer, name): gradient float32}). Raises ValueError for a name the layer does not have.
    """
    leaves = {key: value.detach().float().requires_grad_(True) for key, value in trainables.items()}
    with outer_weights(model.skeleton, model.layers_name, model.read_outer):
        with torch.no_grad():
            hidden, calls = record(model.skeleton, model.layers, batch.ids)
        if resident:
            value, gradients = _resident(model, weights, loss, leaves, batch, hidden, calls, term)
        else:
            value, gradients = _reloaded(model, weights, loss, leaves, batch, hidden, calls, term)
    missing = [key for key in leaves if gradients.get(key) is None]
    zeros = {key: torch.zeros_like(leaves[key]) for key in missing}
    return float(value), {**gradients, **zeros}


def _with_leaves(weights: LayerWeights, leaves: Mapping[tuple[int, str], Tensor]) -> LayerWeights:
    found = {name: leaf for (layer, name), leaf in leaves.items() if layer == weights.index}
    own = {name: leaf for name, leaf in found.items() if weights.gate is None or not name.startswith(GATE)}
    unknown = sorted(set(own) - set(weights.tensors))
    if unknown:
        raise ValueError(message(f"layer {weights.index}", f"no tensors {unknown}", ", ".join(sorted(weights.tensors))))
    gate = weights.gate
    if gate is not None:
        inside = {name.removeprefix(GATE): leaf for name, leaf in found.items() if name not in own}
        gate = replace(gate, tensors={**gate.tensors, **inside})
    return replace(weights, tensors={**weights.tensors, **own}, gate=gate)


def _resident(
    model: StreamModel,
    weights: Weights,
    loss: Loss,
    leaves: Mapping[tuple[int, str], Tensor],
    batch: TokenBatch,
    hidden: Tensor,
    calls: Sequence[LayerCall],
    term: Term | None,
) -> tuple[Tensor, dict[Any, Tensor]]:
    trained = {layer for layer, _ in leaves} if term is not None else set()
    with ExitStack() as stack, torch.enable_grad():
        terms = []
        for index in range(len(model.layers)):
            layer = stack.enter_context(filled_layer(model, _with_leaves(weights(index), leaves)))
            hidden = call_layer(layer, hidden, calls[index])
            if term is not None and index in trained:
                terms.append(term(index, layer))
        value = loss(logits(model.skeleton, model.layers, batch.ids, hidden), batch) + sum(terms)
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
    term: Term | None,
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
            out = [call_layer(layer, start, calls[index])]
            into = [upstream]
            if term is not None and own:
                out.append(term(index, layer))
                into.append(torch.ones_like(out[-1]))
                value = value + out[-1].detach()
            found = torch.autograd.grad(out, [start, *own.values()], into, allow_unused=True)
        upstream = found[0]
        gradients.update({key: grad for key, grad in zip(own, found[1:], strict=True) if grad is not None})
    return value.detach(), gradients
