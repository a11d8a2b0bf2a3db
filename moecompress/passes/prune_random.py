"""prune.random: keep experts at random, the baseline that every score has to beat."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from moecompress.passes.base import LayerContext
from moecompress.passes.pruning import Pruning
from moecompress.stats.base import Statistic


class PruneRandom(Pruning):
    """Every set of experts is as likely; another `seed`, another set. Needs data only for `protect`."""

    name: ClassVar[str] = "prune.random"
    paper: ClassVar[str] = "baseline (random choice)"

    def needs(self) -> tuple[Statistic, ...]:
        return super().needs() if self.protect else ()

    def scores(self, context: LayerContext) -> Tensor:
        return torch.rand(len(context.weights.experts), generator=context.generator(), dtype=torch.float64)
