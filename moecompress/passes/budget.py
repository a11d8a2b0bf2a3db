"""Budgets of bits for routed experts: what they pay for, what every width takes of them, experts of no bits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from moecompress.checkpoint.native import plan_record
from moecompress.numerics.grids import no_bits, stored_bits
from moecompress.passes.quantizer import Quantizer
from moecompress.sizes import Budget
from moecompress.types import BITS, ExpertWeights, ModelFacts, MoESite, Projection, Scheme

_CURVE = 12  # budgets for which a decision says what they would have given


@dataclass(frozen=True)
class Pool:
    """A budget in whole bits. total: what the routed experts may take; everywhere: what they take at each width.

    Counted are, by the budget's kind, the codes; codes, scales and zero points; or whole records with their alignment.
    """

    budget: Budget
    total: int
    weights: int
    everywhere: Mapping[int, int]
    fixed: int

    @classmethod
    def of(
        cls,
        budget: Budget,
        facts: ModelFacts,
        quantizer: Quantizer,
        fixed: int,
        experts: Mapping[int, int] | None = None,
    ) -> Pool:
        """fixed: bytes of the output besides the experts' records. experts: by layer, where not the checkpoint's."""
        weights, everywhere = 0, dict.fromkeys((0, *BITS), 0)
        for layer in facts.moe_layers:
            assert layer.site is not None
            count = (experts or {}).get(layer.index, layer.site.num_experts)
            for shape in expert_shapes(layer.site).values():
                weights += count * shape[0] * shape[1]
                for bits in BITS:
                    everywhere[bits] += count * matrix_bits(budget, shape, scheme_at(quantizer, bits), facts.dtype)
        per_weight = int(budget.value * weights + 1e-6)
        total = (int(budget.value) - fixed) * 8 if budget.kind == "bytes" else per_weight
        return cls(budget, total, weights, everywhere, fixed)

    def problem(self, least: int) -> str | None:
        """Why not even `least` bits everywhere fit, with the nearest budget that can be kept; None = they do."""
        need = self.everywhere[least]
        if need <= self.total:
            return None
        return f"too small even for {least} bits everywhere; the nearest feasible budget is '{self.named(need)}'"

    def named(self, total: int) -> str:
        """The least budget that pays for `total`, as a recipe writes it."""
        if self.budget.kind == "bytes":
            return f"{self.fixed + -(-total // 8)} B"
        return f"{-(-total * 1000 // self.weights) / 1000:g} {self.budget.kind}"

    def paying(self, mean: float) -> int:
        """The least total with these `mean_bits`, 0 .. 8."""
        below = max(b for b in self.everywhere if b <= mean)
        above = min((b for b in self.everywhere if b > mean), default=below)
        step = (mean - below) / (above - below) if above > below else 0.0
        return self.everywhere[below] + math.ceil(step * (self.everywhere[above] - self.everywhere[below]))

    def mean_bits(self) -> float:
        """Code bits per weight that the budget pays for, as sizes grow evenly between widths; within 0 .. 8."""
        below = max((b for b, size in self.everywhere.items() if size <= self.total), default=0)
        above = min((b for b in BITS if b > below), default=None)
        if above is None or self.total < self.everywhere[below]:
            return float(below)
        step = (self.total - self.everywhere[below]) / (self.everywhere[above] - self.everywhere[below])
        return below + step * (above - below)

    def budgets(self, least: int, most: int) -> list[str]:
        """Budgets from `least` bits everywhere to `most`, or to a bit more than this one, as a recipe writes them."""
        low, high = self.everywhere[least], min(self.everywhere[most], max(self.total, self.everywhere[least]) * 8 // 5)
        low = low or high // _CURVE  # nothing at all is no budget
        sizes = [low + (high - low) * step // (_CURVE - 1) for step in range(_CURVE)]
        if self.budget.kind == "bytes":
            return [f"{self.fixed + -(-size // 8)} B" for size in sizes]
        return [f"{-(-size * 10000 // self.weights) / 10000:g} {self.budget.kind}" for size in sizes]


def scheme_at(quantizer: Quantizer, bits: int) -> Scheme:
    """How a quantizer stores a matrix of `bits`, 0 included."""
    return quantizer.scheme_at(bits) if bits else Scheme(0)


def absent(expert: ExpertWeights) -> ExpertWeights:
    """An expert of 0 bits in place of another: its output is zero, biases included."""
    up, down = (no_bits(weight.shape) for weight in (expert.gate_up, expert.down))
    biases = [None if bias is None else torch.zeros_like(bias) for bias in (expert.gate_up_bias, expert.down_bias)]
    return ExpertWeights(up, down, biases[0], biases[1])


def expert_shapes(site: MoESite) -> dict[Projection, tuple[int, int]]:
    """[out, in] of the projections of one expert."""
    return {"gate_up": (site.gate_up_rows, site.hidden), "down": (site.hidden, site.width)}


def expert_weights(facts: ModelFacts) -> int:
    """Weights of all routed experts."""
    sites = [layer.site for layer in facts.moe_layers if layer.site is not None]
    return sum(site.num_experts * a * b for site in sites for a, b in expert_shapes(site).values())


def matrix_bits(budget: Budget, shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype) -> int:
    """What one matrix [out, in] takes of a budget, in bits. dtype: of scales."""
    if budget.kind == "bits":
        return shape[0] * shape[1] * scheme.bits
    if budget.kind == "bpw":
        return stored_bits(shape, scheme, dtype)
    return 8 * plan_record([("weight", shape, scheme, dtype)]).row_bytes
