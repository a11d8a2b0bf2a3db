"""merge.uncurl: experts whose router logits move alike become one (UNCURL)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from moecompress.numerics.clustering import spectral_clusters
from moecompress.passes.merging import Evidence, Merging, router_similarity
from moecompress.passes.shrinking import chosen, super_experts
from moecompress.stats.base import Statistic
from moecompress.stats.similarity import RouterGram
from moecompress.types import MoESite


class MergeUncurl(Merging):
    """Spectral clusters of the cosine between router logits over all tokens (2409.01483), merged after alignment.

    The paper re-initialises the router at random and trains it on the task, then the model; it gives no rule without
    training. `router` says what is done instead, and align.router can follow. Paper models are GPT-2 with Switch
    routing; the gate of SwiGLU counts in the alignment like the other two matrices.
    """

    name: ClassVar[str] = "merge.uncurl"
    paper: ClassVar[str] = "2409.01483"

    center_logits: bool = Field(False, description="take each token's mean logit off first, which routing does not see")
    first_layer: Literal["cluster", "frequency"] = Field(
        "cluster", description="first MoE layer: as the others, or only its most used experts stay (no clusters there)"
    )
    restarts: int = Field(10, ge=1, description="starts of k-means, of which the best counts")

    @model_validator(mode="after")
    def _rows_can_go(self) -> MergeUncurl:
        if self.sharing and self.first_layer == "frequency":
            raise ValueError("first_layer: frequency removes router rows; allowed: router representative or mean")
        return self

    def needs(self) -> tuple[Statistic, ...]:
        return (*super().needs(), RouterGram())

    def decide_layer(self, site: MoESite, evidence: Evidence, count: int, first: bool = False) -> dict[str, Any]:
        if not first or self.first_layer == "cluster":
            return super().decide_layer(site, evidence, count)
        use, safe = evidence["routing_counts"]["tokens"].tolist(), super_experts(evidence) if self.protect else []
        order = sorted(range(site.num_experts), key=lambda i: (i not in safe, -use[i], i))
        labels = torch.full((site.num_experts,), -1)
        labels[torch.tensor(chosen(order, count, self.runs(site)))] = torch.arange(count)
        return self._decided(evidence, labels, safe)

    def labels(self, evidence: Evidence, members: Sequence[int], count: int) -> Tensor:
        similarity = (1 + router_similarity(evidence, members, self.center_logits)) / 2
        return spectral_clusters(similarity, count, self.seed, self.restarts)
