"""prune.frequency: keep the experts that are chosen most often: S(0, 0, 0)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from moecompress.passes.base import LayerContext
from moecompress.passes.pruning import Pruning, activity_score


class PruneFrequency(Pruning):
    """Keep the experts that are chosen most often: S(0, 0, 0)."""

    name: ClassVar[str] = "prune.frequency"
    paper: ClassVar[str] = "baseline (how often an expert is chosen)"

    def scores(self, context: LayerContext) -> Tensor:
        return activity_score(context.statistics, 0, 0, 0)
