"""prune.score: the family of scores S(b, alpha, beta) that most published pruning scores belong to."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from moecompress.passes.base import LayerContext
from moecompress.passes.pruning import Pruning, activity_score


class PruneScore(Pruning):
    """S(b, alpha, beta) = sum of g^alpha |E|_2^beta over the expert's tokens, divided by their number^b.

    2606.15716: averaged and gate-free scores, (1, 0, 1) and (1, 0, 2), rank best for no task in particular; sums with
    gates, (0, 1, 1) and (0, 2, 2), for one task. (1, 1, 1) is REAP, (0, 0, 0) frequency.
    """

    name: ClassVar[str] = "prune.score"
    paper: ClassVar[str] = "2606.15716"

    b: float = Field(1.0, ge=0, le=1, description="0: a sum over the expert's tokens, 1: their mean")
    alpha: Literal[0, 1, 2] = Field(0, description="power of the routing weight")
    beta: Literal[0, 1, 2] = Field(1, description="power of the norm of the expert's output")

    def scores(self, context: LayerContext) -> Tensor:
        return activity_score(context.statistics, self.b, self.alpha, self.beta)
