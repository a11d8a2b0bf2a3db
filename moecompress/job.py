"""What one run carries along: its plan, folders, token sets, decisions, and the statistics of the current layer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from moecompress.allocated import allocated_to
from moecompress.arch.surgery import resized_facts
from moecompress.passes.base import Decision, Pass
from moecompress.planned import Plan
from moecompress.rundir import RunDir
from moecompress.stats.base import Statistic
from moecompress.stream.collect import Collector
from moecompress.stream.model import StreamModel
from moecompress.stream.streams import TokenRun
from moecompress.types import LayerFacts, LayerWeights, ModelFacts, Stream

PROBE = "probe"
SAMPLE_TOKENS = 512  # real inputs per layer on which expert errors are measured
Finished = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Job:
    """What every layer of a run needs."""

    plan: Plan
    passes: tuple[Pass, ...]
    run: RunDir
    tokens: Mapping[str, TokenRun]
    decided: dict[int, Decision] = field(default_factory=dict)  # MODEL and TRAIN decisions by position

    @cached_property
    def model(self) -> StreamModel:
        """What both streams run through: the source's model, in the basis a first pass gives the residual stream."""
        model = self.plan.model
        return replace(model, outer=self.passes[0].outer(model)) if self.moved else model

    @property
    def moved(self) -> bool:
        """Whether the first pass changes the basis of the residual stream, for both streams."""
        return bool(self.passes) and self.passes[0].moves_residual

    @property
    def report_set(self) -> str | None:
        """The token set on which errors are reported; None for a data-free run."""
        names = [name for name in self.tokens if name != PROBE]
        return "default" if "default" in names else (names[0] if names else None)

    def position(self, step: Pass) -> int:
        """Where this very pass stands."""
        return next(position for position, other in enumerate(self.passes) if other is step)

    def quantizer_after(self, step: Pass) -> Pass | None:
        """The pass that an allocation by `step` is for."""
        return allocated_to(self.passes, self.position(step))

    def facts_at(self, position: int) -> ModelFacts:
        """The model as the pass at `position` finds it: the plan's facts, with the numbers of experts decided since."""
        facts = self.plan.stages[position]
        for earlier in range(position):
            if self.passes[earlier].uneven and earlier in self.decided:
                facts = replace(facts, layers=tuple(_resized(layer, self.decided[earlier]) for layer in facts.layers))
        return facts

    def folder(self, position: int) -> str:
        return f"{position:02d}-{self.passes[position].name}"


def _resized(layer: LayerFacts, decision: Decision) -> LayerFacts:
    """The facts of a layer of which the decision says what stays."""
    if layer.site is None:
        return layer
    site = replace(layer.site, num_experts=len(decision.of_layer(layer.index)["kept"]))
    return replace(layer, site=site) if site.shared_ids is not None else resized_facts(layer, site)


@dataclass
class LayerResult:
    """A processed layer. row: its report row (MoE layers, last sweep); seconds and peaks by pass position."""

    original: LayerWeights
    weights: LayerWeights
    source: LayerWeights  # the original, in the basis that a first pass gives the residual stream
    row: dict[str, Any] | None = None
    seconds: dict[int, float] = field(default_factory=dict)
    resident: dict[int, int] = field(default_factory=dict)


class LayerStatistics:
    """Finished statistics of the current layer; dropped when a pass changes what they depend on."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, Stream, str], tuple[Statistic, Mapping[str, Tensor]]] = {}

    def missing(self, name: str, stream: Stream, wanted: Iterable[Statistic]) -> list[Statistic]:
        known = ((item, self._known.get((name, stream, item.name))) for item in wanted)
        return [item for item, found in known if found is None or not found[0].covers(item)]

    def add(self, name: str, stream: Stream, collector: Collector) -> None:
        values = collector.finished()
        for item in collector.statistics:
            self._known[(name, stream, item.name)] = (item, values[item.name])

    def get(self, name: str, stream: Stream, wanted: Iterable[Statistic]) -> dict[str, Mapping[str, Tensor]]:
        return {item.name: self._known[(name, stream, item.name)][1] for item in wanted}

    def invalidate(self, changes: frozenset[str]) -> None:
        self._known = {key: value for key, value in self._known.items() if not value[0].depends_on & changes}


def each_once(wanted: Iterable[Statistic]) -> list[Statistic]:
    """The statistics without those that another one covers (the same, or a smaller sample)."""
    kept: list[Statistic] = []
    for item in wanted:
        if any(known.name == item.name and known.covers(item) for known in kept):
            continue
        kept = [known for known in kept if known.name != item.name or not item.covers(known)] + [item]
    return kept


def seeded(seed: int, name: str, layer: int) -> Callable[..., torch.Generator]:
    """Generators that depend on (seed, pass, layer[, expert or another part]) and on nothing else."""

    def make(expert: int | str | None = None) -> torch.Generator:
        text = f"{seed}/{name}/{layer}/{expert}".encode()
        return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:7], "little"))

    return make
