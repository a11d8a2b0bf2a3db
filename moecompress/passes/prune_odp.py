"""prune.odp: online dynamic pruning by the ratio of a token's routing weights, training-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from moecompress.gate import Gate
from moecompress.numerics.gating import rest_ratios, slot_order
from moecompress.passes.base import Decision, LayerContext, ModelContext, Scope
from moecompress.passes.gating import Gating, with_gate
from moecompress.stats.routing import TokenSample
from moecompress.types import LayerWeights, ModelFacts


class PruneODP(Gating):
    """ODP (2410.06270, MC-MoE): experts are left out whose routing weight is small beside what stays.

    With two experts per token the second stays while w_1 / w_0 >= mu, mu being the layer's median of that ratio on
    calibration tokens. For K > 2 (not in the paper) the ratio is that of all weights that would leave to all that would
    stay, and the median one over tokens and numbers of experts: the weakest leave first, and what leaves is bounded.
    (A median per slot would take a token's second expert, and with it all others, as often as its last.)

    The tokens of a sequence that receive most attention, weighed by the 1-norm of what enters the experts, keep all
    their experts; while single tokens are decoded there is nothing to compare, and only the ratio decides. The
    importance sums attention over queries, as in the text: the released code sums over keys, which gives 1 for every
    token.
    """

    name: ClassVar[str] = "prune.odp"
    paper: ClassVar[str] = "2410.06270"
    scope: ClassVar[Scope] = Scope.MODEL

    quantile: float = Field(0.5, ge=0, lt=1, description="of the ratios on calibration tokens: more leaves out more")
    protect: float = Field(
        0.02, ge=0, lt=1, description="share of a sequence's tokens, rounded up, that keep all their experts; 0 = none"
    )
    pool: Literal["layer", "model"] = Field(
        "layer", description="every layer has a threshold of its own, as published, or all have the same one"
    )
    layers: int | None = Field(None, ge=1, description="only in so many layers, those whose gate costs least; all")
    sequences: int = Field(8, ge=1, description="calibration sequences on which `layers` are chosen")

    def check(self, facts: ModelFacts) -> list[str]:
        problems = super().check(facts)
        count = len(facts.moe_layers)
        if self.layers is not None and self.layers > count:
            problems.append(f"layers: {self.layers}, the model has {count} with experts")
        without = [layer.index for layer in facts.moe_layers if not facts.attends(layer.index)]
        if self.protect and without:
            problems.append(
                f"protect: layers {without} have no softmax attention that says which tokens matter; set protect: 0"
            )
        return problems

    @property
    def needs_attention(self) -> bool:
        return self.protect > 0

    def measure(self, context: LayerContext) -> Mapping[str, Mapping[str, Tensor]]:
        sample = context.statistics[TokenSample.name]
        order = slot_order(sample["ids"], sample["weights"])
        return {"routing": {"ranked": sample["weights"].gather(-1, order)}}

    def decide(self, context: ModelContext) -> Decision:
        """Threshold by layer; `divergence`: what each layer's gate alone costs in KL, where layers are chosen."""
        ranked = {index: found["routing"]["ranked"] for index, found in sorted(context.statistics.items())}
        ratios = {index: rest_ratios(values).reshape(-1) for index, values in ranked.items()}
        if self.pool == "model":
            ratios = dict.fromkeys(ratios, torch.cat(list(ratios.values())))
        made: dict[int, dict[str, Any]] = {
            index: {"threshold": self._threshold(ratios[index]), "renormalise": self.renormalises(values)}
            for index, values in ranked.items()
        }
        if self.layers is None:
            return Decision({"layers": {str(index): values for index, values in made.items()}})
        costs = context.divergence(
            self.sequences, lambda weights: replace(weights, gate=self._gate(made[weights.index], protect=0.0))
        )
        least = sorted(costs, key=lambda index: (costs[index], index))[: self.layers]
        kept = {str(index): made[index] for index in sorted(least)}
        return Decision({"layers": kept, "divergence": {str(index): value for index, value in costs.items()}})

    def _threshold(self, ratios: Tensor) -> float:
        return float(np.quantile(ratios.numpy(), self.quantile)) if self.quantile else 0.0

    def _gate(self, values: Mapping[str, Any], protect: float) -> Gate:
        return Gate("ratio", values["renormalise"], threshold=values["threshold"], protect=protect)

    def apply(self, context: LayerContext, decision: Decision) -> LayerWeights:
        values = decision.data["layers"].get(str(context.weights.index))
        return context.weights if values is None else with_gate(context, self._gate(values, self.protect))
