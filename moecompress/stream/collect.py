"""Watch one layer's routing, experts and Linears while it runs: fill statistics, log router outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moecompress.errors import UnsupportedModel, message
from moecompress.experts import Experts, received
from moecompress.stats.base import (
    BlockObservation,
    ExpertObservation,
    LinearObservation,
    RoutingObservation,
    State,
    Statistic,
)
from moecompress.stats.experts import norms_of
from moecompress.stream.hidden import HiddenStore
from moecompress.types import ExpertWeights, MoESite, TokenBatch


@dataclass
class RouterLog:
    """Router outputs of the measured sequences, in order of batches: logits [n, E] and ids [n, K]."""

    logits: list[Tensor] = field(default_factory=list)
    ids: list[Tensor] = field(default_factory=list)

    def joined(self) -> tuple[Tensor, Tensor]:
        """logits float32 [n, E], ids int64 [n, K]."""
        return torch.cat(self.logits), torch.cat(self.ids).long()


class Recorded(Exception):
    """Raised inside a layer once all that is wanted of a batch is recorded: the experts need not run."""


@dataclass(frozen=True)
class Partner:
    """The original stream's expert inputs of the same tokens. hidden: [N, T, H]; experts: whose intermediate is meant.

    The experts are those the layer has before its pass began, so an input of `down` is what it was meant to be.
    """

    hidden: HiddenStore
    experts: Sequence[ExpertWeights]


class Collector:
    """States of the wanted statistics for one layer; held-out sequences never enter them.

    site: None for a layer without routed experts, where only statistics of Linears can be had.
    partner: needed by paired statistics. record: a store that gets what enters the experts, [N, T, H].
    """

    def __init__(
        self,
        site: MoESite | None,
        statistics: Sequence[Statistic],
        heldout: Sequence[int] = (),
        measured: Sequence[int] | None = None,
        *,
        partner: Partner | None = None,
        record: HiddenStore | None = None,
    ) -> None:
        self.statistics = tuple(statistics)
        names = [item.name for item in statistics]
        if len(names) != len(set(names)):
            raise ValueError(f"statistics with the same name and other parameters: {names}")
        # without a site nobody asks for statistics of experts
        self.states: dict[str, State] = {item.name: item.init(site) for item in statistics}  # type: ignore[arg-type]
        self.log = RouterLog()
        self.linears = tuple(sorted({name for item in statistics for name in item.linears}))
        self.gated = {linear: gate for item in statistics for linear, gate in item.gated.items()}
        self.blocks = any(item.blocks for item in statistics)
        self.partner, self.record = partner, record
        self._heldout, self._measured = frozenset(heldout), None if measured is None else frozenset(measured)

    def watch(self, batch: TokenBatch, experts: Experts | None = None) -> BatchWatch:
        """The observer and taps for one batch. experts: the layer's module, for statistics of all experts and pairs."""
        return BatchWatch(self, batch, self._heldout, self._measured, experts)

    def finished(self) -> dict[str, dict[str, Tensor]]:
        """Finalised statistics by name."""
        return {item.name: item.finalise(self.states[item.name]) for item in self.statistics}


