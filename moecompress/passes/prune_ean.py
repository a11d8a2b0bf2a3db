"""prune.ean: keep the experts with the largest sum of output norms (expert activation norm): S(0, 0, 1)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from moecompress.passes.base import LayerContext
from moecompress.passes.pruning import Pruning, activity_score


class PruneEAN(Pruning):
    """Keep the experts with the largest sum of output norms (expert activation norm): S(0, 0, 1)."""

    name: ClassVar[str] = "prune.ean"
    paper: ClassVar[str] = "2510.13999 (baseline there)"

    def scores(self, context: LayerContext) -> Tensor:
        return activity_score(context.statistics, 0, 0, 1)
