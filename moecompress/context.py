"""What a pass may look at while it works on one layer: its context, made from the job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moecompress.job import PROBE, Finished, Job, seeded
from moecompress.passes.base import LayerContext, Pass, RowsToHidden
from moecompress.stats.base import Statistic
from moecompress.stream.collect import Collector, Partner
from moecompress.stream.fold import find_norm_fold
from moecompress.stream.hidden import HiddenStore
from moecompress.stream.layers import experts_of
from moecompress.stream.streams import run_layer
from moecompress.types import ExpertWeights, LayerWeights


def set_of(job: Job, step: Pass) -> str:
    """The token set a pass works on: the one it names, or the report's, or the probe."""
    name = getattr(step, "calibration", "default")
    return name if name in job.tokens else (job.report_set or PROBE)


def layer_context(job: Job, step: Pass, layer: Any, weights: LayerWeights, finished: Finished) -> LayerContext:
    """The context of one layer: `layer` is its module, filled with `weights`."""
    facts = job.model.facts.layers[weights.index]

    def forward(candidate: ExpertWeights, inputs: Tensor) -> Tensor:
        assert facts.site is not None
        return experts_of(layer, facts.site.experts).run_expert(candidate, inputs)[1]

    def activate(projected: Tensor) -> Tensor:
        assert facts.site is not None
        return experts_of(layer, facts.site.experts).activate(projected)

    dtype = job.model.facts.dtype
    return LayerContext(
        facts=job.model.facts,
        layer=facts,
        weights=weights,
        statistics=finished,
        scale_dtype=dtype,
        forward=forward,
        activate=activate,
        block_error=_block_error(job, step, weights.index),
        norm_fold=lambda: find_norm_fold(job.model, weights, job.tokens[PROBE], step.propagate),
        collect=lambda wanted, current: _collect_again(job, step, weights, current, wanted),
        generator=seeded(getattr(step, "seed", 0), step.name, weights.index),
    )


def _collect_again(
    job: Job, step: Pass, before: LayerWeights, current: LayerWeights, wanted: Sequence[Statistic]
) -> Finished:
    """Run the layer with `current` weights on the pass's stream for these statistics alone.

    Paired statistics first get the expert inputs of the original stream through the layer as it was `before` the pass:
    whatever exact transform earlier passes folded into its norms holds on both sides.
    """
    run = job.tokens[set_of(job, step)]
    site, partner = job.model.facts.layers[before.index].site, None
    if site is not None and any(item.paired for item in wanted):
        shape = (*run.tokens.ids.shape, site.hidden)
        partner = Partner(HiddenStore(run.folder / f"{run.tokens.name}.partner.f32", shape), before.experts)
        partner.hidden.create()
        recorder = Collector(site, (), record=partner.hidden)
        run_layer(job.model, before, run, "original", collector=recorder, write=False)
    collector = Collector(site, wanted, run.tokens.heldout, partner=partner)
    run_layer(job.model, current, run, step.propagate, collector=collector, write=False)
    if partner is not None:
        partner.hidden.remove()
    return collector.finished()


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
