"""The one experts module: it serves streaming, loading and execution.

It stands where transformers' stacked experts stood and is called the same way, `(hidden [T, H], ids [T, K],
weights [T, K]) -> [T, H]`. Weights may be dense in any dtype or quantized, per expert; at most one expert is expanded
at a time and `[E, T, H]` never exists. The id `E` (number of experts) means "skip this slot".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moecompress.checkpoint.native import RecordLayout, decode
from moecompress.errors import message
from moecompress.numerics.grids import dequantize
from moecompress.types import ExpertWeights, QuantizedTensor, Weight


class ExpertObserver(Protocol):
    """What may watch the experts of one layer run. Tensors are inputs aligned with their gates, in the run's dtype."""

    def on_routing(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        """hidden [T, H], ids int64 [T, K], weights [T, K] of one call."""

    def on_expert(
        self, expert: int, rows: Tensor, weights: Tensor, inputs: Tensor, intermediate: Tensor, outputs: Tensor
    ) -> None:
        """rows int64 [n], weights [n], inputs [n, H], intermediate [n, I], unweighted outputs [n, H]."""


def materialise(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The matrix in `dtype`: dequantized, or cast (no copy when it already has that dtype)."""
    return dequantize(weight, dtype) if isinstance(weight, QuantizedTensor) else weight.to(dtype)


def routed_slots(ids: Tensor, num_experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(expert, token rows, slots) for every expert that is hit, ascending; rows ascending; sentinel ids skipped.

    ids: int64 [T, K]. Raises ValueError for ids outside [0, E].
    """
    flat = ids.reshape(-1)
    if flat.numel() and not (0 <= int(flat.min()) and int(flat.max()) <= num_experts):
        raise ValueError(message("expert ids", f"[{int(flat.min())}, {int(flat.max())}]", f"0..{num_experts}"))
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=num_experts + 1).tolist()
    start = 0
    for expert in range(num_experts):
        if counts[expert]:
            at = order[start : start + counts[expert]]
            yield expert, at // ids.shape[1], at % ids.shape[1]
        start += counts[expert]


class Experts(nn.Module):
    """Routed experts of one layer. Made from the family's own module (`replacing`), which gives the activation."""

    has_gate: bool
    _gate: Any

    def __init__(self) -> None:
        super().__init__()
        self.weights: Sequence[ExpertWeights] = ()
        self.observer: ExpertObserver | None = None

    @classmethod
    def replacing(cls, original: nn.Module) -> Experts:
        """An empty experts module with the activation, limits and flags of `original` (never its weights).

        The family's own `_apply_gate` is bound, so custom activations (clamps, alpha) need no code here.
        """
        gate = getattr(type(original), "_apply_gate", None)
        made = type(f"{cls.__name__}Of{type(original).__name__}", (cls,), {"_apply_gate": gate})()
        for name, value in vars(original).items():
            if not name.startswith("_") and name != "training":
                setattr(made, name, value)
        for name, child in original.named_children():
            made.add_module(name, child)
        made._is_expert_parallel = False
        made.eval()
        return made

    def __len__(self) -> int:
        return len(self.weights)

    def expert(self, index: int) -> ExpertWeights:
        """Weights of one expert, dense or quantized; packed subclasses decode here."""
        return self.weights[index]

    def activate(self, projected: Tensor) -> Tensor:
        """[n, 2I] (or [n, I] without a gate) -> [n, I], by the family's own rule."""
        return self._apply_gate(projected) if self.has_gate else self.act_fn(projected)  # type: ignore[operator]

    def run_expert(self, weights: ExpertWeights, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """One expert on `inputs` [n, H]: (intermediate [n, I], output [n, H]), routing weight not applied."""
        dtype = inputs.dtype
        up_bias, down_bias = weights.gate_up_bias, weights.down_bias
        projected = F.linear(
            inputs, materialise(weights.gate_up, dtype), None if up_bias is None else up_bias.to(dtype)
        )
        intermediate = self.activate(projected)
        output = F.linear(
            intermediate, materialise(weights.down, dtype), None if down_bias is None else down_bias.to(dtype)
        )
        if getattr(self, "has_post_expert_norm", False):
            output = self.post_expert_norm(output)  # type: ignore[operator]
        return intermediate, output

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        ids, weights = top_k_index.reshape(-1, top_k_index.shape[-1]), top_k_weights
        weights = weights.reshape(ids.shape)
        if self.observer is not None:
            self.observer.on_routing(hidden_states, ids, weights)
        out = torch.zeros_like(hidden_states)
        for expert, rows, slots in routed_slots(ids, len(self)):
            inputs = hidden_states[rows]
            gates = weights[rows, slots]
            intermediate, output = self.run_expert(self.expert(expert), inputs)
            if self.observer is not None:
                self.observer.on_expert(expert, rows, gates, inputs, intermediate, output)
            out = out.index_add(0, rows, (output * gates[:, None].to(output.dtype)).to(out.dtype))
        return out


class PackedExperts(Experts):
    """Experts whose weights stay in native records: parameters `rec0..`, `slot_map`, the guard, and dense biases.

    Parameter names avoid words that transformers forces to float32 (scale, norm, bias, base).
    """

    def set_layouts(self, layouts: Sequence[RecordLayout], counts: Sequence[int]) -> None:
        """Register empty parameters for `counts[k]` records of each layout, on the current default device."""
        self.layouts = tuple(layouts)
        for k, (layout, count) in enumerate(zip(layouts, counts, strict=True)):
            self.register_parameter(f"rec{k}", _frozen(torch.empty(count, layout.row_bytes, dtype=torch.uint8)))
        self.slot_map = _frozen(torch.empty(sum(counts), 2, dtype=torch.int32))
        self.down_proj = _frozen(torch.empty(1, dtype=torch.uint8))

    def __len__(self) -> int:
        return int(self.slot_map.shape[0])

    def expert(self, index: int) -> ExpertWeights:
        k, row = self.slot_map[index].tolist()
        weights = decode(self.layouts[k], getattr(self, f"rec{k}")[row])
        gate_up_bias = getattr(self, "gate_up_proj_bias" if self.has_gate else "up_proj_bias", None)
        down_bias = getattr(self, "down_proj_bias", None)
        if gate_up_bias is None and down_bias is None:
            return weights
        return ExpertWeights(
            weights.gate_up,
            weights.down,
            None if gate_up_bias is None else gate_up_bias[index],
            None if down_bias is None else down_bias[index],
        )


def _frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
