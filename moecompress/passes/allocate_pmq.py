"""allocate.pmq: bits per expert by PMQ's integer program, layer by layer."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from moecompress.errors import RecipeError, message
from moecompress.numerics.allocation import Infeasible, pmq, pmq_cost, pmq_least
from moecompress.numerics.grids import round_to_nearest
from moecompress.passes.allocator import UNITS, Allocator
from moecompress.passes.base import Decision, LayerContext, ModelContext
from moecompress.passes.budget import Pool
from moecompress.passes.quantizer import Quantizer
from moecompress.stats.routing import RoutedProbability, RoutingCounts
from moecompress.types import PROJECTIONS, ModelFacts, Scheme


class AllocatePMQ(Allocator):
    """PMQ (2410.06270): every layer gets the same budget; costs are usage, routing weight and output error.

    The released rule, phi^1 w^1.5 eps^1 with at least one expert at each of the two highest widths, is the default;
    `rule: paper` has the exponents of the text. eps is the norm of the block's output error over all sampled tokens
    (the released code adds norms per calibration batch, which depends on the batches).
    """

    name: ClassVar[str] = "allocate.pmq"
    paper: ClassVar[str] = "2410.06270"

    rule: Literal["released", "paper"] = Field(
        "released", description="exponents 1, 1.5, 1 or, as in the text, 1, 1, 2"
    )
    errors: Literal["minmax", "quantizer"] = Field(
        "minmax", description="errors of plain asymmetric min-max rounding, as published, or of the quantizer used"
    )

    def check(self, facts: ModelFacts) -> list[str]:
        few = [
            layer.index for layer in facts.moe_layers if layer.site and layer.site.num_experts < min(2, len(self.bits))
        ]
        return [f"layers {few} have too few experts for the two highest widths"] if few else []

    def trial(self, context: LayerContext, weight: Tensor, bits: int, hessian: Tensor | None) -> Any:
        if self.errors == "quantizer":
            return super().trial(context, weight, bits, hessian)
        assert isinstance(context.quantizer, Quantizer)
        size = context.quantizer.group_size
        scheme = Scheme(1, size, binary=True) if bits == 1 else Scheme(bits, size, False, "int")
        return round_to_nearest(weight, scheme, grid="minmax", scale_dtype=context.scale_dtype)

    def wants_hessians(self, context: LayerContext) -> bool:
        return self.errors == "quantizer" and super().wants_hessians(context)

    def prepared(self, context: ModelContext) -> tuple[dict[int, Any], dict[int, Tensor]]:
        """Costs [E, widths] and importances [E] of every layer."""
        costs, importance = {}, {}
        for index, found in sorted(context.statistics.items()):
            tokens = found[RoutingCounts.name]["tokens"].numpy()
            raw = context.facts.scoring == "softmax"
            weights = found[RoutedProbability.name]["probability"] if raw else found[RoutingCounts.name]["gate_sum"]
            errors = found["sensitivity"]["errors"][:, list(UNITS).index("expert")].double().sum(-1).sqrt()
            costs[index] = pmq_cost(tokens, weights.numpy(), errors.numpy(), self.rule)
            importance[index] = found["sensitivity"]["energy"].double().sum(-1)
        return costs, importance

    def divided(self, context: ModelContext, prepared: tuple[dict[int, Any], dict[int, Tensor]]) -> Decision:
        """Every layer with its share of the budget."""
        assert isinstance(context.quantizer, Quantizer)
        costs, importance = prepared
        counts = {index: len(cost) for index, cost in costs.items()}
        pool = self.pool(context.facts, context.quantizer, context.fixed_bytes, counts)
        allocation, total = {}, 0.0
        for index, cost in costs.items():
            widths = self._widths(index, cost, pool)
            allocation[index] = dict.fromkeys(PROJECTIONS, widths)
            total += sum(cost[e, self.bits.index(bits)] for e, bits in enumerate(widths))  # type: ignore[arg-type]
        return self.decision(context, allocation, importance, {"predicted_cost": float(total), "predicted_kl": None})

    def _widths(self, layer: int, cost: Any, pool: Pool) -> list[int]:
        """pmq on one layer, with the error in the words of the recipe."""
        try:
            return pmq(cost, self.bits, _layer_bits(pool, len(cost)))
        except Infeasible:
            found = self._too_small(pool, len(cost)) or "the budget is too small"
            raise RecipeError(message(f"{self.name} layer {layer}", found)) from None

    def infeasible(self, facts: ModelFacts, pool: Pool) -> str | None:
        experts = sorted({layer.site.num_experts for layer in facts.moe_layers if layer.site is not None})
        problems = (self._too_small(pool, count) for count in experts if count >= min(2, len(self.bits)))
        return super().infeasible(facts, pool) or next((problem for problem in problems if problem), None)

    def _too_small(self, pool: Pool, experts: int) -> str | None:
        """Why a layer of so many experts cannot keep its share; None = it can."""
        least = pmq_least(self.bits, experts)
        if _layer_bits(pool, experts) >= least:
            return None
        return (
            f"{pool.mean_bits():.3f} bits on average, but the two highest widths need {least / experts:g}; the nearest "
            f"feasible budget is '{pool.named(pool.paying(least / experts))}' (or use other widths, or allocate.global)"
        )


def _layer_bits(pool: Pool, experts: int) -> int:
    """Whole code bits per weight of one layer, summed over its experts."""
    return int(pool.mean_bits() * experts + 1e-6)
