"""What changing one layer alone does to the model's predictions: KL divergence, layer by layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moecompress.stream.layers import call_layer, filled_layer
from moecompress.stream.model import StreamModel
from moecompress.stream.outer import outer_weights
from moecompress.stream.prelude import LayerCall, logits, record
from moecompress.stream.streams import batches_of
from moecompress.types import LayerWeights

Weights = Callable[[int], LayerWeights]


def layer_divergence(
    model: StreamModel,
    weights: Weights,
    changed: Callable[[LayerWeights], LayerWeights],
    ids: Tensor,
    *,
    batch_tokens: int = 4096,
) -> dict[int, float]:
    """KL(model || model with layer l changed) in nats per token, for every MoE layer l.

    weights(l): the layer as it is; changed: what is made of it. ids: int64 [N, T]. One layer is in memory at a time;
    for L layers with experts about L^2 / 2 layers are run.
    """
    sums = {layer.index: 0.0 for layer in model.facts.moe_layers}
    for batch in batches_of(ids, batch_tokens):
        with outer_weights(model.skeleton, model.layers_name, model.read_outer), torch.no_grad():
            hidden, calls = record(model.skeleton, model.layers, batch.ids)
            entering = [hidden]
            for index in range(len(model.layers)):
                entering.append(_through(model, weights(index), entering[-1], calls[index]))
            wanted = entering.pop()
            for layer in sums:
                hidden = _through(model, changed(weights(layer)), entering[layer], calls[layer])
                for index in range(layer + 1, len(model.layers)):
                    hidden = _through(model, weights(index), hidden, calls[index])
                sums[layer] += _divergence(model, batch.ids, wanted, hidden)
    return {layer: total / ids.numel() for layer, total in sums.items()}


def _through(model: StreamModel, weights: LayerWeights, hidden: Tensor, call: LayerCall) -> Tensor:
    with filled_layer(model, weights) as layer:
        return call_layer(layer, hidden, call)


def _divergence(model: StreamModel, ids: Tensor, wanted: Tensor, found: Tensor) -> float:
    """Summed over all positions, one sequence's logits in memory at a time. wanted, found: what left the last layer."""
    total = 0.0
    for row in range(ids.shape[0]):
        p, q = (
            logits(model.skeleton, model.layers, ids[row : row + 1], hidden[row : row + 1]).log_softmax(-1)
            for hidden in (wanted, found)
        )
        total += float((p.exp() * (p - q)).double().sum())
    return total
