"""The routed experts of one layer on a sample of its inputs: which tokens go where, targets, codes by GPTQ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moecompress.numerics.gptq import gptq
from moecompress.numerics.grids import dequantize
from moecompress.types import QuantizedTensor, Scheme

Intermediate = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class BlockSample:
    """Real inputs of a block. hidden: float32 [T, H]. ids: int64 [T, K], E = skipped. weights: float32 [T, K].

    target: float32 [T, H], what the routed experts together should give.
    """

    hidden: Tensor
    ids: Tensor
    weights: Tensor
    target: Tensor

    def rows(self, rows: Tensor) -> BlockSample:
        return BlockSample(self.hidden[rows], self.ids[rows], self.weights[rows], self.target[rows])


def own_outputs(sample: BlockSample, outputs: Callable[[int, Tensor], Tensor], experts: int) -> BlockSample:
    """The same inputs with every slot as a token of its own: each expert is to give its own output, gates aside.

    outputs(e, inputs [n, H]) -> [n, H]. The result has T * K tokens and K = 1.
    """
    count = sample.ids.shape[1]
    flat = BlockSample(
        sample.hidden.repeat_interleave(count, 0),
        sample.ids.reshape(-1, 1),
        torch.ones_like(sample.weights).reshape(-1, 1),
        sample.hidden.new_zeros(sample.ids.numel(), sample.hidden.shape[1]),
    )
    target = flat.target.clone()
    for expert, rows, _ in routed(flat.ids, experts):
        target[rows] = outputs(expert, flat.hidden[rows])
    return replace(flat, target=target)


def routed(ids: Tensor, experts: int) -> list[tuple[int, Tensor, Tensor]]:
    """(expert, rows, slots) for every expert that is hit, ascending; the id `experts` is skipped. ids: int64 [T, K]."""
    flat = ids.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=experts + 1)[: experts + 1].tolist()
    parts = torch.split(order, counts)[:experts]
    return [(e, at // ids.shape[1], at % ids.shape[1]) for e, at in enumerate(parts) if at.numel()]


@dataclass(frozen=True)
class Moments:
    """Sums of x x^T over `tokens` slots, float32: gate_up [H, H] of the inputs, down [I, I] of the intermediates."""

    gate_up: Tensor
    down: Tensor
    tokens: int


def pooled_moments(
    sample: BlockSample,
    gate_up: Sequence[Tensor],
    intermediate: Callable[[int], Intermediate],
    columns: tuple[int, int],
) -> Moments:
    """Moments over all experts' tokens, inputs weighed by their gates. columns: H and I.

    intermediate(e)(gate_up [2I, H], inputs [n, H]) -> [n, I].
    """
    found = [torch.zeros(size, size) for size in columns]
    count = 0
    for expert, rows, slots in routed(sample.ids, len(gate_up)):
        inputs, gates = sample.hidden[rows], sample.weights[rows, slots][:, None]
        for total, x in zip(found, (inputs, intermediate(expert)(gate_up[expert], inputs)), strict=True):
            weighed = x * gates
            total.addmm_(weighed.t(), weighed)
        count += rows.numel()
    return Moments(found[0], found[1], count)


def gptq_expert(
    gate_up: Tensor,
    down: Tensor,
    inputs: Tensor,
    gates: Tensor,
    intermediate: Intermediate,
    schemes: tuple[Scheme, Scheme],
    scale_dtype: torch.dtype,
    prior: Moments | None = None,
    weight: float = 0.0,
) -> tuple[QuantizedTensor, QuantizedTensor]:
    """One expert by GPTQ on its own tokens: inputs [n, H], gates [n, 1].

    down sees what the rounded gate_up makes of the inputs and aims at what the original made of them. prior: this many
    (`weight`) of its mean tokens are added to the expert's own, for experts with few or none.
    """
    weighed = inputs * gates
    hessian = weighed.t() @ weighed
    wanted, share = intermediate(gate_up, inputs) * gates, 0.0
    if prior is not None:
        share = weight / max(1, prior.tokens)
        hessian += prior.gate_up * share
    first = gptq(gate_up, hessian, schemes[0], scale_dtype=scale_dtype).q
    found = intermediate(dequantize(first), inputs) * gates
    hessian, delta = found.t() @ found, (wanted - found).t() @ found
    if prior is not None:
        hessian += prior.down * share
    return first, gptq(down, hessian, schemes[1], scale_dtype=scale_dtype, delta=delta).q