class BatchWatch:
    """An ExpertObserver and taps for one batch. Local rows are b * T + t; global rows are sequence * T + t."""

    def __init__(
        self,
        owner: Collector,
        batch: TokenBatch,
        heldout: frozenset[int],
        measured: frozenset[int] | None,
        experts: Experts | None,
    ) -> None:
        self._owner, self._batch, self._experts = owner, batch, experts
        length = batch.ids.shape[1]
        sequences = torch.tensor(batch.rows)
        steps = torch.arange(length)
        self._rows = (sequences[:, None] * length + steps).reshape(-1)
        self._train = _mask([row not in heldout for row in batch.rows], length)
        if batch.selected is not None:
            self._train &= batch.selected.reshape(-1)
        self._measure = None if measured is None else _mask([row in measured for row in batch.rows], length)
        self._logits: Tensor | None = None
        self._original: Tensor | None = None
        self._contributions: Tensor | None = None
        self._gates: dict[str, Tensor] = {}
        self._fed: dict[tuple[int, int, torch.Size], tuple[str, Tensor]] = {}  # keeps them, so addresses stay theirs

    def tap(self, logits: Tensor) -> None:
        """The router's first output, [T, E] or [B, T, E]; it runs just before the experts."""
        self._logits = logits.reshape(-1, logits.shape[-1])

    def on_routing(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        logits = self._logits
        if self._measure is not None and logits is not None and bool(self._measure.any()):
            self._owner.log.logits.append(logits[self._measure].float())
            self._owner.log.ids.append(ids[self._measure].to(torch.int16))
        if self._owner.blocks:
            self._contributions = torch.zeros(hidden.shape[0], len(self._experts or ()), dtype=torch.float64)
        if self._owner.record is not None:
            shape = (*self._batch.ids.shape, hidden.shape[-1])
            self._owner.record.write(self._batch.rows[0], hidden.reshape(shape))
            if not self._owner.statistics:
                raise Recorded
        if self._owner.partner is not None:
            store = self._owner.partner.hidden
            read = store.read(self._batch.rows[0], self._batch.rows[-1] + 1)
            self._original = read.reshape(-1, read.shape[-1])
        if not self._owner.statistics or not bool(self._train.any()):
            return
        keep = slice(None) if bool(self._train.all()) else self._train
        if self._experts is not None and self._experts.sharing is not None:
            logits = None  # of ids that share experts
        given = None if logits is None else logits[keep]
        observation = RoutingObservation(hidden[keep], ids[keep], weights[keep], given, self._rows[keep])
        for item in self._owner.statistics:
            item.observe_routing(self._owner.states[item.name], observation)
        if any(item.all_experts for item in self._owner.statistics):
            self._everywhere(hidden)

    def _everywhere(self, hidden: Tensor) -> None:
        """Show every token to every expert; the layer's own output is made by the routed ones, as ever."""
        assert self._experts is not None
        rows = torch.arange(hidden.shape[0])
        for expert in range(len(self._experts)):
            weights = self._experts.expert(expert)
            intermediate, outputs = self._experts.run_expert(weights, hidden)
            inputs, ones = received(weights, "gate_up", hidden), hidden.new_ones(len(rows))
            self._observe(expert, rows, ones, inputs, intermediate, outputs, everywhere=True)

    def on_expert(
        self, expert: int, rows: Tensor, weights: Tensor, inputs: Tensor, intermediate: Tensor, outputs: Tensor
    ) -> None:
        if self._contributions is not None:
            self._contributions[rows, expert] = weights.double() * norms_of(outputs)
        self._observe(expert, rows, weights, inputs, intermediate, outputs, everywhere=False)

    def on_block(self, residual: Tensor, routed: Tensor) -> None:
        """The residual stream [T, H] around the experts and what they made together, after their last expert."""
        assert self._contributions is not None
        if not bool(self._train.any()):
            return
        keep = slice(None) if bool(self._train.all()) else self._train
        observation = BlockObservation(residual[keep], routed[keep], self._contributions[keep])
        for item in self._owner.statistics:
            if item.blocks:
                item.observe_block(self._owner.states[item.name], observation)

    def _observe(
        self,
        expert: int,
        rows: Tensor,
        weights: Tensor,
        inputs: Tensor,
        intermediate: Tensor,
        outputs: Tensor,
        everywhere: bool,
    ) -> None:
        wanted = [item for item in self._owner.statistics if item.all_experts == everywhere]
        train = self._train[rows]
        if not wanted or not bool(train.any()):
            return
        keep = slice(None) if bool(train.all()) else train
        theirs = self._theirs(expert, rows[keep], wanted)
        observation = ExpertObservation(
            expert, self._rows[rows][keep], weights[keep], inputs[keep], intermediate[keep], outputs[keep], *theirs
        )
        for item in wanted:
            item.observe_expert(self._owner.states[item.name], observation)

    def _theirs(self, expert: int, rows: Tensor, wanted: Sequence[Statistic]) -> tuple[Tensor | None, Tensor | None]:
        """Inputs and intermediate of the same tokens in the original stream, through the same expert; None unasked."""
        if not any(item.paired for item in wanted):
            return None, None
        assert self._original is not None and self._experts is not None and self._owner.partner is not None
        hidden, weights = self._original[rows], self._owner.partner.experts[expert]
        inputs = received(weights, "gate_up", hidden)
        if not any(item.paired_intermediate for item in wanted):
            return inputs, None
        return inputs, self._experts.run_expert(weights, hidden)[0]

    def on_gate(self, gate: str, values: Tensor) -> None:
        """What the coming output of a shared expert is multiplied by, [B * T]."""
        self._gates[gate] = values

    def on_linear(self, name: str, inputs: Tensor) -> None:
        """A Linear's input [B, T, in] or [B * T, in]. Raises UnsupportedModel when it does not see every token once."""
        key = (inputs.data_ptr(), inputs._version, inputs.shape)
        same = self._fed.setdefault(key, (name, inputs))[0]
        flat = inputs.reshape(-1, inputs.shape[-1])
        if flat.shape[0] != self._train.numel():
            found = (
                f"receives {flat.shape[0]} rows for {self._train.numel()} tokens: its statistics cannot be told apart"
            )
            raise UnsupportedModel(message(name, found, then="leave it out of `targets`"))
        if not bool(self._train.any()):
            return
        keep = slice(None) if bool(self._train.all()) else self._train
        gates = self._gates[self._owner.gated[name]][keep] if name in self._owner.gated else None
        observation = LinearObservation(name, flat[keep], None if same == name else same, gates)
        for item in self._owner.statistics:
            if item.linears:
                item.observe_linear(self._owner.states[item.name], observation)


def _mask(flags: Sequence[bool], length: int) -> Tensor:
    return torch.tensor(flags).repeat_interleave(length)
