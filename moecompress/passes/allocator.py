"""What every pass that divides a budget of bits among experts shares: sizes, measured errors, its decision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor

from moecompress.checkpoint.native import plan_record
from moecompress.numerics.grids import stored_bits
from moecompress.passes.base import Decision, LayerContext, ModelContext, Pass, Scope
from moecompress.passes.quantizer import Bits, Quantizer
from moecompress.sizes import Budget, parse_budget
from moecompress.stats.base import Statistic
from moecompress.stats.routing import RoutedProbability, RoutingCounts, TokenSample
from moecompress.stats.sensitivity import output_errors
from moecompress.types import (
    BITS,
    PROJECTIONS,
    ExpertWeights,
    LayerWeights,
    ModelFacts,
    MoESite,
    Projection,
    Scheme,
    Stream,
)

UNITS: Mapping[str, tuple[Projection, ...]] = {"gate_up": ("gate_up",), "down": ("down",), "expert": PROJECTIONS}
Allocation = Mapping[int, Mapping[Projection, Sequence[int]]]  # layer -> projection -> bits of every expert


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
        weights, everywhere = 0, dict.fromkeys(BITS, 0)
        for layer in facts.moe_layers:
            assert layer.site is not None
            count = (experts or {}).get(layer.index, layer.site.num_experts)
            for shape in expert_shapes(layer.site).values():
                weights += count * shape[0] * shape[1]
                for bits in BITS:
                    everywhere[bits] += count * matrix_bits(budget, shape, quantizer.scheme_at(bits), facts.dtype)
        per_weight = int(budget.value * weights + 1e-6)
        total = (int(budget.value) - fixed) * 8 if budget.kind == "bytes" else per_weight
        return cls(budget, total, weights, everywhere, fixed)

    def problem(self, least: int) -> str | None:
        """Why not even `least` bits everywhere fit, with the nearest budget that can be kept; None = they do."""
        need = self.everywhere[least]
        if need <= self.total:
            return None
        near = f"{-(-need * 1000 // self.weights) / 1000:g} {self.budget.kind}"
        if self.budget.kind == "bytes":
            near = f"{self.fixed + -(-need // 8)} B"
        return f"too small even for {least} bits everywhere; the nearest feasible budget is '{near}'"

    def mean_bits(self) -> float:
        """Code bits per weight that the budget pays for, as sizes grow evenly between widths; within 1 .. 8."""
        below = max((b for b in BITS if self.everywhere[b] <= self.total), default=BITS[0])
        above = min((b for b in BITS if b > below), default=None)
        if above is None or self.total < self.everywhere[below]:
            return float(below)
        step = (self.total - self.everywhere[below]) / (self.everywhere[above] - self.everywhere[below])
        return below + step * (above - below)


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


class Allocator(Pass):
    """Measures what every width costs every expert, then divides the budget. Changes nothing itself.

    Errors are output errors of the layer on real tokens, weighted by the routing weights, one expert or projection
    rounded at a time (exact: see `stats.sensitivity`).
    """

    scope: ClassVar[Scope] = Scope.MODEL
    changes: ClassVar[frozenset[str]] = frozenset()
    propagate: ClassVar[Stream] = "original"

    bits: tuple[Bits, ...] = Field((1, 2, 3), min_length=1, description="widths to choose from")
    budget: str = Field(description="'2.5 bits' (codes), '2.75 bpw' (codes, scales, zero points) or '12 GiB' (output)")
    tokens: int = Field(4096, ge=1, description="calibration tokens per layer on which errors are measured")
    calibration: str = Field("default", description="the calibration set to use")

    @field_validator("bits")
    @classmethod
    def _distinct(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) != len(value):
            raise ValueError(f"{list(value)} names a width twice")
        return tuple(sorted(value))

    @field_validator("budget")
    @classmethod
    def _is_budget(cls, value: str) -> str:
        parse_budget(value)
        return value

    def needs(self) -> tuple[Statistic, ...]:
        return RoutingCounts(), RoutedProbability(), TokenSample(self.tokens)

    def pool(
        self, facts: ModelFacts, quantizer: Quantizer, fixed: int, experts: Mapping[int, int] | None = None
    ) -> Pool:
        """The budget of this pass for one model."""
        return Pool.of(parse_budget(self.budget), facts, quantizer, fixed, experts)

    def candidates(self, context: LayerContext, expert: int, hessians: Mapping[str, Tensor]) -> Iterator[ExpertWeights]:
        """The weights to try for one expert, in order: for every unit of UNITS every width."""
        weights = context.weights.experts[expert]
        made: dict[tuple[str, int], Any] = {}
        for projection in PROJECTIONS:
            value = weights.projection(projection)
            for bits in self.bits:
                made[projection, bits] = (
                    self.trial(context, value.float(), bits, hessians.get(projection))
                    if isinstance(value, Tensor)
                    else value  # it has codes already and keeps them
                )
        for projections in UNITS.values():
            for bits in self.bits:
                tried = weights
                for projection in projections:
                    tried = tried.with_projection(projection, made[projection, bits])
                yield tried

    def trial(self, context: LayerContext, weight: Tensor, bits: int, hessian: Tensor | None) -> Any:
        """One matrix at `bits`: as the quantizer that follows will make it."""
        assert isinstance(context.quantizer, Quantizer)
        return context.quantizer.trial(weight, bits, hessian, context.scale_dtype)

    def wants_hessians(self, context: LayerContext) -> bool:
        """Whether `trial` looks at second moments."""
        return isinstance(context.quantizer, Quantizer) and context.quantizer.trial_hessian

    def measure(self, context: LayerContext) -> Mapping[str, Mapping[str, Tensor]]:
        """errors float32 [E, units, widths, H]; energy: of removing the expert, [E, H]; sampled: int64 [E]."""
        sample = context.statistics[TokenSample.name]
        experts = len(context.weights.experts)
        errors = torch.zeros(experts, len(UNITS) * len(self.bits), sample["hidden"].shape[1])
        energy, sampled = torch.zeros(experts, errors.shape[-1]), torch.zeros(experts, dtype=torch.int64)
        for index, weights in enumerate(context.weights.experts):
            rows, slots = (sample["ids"] == index).nonzero(as_tuple=True)
            sampled[index] = len(rows)
            if not len(rows):
                continue
            inputs, gates = sample["hidden"][rows].float(), sample["weights"][rows, slots]
            hessians = _hessians(context, weights, inputs) if self.wants_hessians(context) else {}
            wanted = context.forward(weights, inputs)
            outputs = (context.forward(made, inputs) for made in self.candidates(context, index, hessians))
            errors[index] = output_errors(wanted, gates, outputs)
            energy[index] = output_errors(wanted, gates, [torch.zeros_like(wanted)])[0]
        kept = {name: values for name, values in context.statistics.items() if name != TokenSample.name}
        shaped = errors.unflatten(1, (len(UNITS), len(self.bits)))
        return {**kept, "sensitivity": {"errors": shaped, "energy": energy, "sampled": sampled}}

    def apply(self, context: LayerContext, decision: Decision) -> LayerWeights:
        return context.weights

    def decision(
        self, context: ModelContext, allocation: Allocation, importance: Mapping[int, Tensor], extra: Mapping[str, Any]
    ) -> Decision:
        """Widths, importances and what the budget became, as JSON."""
        quantizer, budget = context.quantizer, parse_budget(self.budget)
        assert isinstance(quantizer, Quantizer)
        used = stored = codes = weights = 0
        layers: dict[str, Any] = {}
        for layer in context.facts.moe_layers:
            assert layer.site is not None
            chosen = {name: [int(bits) for bits in widths] for name, widths in allocation[layer.index].items()}
            for name, shape in expert_shapes(layer.site).items():
                for bits in chosen[name]:
                    scheme = quantizer.scheme_at(bits)
                    used += matrix_bits(budget, shape, scheme, context.facts.dtype)
                    stored += stored_bits(shape, scheme, context.facts.dtype)
                    codes += bits * shape[0] * shape[1]
                    weights += shape[0] * shape[1]
            values = importance[layer.index]
            notes = {str(index): {"importance": float(value)} for index, value in enumerate(values)}
            layers[str(layer.index)] = {"bits": chosen, "experts": notes}
        means = {"mean_bits": codes / weights, "stored_bits": stored}
        return Decision({"layers": layers, "used_bits": used, **means, **extra})


def _hessians(context: LayerContext, weights: ExpertWeights, inputs: Tensor) -> dict[str, Tensor]:
    """sum x x^T of what both projections of one expert receive."""
    up = weights.gate_up if isinstance(weights.gate_up, Tensor) else None
    found = {"gate_up": inputs.t() @ inputs}
    if up is not None:
        bias = weights.gate_up_bias
        middle = context.activate(
            torch.nn.functional.linear(inputs, up.float(), None if bias is None else bias.float())
        )
        found["down"] = middle.t() @ middle
    return found
