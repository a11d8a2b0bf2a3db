"""What every pass that divides a budget of bits among experts shares: sizes, measured errors, its decision."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from moecompress.errors import RecipeError
from moecompress.numerics.grids import stored_bits
from moecompress.passes.base import Decision, LayerContext, ModelContext, Pass, Scope
from moecompress.passes.budget import Pool, absent, expert_shapes, matrix_bits, scheme_at
from moecompress.passes.quantizer import Quantizer
from moecompress.sizes import parse_budget
from moecompress.stats.base import Statistic
from moecompress.stats.routing import RoutedProbability, RoutingCounts, TokenSample
from moecompress.stats.sensitivity import output_errors
from moecompress.types import (
    PROJECTIONS,
    ExpertWeights,
    LayerWeights,
    ModelFacts,
    Projection,
    Stream,
)

UNITS: Mapping[str, tuple[Projection, ...]] = {"gate_up": ("gate_up",), "down": ("down",), "expert": PROJECTIONS}
Width = Literal[0, 1, 2, 3, 4, 8]  # 0: the expert goes, and no token is sent to it
Allocation = Mapping[int, Mapping[Projection, Sequence[int]]]  # layer -> projection -> bits of every expert


class Allocator(Pass):
    """Measures what every width costs every expert, then divides the budget. Itself it only empties experts of 0 bits.

    Errors are output errors of the layer on real tokens, weighted by the routing weights, one expert or projection
    rounded at a time (exact: see `stats.sensitivity`). An expert of 0 bits costs all that it contributes.
    """

    scope: ClassVar[Scope] = Scope.MODEL
    changes: ClassVar[frozenset[str]] = frozenset({"experts"})
    propagate: ClassVar[Stream] = "original"

    bits: tuple[Width, ...] = Field((1, 2, 3), min_length=1, description="widths to choose from; 0 = no expert")
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

    def infeasible(self, facts: ModelFacts, pool: Pool) -> str | None:
        """Why no division keeps the budget, with the nearest one that can be kept; None = one does."""
        return pool.problem(min(self.bits))

    def candidates(self, context: LayerContext, expert: int, hessians: Mapping[str, Tensor]) -> Iterator[ExpertWeights]:
        """The weights to try for one expert, in order: for every unit of UNITS every width."""
        weights = context.weights.experts[expert]
        made: dict[tuple[str, int], Any] = {}
        for projection in PROJECTIONS:
            value = weights.projection(projection)
            for bits in filter(None, self.bits):
                made[projection, bits] = (
                    self.trial(context, value.float(), bits, hessians.get(projection))
                    if isinstance(value, Tensor)
                    else value  # it has codes already and keeps them
                )
        for projections in UNITS.values():
            for bits in self.bits:
                tried = weights if bits else absent(weights)
                for projection in projections if bits else ():
                    tried = tried.with_projection(projection, made[projection, bits])
                yield tried

    def probe(self, context: LayerContext, expert: int) -> ExpertWeights | None:
        """A change of an expert by which its layer's errors are weighed; None = they are not."""
        return None

    def trial(self, context: LayerContext, weight: Tensor, bits: int, hessian: Tensor | None) -> Any:
        """One matrix at `bits`: as the quantizer that follows will make it."""
        assert isinstance(context.quantizer, Quantizer)
        return context.quantizer.trial(weight, bits, hessian, context.scale_dtype)

    def wants_hessians(self, context: LayerContext) -> bool:
        """Whether `trial` looks at second moments."""
        return isinstance(context.quantizer, Quantizer) and context.quantizer.trial_hessian

    def measure(self, context: LayerContext) -> Mapping[str, Mapping[str, Tensor]]:
        """errors float32 [E, units, widths, H]; energy: of removing the expert, [E, H]; sampled: int64 [E].

        probe: errors of `probe`, [E, H].
        """
        sample = context.statistics[TokenSample.name]
        experts = len(context.weights.experts)
        errors = torch.zeros(experts, len(UNITS) * len(self.bits), sample["hidden"].shape[1])
        energy, sampled = torch.zeros(experts, errors.shape[-1]), torch.zeros(experts, dtype=torch.int64)
        probe = torch.zeros_like(energy)
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
            if (changed := self.probe(context, index)) is not None:
                probe[index] = output_errors(wanted, gates, [context.forward(changed, inputs)])[0]
        kept = {name: values for name, values in context.statistics.items() if name != TokenSample.name}
        shaped = errors.unflatten(1, (len(UNITS), len(self.bits)))
        return {**kept, "sensitivity": {"errors": shaped, "energy": energy, "probe": probe, "sampled": sampled}}

    @abstractmethod
    def prepared(self, context: ModelContext) -> Any:
        """Whatever of the measured errors does not depend on the budget."""

    @abstractmethod
    def divided(self, context: ModelContext, prepared: Any) -> Decision:
        """The budget's division. Raises RecipeError, naming the nearest one, for a budget that cannot be kept."""

    def decide(self, context: ModelContext) -> Decision:
        """`divided`; `curve`: what other budgets would have given."""
        prepared = self.prepared(context)
        decision = self.divided(context, prepared)
        counts = {index: len(found[RoutingCounts.name]["tokens"]) for index, found in context.statistics.items()}
        assert isinstance(context.quantizer, Quantizer)
        pool = self.pool(context.facts, context.quantizer, context.fixed_bytes, counts)
        curve = self.curve(context, pool.budgets(min(self.bits), max(self.bits)), prepared)
        return replace(decision, data={**decision.data, "curve": curve})

    def curve(self, context: ModelContext, budgets: Sequence[str], prepared: Any = None) -> list[dict[str, Any]]:
        """For every budget what its division gives, from one set of statistics: {budget, mean_bits,
        stored_bits_per_weight, predicted_cost, predicted_kl}, or {budget, problem}."""
        prepared = self.prepared(context) if prepared is None else prepared
        rows: list[dict[str, Any]] = []
        for budget in budgets:
            try:
                data = self.model_copy(update={"budget": budget}).divided(context, prepared).data
            except RecipeError as error:
                rows.append({"budget": budget, "problem": str(error)})
                continue
            names = ("mean_bits", "stored_bits_per_weight", "predicted_cost", "predicted_kl")
            rows.append({"budget": budget, **{name: data.get(name) for name in names}})
        return rows

    def apply(self, context: LayerContext, decision: Decision) -> LayerWeights:
        bits = decision.data["layers"].get(str(context.weights.index), {}).get("bits", {}).get("down", ())
        if 0 not in bits:
            return context.weights
        pairs = zip(bits, context.weights.experts, strict=True)
        return context.weights.with_experts(tuple(expert if width else absent(expert) for width, expert in pairs))

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
                    scheme = scheme_at(quantizer, bits)
                    used += matrix_bits(budget, shape, scheme, context.facts.dtype)
                    stored += stored_bits(shape, scheme, context.facts.dtype)
                    codes += bits * shape[0] * shape[1]
                    weights += shape[0] * shape[1]
            values = importance[layer.index]
            notes: dict[str, dict[str, Any]] = {str(e): {"importance": float(value)} for e, value in enumerate(values)}
            for expert in (e for e, bits in enumerate(chosen["down"]) if bits == 0):
                notes[str(expert)]["action"] = "pruned"
            layers[str(layer.index)] = {"bits": chosen, "experts": notes}
        means = {"mean_bits": codes / weights, "stored_bits": stored, "stored_bits_per_weight": stored / weights}
        return Decision({"layers": layers, "used_bits": used, "budget": self.budget, **means, **extra})


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
