"""How far the compressed layer is from the original one: router, layer output, experts, weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from moecompress.experts import materialise
from moecompress.numerics.grids import stored_bits
from moecompress.numerics.routing import routing_divergence, set_agreement
from moecompress.passes.base import Forward, output_error
from moecompress.stream.streams import TokenRun
from moecompress.types import PROJECTIONS, ExpertWeights, LayerWeights, QuantizedTensor, Scoring, Weight


def router_comparison(
    original: tuple[Tensor, Tensor], compressed: tuple[Tensor, Tensor], scoring: Scoring
) -> dict[str, float | None]:
    """Two router logs (logits [n, E], ids [n, K]) of the same tokens.

    topk_agreement: mean over tokens of |S and S'| / |S or S'| of the chosen sets; kl: mean KL(original || compressed)
    in nats, None when the numbers of experts differ.
    """
    agreement = set_agreement(original[1], compressed[1])
    if original[0].shape != compressed[0].shape:
        return {"topk_agreement": agreement, "kl": None}
    return {"topk_agreement": agreement, "kl": routing_divergence(original[0], compressed[0], scoring)}


def expert_use(original: LayerWeights, weights: LayerWeights, before: Tensor, after: Tensor) -> dict[str, float]:
    """What one token uses of a layer's routed experts, mean over tokens: how many, and how many stored bytes of them.

    before, after: places of the chosen experts [n, K] in the weights of the source and of the output; the number of
    experts = a slot that is skipped.
    """
    return {
        "experts_before": _used(before, len(original.experts)).sum().item(),
        "experts": _used(after, len(weights.experts)).sum().item(),
        "bytes_before": float((_used(before, len(original.experts)) * _stored(original)).sum()),
        "bytes": float((_used(after, len(weights.experts)) * _stored(weights)).sum()),
    }


def _used(ids: Tensor, experts: int) -> Tensor:
    """How often each expert is used per token: float64 [E]."""
    return torch.bincount(ids.reshape(-1), minlength=experts + 1)[:experts].double() / ids.shape[0]


def _stored(weights: LayerWeights) -> Tensor:
    """Bytes of every expert's matrices with scales and zero points: float64 [E]."""
    sizes = [
        sum(
            stored_bits(weight.shape, weight.scheme, weight.scales.dtype) / 8
            if isinstance(weight, QuantizedTensor)
            else weight.nbytes
            for weight in (expert.gate_up, expert.down)
        )
        for expert in weights.experts
    ]
    return torch.tensor(sizes, dtype=torch.float64)


def stream_error(run: TokenRun, layer: int) -> float:
    """|X_c - X_o|^2 / |X_o|^2 of the hidden states that enter `layer`, over the measured sequences."""
    original, compressed = run.store("original", layer), run.store("compressed", layer)
    error = size = 0.0
    for row in run.measured:
        a, b = original.read(row, row + 1).double(), compressed.read(row, row + 1).double()
        error += float((a - b).square().sum())
        size += float(a.square().sum())
    return error / size if size else 0.0


def weight_error(before: Weight, after: Weight) -> float:
    """|W - Q|^2 / |W|^2 of one matrix; 0 for an untouched one."""
    if before is after:
        return 0.0
    a, b = materialise(before, torch.float32), materialise(after, torch.float32)
    size = float(a.double().square().sum())
    return float((a - b).double().square().sum()) / size if size else 0.0


def expert_rows(
    original: LayerWeights,
    weights: LayerWeights,
    forward: Forward,
    statistics: Mapping[str, Mapping[str, Tensor]],
    notes: Mapping[int, Mapping[str, Any]],
    comparable: Callable[[int, ExpertWeights], ExpertWeights] = lambda _, expert: expert,
) -> list[dict[str, Any]]:
    """report.json rows of one layer's experts. statistics: `routing_counts` and `token_sample`, when measured.

    notes: what the passes said about an expert (`action`, `fallback`, `importance`), by source id.
    comparable: an output expert with the exact transforms of the passes (smoothing scales) taken back, so that it fits
    the source's inputs.
    """
    remaining = dict(zip(weights.source_ids, range(len(weights.experts)), strict=True))
    tokens = statistics.get("routing_counts", {}).get("tokens")
    rows = []
    for index, before in enumerate(original.experts):
        number = remaining.get(index)
        after = None if number is None else weights.experts[number]
        like = None if number is None or after is None else comparable(number, after)
        rows.append(
            {
                "id": index,
                "tokens": None if tokens is None else int(tokens[index]),
                "bits": {"gate_up": None, "down": None} if after is None else _bits(after),
                "weight_error": None if like is None else _expert_weight_error(before, like),
                "error": _error(forward, before, like, index, statistics.get("token_sample")),
                "action": _action(before, after),
                **notes.get(index, {}),
            }
        )
    return rows


def _error(
    forward: Forward,
    before: ExpertWeights,
    after: ExpertWeights | None,
    index: int,
    sample: Mapping[str, Tensor] | None,
) -> float | None:
    if after is None or sample is None:
        return None
    return output_error(forward, before, after, index, sample)


def _bits(expert: ExpertWeights) -> dict[str, int]:
    found: dict[str, int] = {}
    for name in PROJECTIONS:
        weight = expert.projection(name)
        found[name] = weight.scheme.bits if isinstance(weight, QuantizedTensor) else 16
    return found


def _action(before: ExpertWeights, after: ExpertWeights | None) -> str:
    if after is None or all(before.projection(name) is after.projection(name) for name in PROJECTIONS):
        return "kept"
    coded = any(isinstance(after.projection(name), QuantizedTensor) for name in PROJECTIONS)
    return "quantized" if coded else "changed"


def _expert_weight_error(before: ExpertWeights, after: ExpertWeights) -> float:
    sizes = [before.projection(name).shape.numel() for name in PROJECTIONS]
    errors = [weight_error(before.projection(name), after.projection(name)) for name in PROJECTIONS]
    return sum(size * error for size, error in zip(sizes, errors, strict=True)) / sum(sizes)
