"""allocate.global: one budget over the whole model, units as small as one projection of one expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from moecompress.errors import RecipeError, message
from moecompress.numerics.allocation import Infeasible, Problem, Solution, solve
from moecompress.numerics.grids import round_to_nearest
from moecompress.passes.allocator import UNITS, Allocator, Width
from moecompress.passes.base import Decision, LayerContext, ModelContext
from moecompress.passes.budget import Pool, expert_shapes, matrix_bits, scheme_at
from moecompress.passes.quantizer import Quantizer, scheme_of
from moecompress.stats.routing import RoutingCounts
from moecompress.stats.sensitivity import shrunk
from moecompress.types import PROJECTIONS, ExpertWeights, LayerWeights, MoESite, Projection

Costs = NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """costs: float64 [E, UNITS, widths] by layer. importance: float64 [E] by layer. tokens: that they are sums over."""

    costs: Mapping[int, Costs]
    importance: Mapping[int, Tensor]
    tokens: int


class AllocateGlobal(Allocator):
    """The choice of widths with the least summed squared output error that fits the budget, over all layers at once.

    Errors are those of the quantizer that follows, and are weighted by how much the model's predictions depend on each
    element of a layer's output (`weighting: fisher`), which makes layers comparable. Experts with few tokens are drawn
    towards their layer's mean. The proven gap to the optimum is in the decision.
    """

    name: ClassVar[str] = "allocate.global"
    paper: ClassVar[str] = "multiple-choice knapsack over Fisher-weighted errors (cf. GEMQ 2605.23078)"

    bits: tuple[Width, ...] = Field((1, 2, 3, 4, 8), min_length=1, description="widths to choose from; 0 = no expert")
    weighting: Literal["fisher", "kl", "none"] = Field(
        "fisher",
        description="weigh errors by the loss's squared gradient at the layer's output, by what rounding the layer "
        "costs in KL (no gradients), or not at all",
    )
    sequences: int = Field(32, ge=1, description="calibration sequences for the gradients or divergences")
    granularity: Literal["projection", "expert"] = Field("projection", description="what has a width of its own")
    per_layer: bool = Field(False, description="the same budget for every layer instead of one for the model")
    per_layer_uniform: bool = Field(False, description="one width per layer, for engines that need it")

    @model_validator(mode="after")
    def _consistent(self) -> AllocateGlobal:
        if self.per_layer and self.per_layer_uniform:
            raise ValueError("per_layer with per_layer_uniform leaves one width for all; allowed: one of them")
        return self

    def probe(self, context: LayerContext, expert: int) -> ExpertWeights | None:
        return self._rounded(context.weights.experts[expert], context.scale_dtype) if self.weighting == "kl" else None

    def _rounded(self, expert: ExpertWeights, dtype: torch.dtype) -> ExpertWeights:
        """An expert at the middle width of the choice, rounded to nearest in one group per row."""
        widths = [bits for bits in self.bits if bits]
        bits = widths[len(widths) // 2] if widths else 0
        for name in PROJECTIONS:
            weight = expert.projection(name)
            if isinstance(weight, Tensor) and bits:
                scheme = scheme_of(bits, -1, symmetric=True)
                rounded = round_to_nearest(weight.float(), scheme, grid="mse", scale_dtype=dtype)
                expert = expert.with_projection(name, rounded)
        return expert

    def prepared(self, context: ModelContext) -> Measured:
        """What every width costs every projection and expert of every layer, in the units of `predicted_cost`."""
        costs, importance = {}, {}
        weights = self._weights(context)
        for index, found in sorted(context.statistics.items()):
            summed = _weighed(found, "errors", weights.get(index)).double().numpy()
            costs[index] = np.minimum.accumulate(summed, axis=-1)  # more bits never cost more
            importance[index] = _weighed(found, "energy", weights.get(index))
        tokens = max(int(found[RoutingCounts.name]["total"]) for found in context.statistics.values())
        return Measured(costs, importance, tokens)

    def _weights(self, context: ModelContext) -> Mapping[int, Tensor]:
        """What every element of a layer's output counts, float32 [H], by layer; empty = all the same."""
        if self.weighting == "none":
            return {}
        if self.weighting == "fisher":
            return context.fisher(self.sequences)

        def changed(weights: LayerWeights) -> LayerWeights:
            dtype = context.facts.dtype
            return weights.with_experts(tuple(self._rounded(expert, dtype) for expert in weights.experts))

        made = {}
        for index, divergence in context.divergence(self.sequences, changed).items():
            found = context.statistics[index]
            squares = float(_weighed(found, "probe", None).sum()) / max(1, int(found[RoutingCounts.name]["total"]))
            size = found["sensitivity"]["probe"].shape[-1]
            made[index] = torch.full((size,), 2 * max(divergence, 0.0) / squares if squares > 0 else 0.0)
        return made

    def divided(self, context: ModelContext, prepared: Measured) -> Decision:
        """The knapsack, and the widths by layer."""
        assert isinstance(context.quantizer, Quantizer)
        counts = {index: len(cost) for index, cost in prepared.costs.items()}
        pool = self.pool(context.facts, context.quantizer, context.fixed_bytes, counts)
        units = self._widths()
        costs, sizes = {}, {}
        for index, cost in prepared.costs.items():
            site = context.facts.layers[index].site
            assert site is not None
            costs[index] = self._costs(cost, units)
            sizes[index] = self._sizes(site, counts[index], context.quantizer, pool, context.facts.dtype, units)
        choices: dict[int, NDArray[np.int64]] = {}
        total = bound = 0.0
        for layers in [[index] for index in costs] if self.per_layer else [list(costs)]:
            share = sum(sizes[index].max(-1).sum() for index in layers)
            budget = pool.total * int(share) // max(1, sum(int(one.max(-1).sum()) for one in sizes.values()))
            solution = self._solved([costs[i] for i in layers], [sizes[i] for i in layers], budget, pool)
            total, bound = total + solution.cost, bound + solution.bound
            parts = np.split(solution.choice, np.cumsum([len(costs[index]) for index in layers])[:-1])
            choices |= dict(zip(layers, parts, strict=True))
        allocation = {index: self._by_projection(part, counts[index], units) for index, part in choices.items()}
        predicted = 0.5 * total / prepared.tokens if self.weighting != "none" else None
        gap = max(0.0, total - bound) / total if total > 0 else 0.0
        extra = {"predicted_cost": total, "predicted_kl": predicted, "gap": gap}
        return self.decision(context, allocation, prepared.importance, extra)

    @property
    def _apart(self) -> bool:
        return self.granularity == "projection" and not self.per_layer_uniform

    def _widths(self) -> list[tuple[tuple[int | None, int | None], ...]]:
        """The units of one expert (or layer), and the choices of each: (gate_up, down) as places in `bits`.

        None: the projection belongs to another unit. An expert can only be left out whole, so that with 0 among the
        widths its projections are one unit with all pairs of widths.
        """
        places = range(len(self.bits))
        if not self._apart:
            return [tuple((place, place) for place in places)]
        if 0 in self.bits:
            return [((0, 0), *((up, down) for up in places[1:] for down in places[1:]))]
        return [tuple((place, None) for place in places), tuple((None, place) for place in places)]

    def _costs(self, cost: Costs, units: Sequence[Sequence[tuple[int | None, int | None]]]) -> Costs:
        """[E, UNITS, widths] -> [units, choices]: of the projections, or of the whole expert where they go together."""
        whole = list(UNITS).index("expert")
        made = np.empty((len(cost), len(units), len(units[0])))
        for u, choices in enumerate(units):
            for c, (up, down) in enumerate(choices):
                if up == down and (not self._apart or self.bits[up or 0] == 0):
                    made[:, u, c] = cost[:, whole, up]
                else:
                    parts = [cost[:, place, part] for place, part in enumerate((up, down)) if part is not None]
                    made[:, u, c] = np.sum(parts, axis=0)
        flat: Costs = made.reshape(-1, made.shape[-1])
        return flat.sum(0, keepdims=True) if self.per_layer_uniform else flat

    def _sizes(
        self,
        site: MoESite,
        experts: int,
        quantizer: Quantizer,
        pool: Pool,
        dtype: torch.dtype,
        units: Sequence[Sequence[tuple[int | None, int | None]]],
    ) -> NDArray[np.int64]:
        """Bits of the budget that every choice takes, in the shape of `_costs`."""
        one = [
            [matrix_bits(pool.budget, shape, scheme_at(quantizer, bits), dtype) for bits in self.bits]
            for shape in expert_shapes(site).values()
        ]
        table = np.array(
            [
                [sum(one[p][part] for p, part in enumerate(choice) if part is not None) for choice in choices]
                for choices in units
            ],
            dtype=np.int64,
        )
        return table * experts if self.per_layer_uniform else np.tile(table, (experts, 1))

    def _solved(self, costs: Sequence[Costs], sizes: Sequence[NDArray[np.int64]], budget: int, pool: Pool) -> Solution:
        """The knapsack of these layers. Raises RecipeError with the nearest budget that can be kept."""
        try:
            return solve(Problem.of(np.concatenate(costs), np.concatenate(sizes), budget))
        except Infeasible:
            problem = pool.problem(min(self.bits)) or "too small for one layer"
            raise RecipeError(message(f"{self.name} budget '{self.budget}'", problem)) from None

    def _by_projection(
        self, choice: NDArray[np.int64], experts: int, units: Sequence[Sequence[tuple[int | None, int | None]]]
    ) -> dict[Projection, list[int]]:
        """Choices of the units of a layer as bits of every expert by projection."""
        found: dict[Projection, list[int]] = {name: [] for name in PROJECTIONS}
        table = np.broadcast_to(choice.reshape(-1, len(units)), (experts, len(units)))
        for row in table:
            for choices, chosen in zip(units, row, strict=True):
                for name, part in zip(PROJECTIONS, choices[chosen], strict=True):
                    if part is not None:
                        found[name].append(self.bits[part])
        return found


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
