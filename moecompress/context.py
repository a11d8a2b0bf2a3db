"""What a pass may look at while it works on one layer: its context, made from the job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moecompress.job import PROBE, Finished, Job, seeded
from moecompress.layerstore import load_decision
from moecompress.passes.base import LayerContext, Pass, RowsToHidden
from moecompress.stats.base import Statistic
from moecompress.stream.collect import Collector, Partner
from moecompress.stream.fold import find_norm_fold
from moecompress.stream.hidden import HiddenStore
from moecompress.stream.layers import experts_of, filled_layer
from moecompress.stream.residual import Residual, Rotate, find_residual
from moecompress.stream.router import RouterView
from moecompress.stream.streams import run_layer
from moecompress.types import ExpertWeights, LayerWeights, Scheme


def set_of(job: Job, step: Pass) -> str:
    """The token set a pass works on: the (first) one it names, or the report's, or the probe."""
    name = getattr(step, "calibration", "default")
    name = name[0] if isinstance(name, tuple) else name
    return name if name in job.tokens else (job.report_set or PROBE)


def layer_context(job: Job, step: Pass, layer: Any, weights: LayerWeights, finished: Finished) -> LayerContext:
    """The context of one layer: `layer` is its module, filled with `weights`."""
    facts = job.model.facts_of(weights)

    def forward(candidate: ExpertWeights, inputs: Tensor, scheme: Scheme | None = None) -> Tensor:
        assert facts.site is not None
        return experts_of(layer, facts.site.experts).run_expert(candidate, inputs, scheme)[1]

    def activate(projected: Tensor) -> Tensor:
        assert facts.site is not None
        return experts_of(layer, facts.site.experts).activate(projected)

    dtype = job.model.facts.dtype
    return LayerContext(
        facts=job.model.model_facts_of(weights),
        layer=facts,
        weights=weights,
        statistics=finished,
        scale_dtype=dtype,
        forward=forward,
        forward_rounded=forward,
        activate=activate,
        block_error=_block_error(job, step, weights.index),
        allocation=_allocation(job, step, weights.index),
        quantizer=job.quantizer_after(step),
        residual=lambda rotate: _residual(job, weights, rotate),
        norm_fold=lambda: find_norm_fold(job.model, weights, job.tokens[PROBE], step.propagate),
        router=lambda: _router(job, step, weights),
        collect=_Again(job, step, weights).collect,
        generator=seeded(getattr(step, "seed", 0), step.name, weights.index),
    )


def _residual(job: Job, weights: LayerWeights, rotate: Rotate) -> Residual:
    """Tried on random hidden states: what a layer computes does not depend on where they come from."""
    run = job.tokens[PROBE]
    hidden = torch.randn(1, *run.row_shape, generator=torch.Generator().manual_seed(0))
    return find_residual(job.model, weights, run.calls[0][weights.index], hidden, rotate)


class _Again:
    """Runs a layer again for a pass that collects by itself; keeps the original stream's expert inputs between runs."""

    def __init__(self, job: Job, step: Pass, before: LayerWeights) -> None:
        self._job, self._before, self._stream = job, before, step.propagate
        self._run = job.tokens[set_of(job, step)]
        self._site = job.model.facts.layers[before.index].site
        self._recorded: Partner | None = None

    def collect(self, wanted: Sequence[Statistic], weights: LayerWeights, calibration: str | None = None) -> Finished:
        """Run the layer with `weights` on the pass's stream for these statistics alone."""
        partner = self._partner() if any(item.paired for item in wanted) else None
        run = self._run if calibration is None else self._job.tokens[calibration]
        site = self._job.model.facts_of(weights).site
        collector = Collector(site, wanted, run.tokens.heldout, partner=partner)
        run_layer(self._job.model, weights, run, self._stream, collector=collector, write=False)
        return collector.finished()

    def _partner(self) -> Partner:
        """The expert inputs of the original stream through the layer as it was before the pass: whatever exact
        transform earlier passes folded into its norms holds on both sides."""
        assert self._site is not None
        if self._recorded is None:
            run = self._run
            shape = (*run.tokens.ids.shape, self._site.hidden)
            store = HiddenStore(run.folder / f"{run.tokens.name}.partner.f32", shape)
            store.create()
            recorder = Collector(self._site, (), record=store)
            run_layer(self._job.model, self._before, run, "original", collector=recorder, write=False)
            self._recorded = Partner(store, self._before.experts)
        return self._recorded


def _allocation(job: Job, step: Pass, index: int) -> Mapping[str, Sequence[int]] | None:
    """The widths that the last allocation before `step` gave this layer's experts."""
    for position in reversed(range(job.position(step))):
        layers = job.decided[position].data.get("layers", {}) if position in job.decided else {}
        if "bits" in layers.get(str(index), {}):
            found: Mapping[str, Sequence[int]] = layers[str(index)]["bits"]
            return found
    return None


def _router(job: Job, step: Pass, weights: LayerWeights) -> RouterView:
    """The router's view of a layer; its original is in the basis that a first pass gave both streams."""
    source, run = None, job.tokens[set_of(job, step)]
    if job.moved:
        original = job.model.read_layer(weights.index)
        decision = load_decision(job.run.decisions / job.folder(0), f"{weights.index:05d}")
        assert decision is not None, "the first pass has decided before any other"
        with filled_layer(job.model, original) as layer:
            source = job.passes[0].apply(layer_context(job, job.passes[0], layer, original, {}), decision)
    return RouterView(job.model, run, step.propagate, weights, source)


def _block_error(job: Job, step: Pass, index: int) -> RowsToHidden:
    """Reads both streams' outputs of this layer for global token rows (sequence * T + t)."""
    if not step.needs_block_error:
        return _no_block_error
    run = job.tokens[set_of(job, step)]
    original, compressed = run.store("original", index + 1), run.store("compressed", index + 1)
    length = run.tokens.ids.shape[1]

    def error(rows: Tensor) -> Tensor:
        out = torch.empty(rows.numel(), *run.row_shape[1:])
        for sequence in torch.unique(rows // length).tolist():
            at = rows // length == sequence
            steps = rows[at] % length
            out[at] = (original.read(sequence, sequence + 1) - compressed.read(sequence, sequence + 1))[0, steps]
        return out

    return error


def _no_block_error(rows: Tensor) -> Tensor:
    raise LookupError("block_error: the pass does not set needs_block_error")
