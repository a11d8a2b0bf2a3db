"""allocate.global: one budget over the whole model, units as small as one projection of one expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from moecompress.errors import RecipeError, message
from moecompress.numerics.allocation import Infeasible, Problem, Solution, solve
from moecompress.passes.allocator import UNITS, Allocator, Pool, expert_shapes, matrix_bits
from moecompress.passes.base import Decision, ModelContext
from moecompress.passes.quantizer import Bits, Quantizer
from moecompress.stats.routing import RoutingCounts
from moecompress.stats.sensitivity import shrunk
from moecompress.types import PROJECTIONS, MoESite, Projection

Costs = NDArray[np.float64]


class AllocateGlobal(Allocator):
    """The choice of widths with the least summed squared output error that fits the budget, over all layers at once.

    Errors are those of the quantizer that follows, and are weighted by how much the model's predictions depend on each
    element of a layer's output (`weighting: fisher`), which makes layers comparable. Experts with few tokens are drawn
    towards their layer's mean. The proven gap to the optimum is in the decision.
    """

    name: ClassVar[str] = "allocate.global"
    paper: ClassVar[str] = "multiple-choice knapsack over Fisher-weighted errors (cf. GEMQ 2605.23078)"

    bits: tuple[Bits, ...] = Field((1, 2, 3, 4, 8), min_length=1, description="widths to choose from")
    weighting: Literal["fisher", "none"] = Field(
        "fisher", description="weigh errors by the loss's squared gradient at the layer's output, or not at all"
    )
    sequences: int = Field(32, ge=1, description="calibration sequences for the gradients")
    granularity: Literal["projection", "expert"] = Field("projection", description="what has a width of its own")
    per_layer: bool = Field(False, description="the same budget for every layer instead of one for the model")
    per_layer_uniform: bool = Field(False, description="one width per layer, for engines that need it")

    @model_validator(mode="after")
    def _consistent(self) -> AllocateGlobal:
        if self.per_layer and self.per_layer_uniform:
            raise ValueError("per_layer with per_layer_uniform leaves one width for all; allowed: one of them")
        return self

    def decide(self, context: ModelContext) -> Decision:
        """Costs of all units, the knapsack, and the widths by layer."""
        assert isinstance(context.quantizer, Quantizer)
        counts = {index: len(found[RoutingCounts.name]["tokens"]) for index, found in context.statistics.items()}
        pool = self.pool(context.facts, context.quantizer, context.fixed_bytes, counts)
        fisher = context.fisher(self.sequences) if self.weighting == "fisher" else {}
        costs, sizes, importance = {}, {}, {}
        for index, found in sorted(context.statistics.items()):
            site = context.facts.layers[index].site
            assert site is not None
            costs[index] = self._units(_weighed(found, "errors", fisher.get(index)))
            sizes[index] = self._sizes(site, counts[index], context.quantizer, pool, context.facts.dtype)
            importance[index] = _weighed(found, "energy", fisher.get(index))
        choices: dict[int, NDArray[np.int64]] = {}
        total = bound = 0.0
        for layers in [[index] for index in costs] if self.per_layer else [list(costs)]:
            share = sum(sizes[index][..., -1].sum() for index in layers)
            budget = pool.total * int(share) // sum(int(one[..., -1].sum()) for one in sizes.values())
            solution = self._solved([costs[i] for i in layers], [sizes[i] for i in layers], budget, pool)
            total, bound = total + solution.cost, bound + solution.bound
            shapes = [costs[index].shape[:2] for index in layers]
            parts = np.split(solution.choice, np.cumsum([a * b for a, b in shapes])[:-1])
            choices |= {i: part.reshape(shape) for i, part, shape in zip(layers, parts, shapes, strict=True)}
        allocation = {index: self._by_projection(values, counts[index]) for index, values in choices.items()}
        extra = {"predicted_cost": total, "gap": max(0.0, total - bound) / total if total > 0 else 0.0}
        return self.decision(context, allocation, importance, extra)

    @property
    def _apart(self) -> bool:
        return self.granularity == "projection" and not self.per_layer_uniform

    def _units(self, errors: Tensor) -> Costs:
        """[E, units, widths] -> [E, P, widths] (P = 2 projections, or 1), or [1, 1, widths] for one width per layer."""
        made = errors[:, : len(PROJECTIONS)] if self._apart else errors[:, list(UNITS).index("expert")][:, None]
        costs: Costs = (made.sum(0, keepdim=True) if self.per_layer_uniform else made).double().numpy()
        return np.minimum.accumulate(costs, axis=-1)  # more bits never cost more

    def _sizes(
        self, site: MoESite, experts: int, quantizer: Quantizer, pool: Pool, dtype: torch.dtype
    ) -> NDArray[np.int64]:
        """Bits of the budget that every unit takes, in the shape of `_units`."""
        one = np.array(
            [
                [matrix_bits(pool.budget, shape, quantizer.scheme_at(bits), dtype) for bits in self.bits]
                for shape in expert_shapes(site).values()
            ],
            dtype=np.int64,
        )
        if not self._apart:
            one = one.sum(0, keepdims=True)
        return one[None] * experts if self.per_layer_uniform else np.tile(one, (experts, 1, 1))

    def _solved(self, costs: Sequence[Costs], sizes: Sequence[NDArray[np.int64]], budget: int, pool: Pool) -> Solution:
        """The knapsack of these layers. Raises RecipeError with the nearest budget that can be kept."""
        widths = len(self.bits)
        cost = np.concatenate([one.reshape(-1, widths) for one in costs])
        size = np.concatenate([one.reshape(-1, widths) for one in sizes])
        try:
            return solve(Problem.of(cost, size, budget))
        except Infeasible:
            problem = pool.problem(min(self.bits)) or "too small for one layer"
            raise RecipeError(message(f"{self.name} budget '{self.budget}'", problem)) from None

    def _by_projection(self, choice: NDArray[np.int64], experts: int) -> dict[Projection, list[int]]:
        """Choices [E, P] or [1, 1] as bits of every expert by projection."""
        bits = np.array(self.bits)[np.broadcast_to(choice, (experts, len(PROJECTIONS)))]
        return {name: bits[:, place].tolist() for place, name in enumerate(PROJECTIONS)}


def _weighed(found: Mapping[str, Mapping[str, Tensor]], key: str, weight: Tensor | None) -> Tensor:
    """Measured squares [E, ..., H] summed over the output's elements with their weights, and shrunk: float64 [E, ...].

    Where experts write another space than the layer's output (latent experts), all elements weigh the same.
    """
    measured = found["sensitivity"]
    squares = measured[key].double()
    if weight is None:
        sums = squares.sum(-1)
    elif weight.shape[0] == squares.shape[-1]:
        sums = squares @ weight.double()
    else:
        sums = squares.sum(-1) * float(weight.double().mean())
    return shrunk(sums, measured["sampled"], found[RoutingCounts.name]["tokens"])
