"""How much the model's own predictions depend on each element of a layer's output: the diagonal of the Fisher matrix.

Half of d^T F d is, to second order, the KL divergence that a small change d of the output causes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moecompress.stream.layers import call_layer, filled_layer
from moecompress.stream.model import StreamModel
from moecompress.stream.outer import outer_weights
from moecompress.stream.prelude import logits, record
from moecompress.stream.streams import batches_of
from moecompress.types import LayerWeights


def output_fisher(
    model: StreamModel,
    weights: Callable[[int], LayerWeights],
    ids: Tensor,
    generator: torch.Generator,
    *,
    batch_tokens: int = 4096,
) -> dict[int, Tensor]:
    """Mean over tokens of (d loss / d y)^2 for every element of every MoE layer's output y: layer -> float32 [H].

    ids: int64 [N, T]. loss: at every position -log p of a token that `generator` draws from the model's own prediction,
    summed per sequence. One layer is in memory at a time; each is read twice per batch.
    """
    sites = [layer.index for layer in model.facts.moe_layers]
    sums = {index: torch.zeros((), dtype=torch.float64) for index in sites}
    for batch in batches_of(ids, batch_tokens):
        with outer_weights(model.skeleton, model.layers_name, model.read_outer):
            hidden, calls = record(model.skeleton, model.layers, batch.ids)
            entering = [hidden]
            with torch.no_grad():
                for index in range(len(model.layers)):
                    with filled_layer(model, weights(index)) as layer:
                        entering.append(call_layer(layer, entering[-1], calls[index]))
            upstream = _head_gradient(model, batch.ids, entering.pop(), generator)
        for index in reversed(range(sites[0], len(model.layers))):
            if index in sums:
                sums[index] = sums[index] + upstream.double().square().flatten(0, -2).sum(0)
            start = entering.pop().detach().requires_grad_(True)
            if index > sites[0]:
                with filled_layer(model, weights(index)) as layer, torch.enable_grad():
                    (upstream,) = torch.autograd.grad(call_layer(layer, start, calls[index]), [start], upstream)
    return {index: (total / ids.numel()).float() for index, total in sums.items()}


def _head_gradient(model: StreamModel, ids: Tensor, last: Tensor, generator: torch.Generator) -> Tensor:
    """d loss / d hidden of what left the last layer, one sequence's logits in memory at a time."""
    gradients: list[Tensor] = []
    for row in range(ids.shape[0]):
        hidden = last[row : row + 1].detach().requires_grad_(True)
        with torch.enable_grad():
            scores = logits(model.skeleton, model.layers, ids[row : row + 1], hidden).log_softmax(-1)[0]
            drawn = torch.multinomial(scores.detach().exp(), 1, generator=generator)
            gradients += torch.autograd.grad(-scores.gather(1, drawn).sum(), [hidden])
    return torch.cat(gradients)
