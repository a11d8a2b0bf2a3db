"""merge.hc_smoe: experts with similar mean outputs become one (HC-SMoE)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from moecompress.numerics.clustering import agglomerative_clusters
from moecompress.passes.merging import ROUTER, Evidence, Merging, RouterRule
from moecompress.stats.base import Statistic
from moecompress.stats.similarity import MeanOutputs


class MergeHCSMoE(Merging):
    """Hierarchical clusters of every expert's mean output over all calibration tokens (2410.08589): the tokens run
    through all experts. As published, neurons are averaged as they come and the router stays (`expert_map`)."""

    name: ClassVar[str] = "merge.hc_smoe"
    paper: ClassVar[str] = "2410.08589"

    linkage: Literal["average", "single", "complete"] = Field(
        "average", description="distance of clusters: mean, smallest or largest"
    )
    router: RouterRule = Field("expert_map", description=ROUTER)
    align: bool = Field(False, description="bring the members' neurons into the representative's order first")

    def needs(self) -> tuple[Statistic, ...]:
        return (*super().needs(), MeanOutputs())

    def labels(self, evidence: Evidence, members: Sequence[int], count: int) -> Tensor:
        means = evidence["mean_outputs"]["mean"][torch.tensor(list(members))]
        return agglomerative_clusters(means, count, self.linkage)
