"""prune.reap: keep the experts whose weighted outputs are largest, on average over their own tokens (REAP)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from moecompress.passes.base import LayerContext
from moecompress.passes.pruning import Pruning, activity_score


class PruneREAP(Pruning):
    """Keep the experts with the largest mean of routing weight times output norm over their own tokens: S(1, 1, 1)."""

    name: ClassVar[str] = "prune.reap"
    paper: ClassVar[str] = "2510.13999"

    def scores(self, context: LayerContext) -> Tensor:
        return activity_score(context.statistics, 1, 1, 1)
