"""merge.m_smoe: every expert joins the most used expert that is routed like it (M-SMoE)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from moecompress.numerics.clustering import nearest_clusters
from moecompress.passes.base import Decision, ModelContext, Scope
from moecompress.passes.merging import ROUTER, Evidence, Merging, RouterRule, router_similarity
from moecompress.stats.base import Statistic
from moecompress.stats.similarity import RouterGram


class MergeMSMoE(Merging):
    """The most used experts are the centres; each other one joins the centre with the most similar router logits
    (2310.01334), merged after alignment with the router as it is. The paper then trains; without that, expect little.

    counts: `uniform` has as many centres in every layer; `global`, as published, ranks the use of all layers' experts
    together, each layer's most used one first.
    """

    name: ClassVar[str] = "merge.m_smoe"
    paper: ClassVar[str] = "2310.01334"

    router: RouterRule = Field("expert_map", description=ROUTER)
    counts: Literal["uniform", "global"] = Field(
        "uniform", description="as many centres in every layer, or the most used experts of the model"
    )

    @model_validator(mode="after")
    def _global_shares(self) -> MergeMSMoE:
        if self.uneven and not (self.sharing and not isinstance(self.keep, tuple)):
            raise ValueError("counts: global needs router: expert_map and one number in keep")
        return self

    @property
    def scope(self) -> Scope:  # type: ignore[override]
        return Scope.MODEL if self.uneven else Scope.LAYER

    @property
    def uneven(self) -> bool:
        return self.counts == "global"

    def needs(self) -> tuple[Statistic, ...]:
        return (*super().needs(), RouterGram())

    def decide(self, context: Any) -> Decision:
        if not isinstance(context, ModelContext):
            return super().decide(context)
        counts = self._centres(context)
        layers: dict[str, Any] = {}
        for layer in context.facts.moe_layers:
            assert layer.site is not None
            layers[str(layer.index)] = self.decide_layer(
                layer.site, context.statistics[layer.index], counts[layer.index]
            )
        return Decision({"layers": layers})

    def _centres(self, context: ModelContext) -> Mapping[int, int]:
        """Layer -> centres: the most used experts of the model, use as a share of the layer's largest."""
        total = sum(self.layer_counts(context.facts).values())
        ranked = []
        for index, evidence in context.statistics.items():
            use = evidence["routing_counts"]["tokens"].double()
            share = use / use.sum().clamp_min(1)
            share[int(share.argmax())] = 1.0
            ranked += [(-float(value), index, expert) for expert, value in enumerate(share)]
        counts = dict.fromkeys(context.statistics, 0)
        for _, index, _ in sorted(ranked)[:total]:
            counts[index] += 1
        return counts

    def labels(self, evidence: Evidence, members: Sequence[int], count: int) -> Tensor:
        use = evidence["routing_counts"]["tokens"][torch.tensor(list(members))]
        centres = sorted(range(len(members)), key=lambda i: (-int(use[i]), i))[:count]
        return nearest_clusters(router_similarity(evidence, members), sorted(centres))
