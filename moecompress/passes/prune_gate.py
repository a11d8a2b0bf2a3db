"""prune.gate: keep the experts with the largest sum of routing weights (soft counts): S(0, 1, 0)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from moecompress.passes.base import LayerContext
from moecompress.passes.pruning import Pruning, activity_score


class PruneGate(Pruning):
    """Keep the experts with the largest sum of routing weights (soft counts): S(0, 1, 0)."""

    name: ClassVar[str] = "prune.gate"
    paper: ClassVar[str] = "2404.05089"

    def scores(self, context: LayerContext) -> Tensor:
        return activity_score(context.statistics, 0, 1, 0)
