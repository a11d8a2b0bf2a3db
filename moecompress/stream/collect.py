"""Watch one layer's routing and experts while it runs: fill statistics, log router outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moecompress.stats.base import ExpertObservation, RoutingObservation, State, Statistic
from moecompress.types import MoESite, TokenBatch


@dataclass
class RouterLog:
    """Router outputs of the measured sequences, in order of batches: logits [n, E] and ids [n, K]."""

    logits: list[Tensor] = field(default_factory=list)
    ids: list[Tensor] = field(default_factory=list)

    def joined(self) -> tuple[Tensor, Tensor]:
        """logits float32 [n, E], ids int64 [n, K]."""
        return torch.cat(self.logits), torch.cat(self.ids).long()


class Collector:
    """States of the wanted statistics for one layer; held-out sequences never enter them."""

    def __init__(
        self,
        site: MoESite,
        statistics: Sequence[Statistic],
        heldout: Sequence[int] = (),
        measured: Sequence[int] | None = None,
    ) -> None:
        self.statistics = tuple(statistics)
        names = [item.name for item in statistics]
        if len(names) != len(set(names)):
            raise ValueError(f"statistics with the same name and other parameters: {names}")
        self.states: dict[str, State] = {item.name: item.init(site) for item in statistics}
        self.log = RouterLog()
        self._heldout, self._measured = frozenset(heldout), None if measured is None else frozenset(measured)

    def watch(self, batch: TokenBatch) -> BatchWatch:
        """The observer and router tap for one batch."""
        return BatchWatch(self, batch, self._heldout, self._measured)

    def finished(self) -> dict[str, dict[str, Tensor]]:
        """Finalised statistics by name."""
        return {item.name: item.finalise(self.states[item.name]) for item in self.statistics}


class BatchWatch:
    """An ExpertObserver and router tap for one batch. Local rows are b * T + t; global rows are sequence * T + t."""

    def __init__(
        self, owner: Collector, batch: TokenBatch, heldout: frozenset[int], measured: frozenset[int] | None
    ) -> None:
        self._owner = owner
        length = batch.ids.shape[1]
        sequences = torch.tensor(batch.rows)
        steps = torch.arange(length)
        self._rows = (sequences[:, None] * length + steps).reshape(-1)
        self._train = _mask([row not in heldout for row in batch.rows], length)
        self._measure = None if measured is None else _mask([row in measured for row in batch.rows], length)
        self._logits: Tensor | None = None

    def tap(self, logits: Tensor) -> None:
        """The router's first output, [T, E] or [B, T, E]; it runs just before the experts."""
        self._logits = logits.reshape(-1, logits.shape[-1])

    def on_routing(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        logits = self._logits
        if self._measure is not None and logits is not None and bool(self._measure.any()):
            self._owner.log.logits.append(logits[self._measure].float())
            self._owner.log.ids.append(ids[self._measure].to(torch.int16))
        if not self._owner.statistics or not bool(self._train.any()):
            return
        keep = slice(None) if bool(self._train.all()) else self._train
        observation = RoutingObservation(
            hidden[keep], ids[keep], weights[keep], None if logits is None else logits[keep], self._rows[keep]
        )
        for item in self._owner.statistics:
            item.observe_routing(self._owner.states[item.name], observation)

    def on_expert(
        self, expert: int, rows: Tensor, weights: Tensor, inputs: Tensor, intermediate: Tensor, outputs: Tensor
    ) -> None:
        if not self._owner.statistics:
            return
        train = self._train[rows]
        if not bool(train.any()):
            return
        keep = slice(None) if bool(train.all()) else train
        observation = ExpertObservation(
            expert, self._rows[rows][keep], weights[keep], inputs[keep], intermediate[keep], outputs[keep]
        )
        for item in self._owner.statistics:
            item.observe_expert(self._owner.states[item.name], observation)


def _mask(flags: Sequence[bool], length: int) -> Tensor:
    return torch.tensor(flags).repeat_interleave(length)
