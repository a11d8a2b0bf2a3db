"""Barriers: what a pass that sees all layers decides on, and its decision, kept in the run directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from moecompress.context import set_of
from moecompress.job import Job, seeded
from moecompress.layerstore import load_decision, load_tensors, save_decision
from moecompress.memory import fits_in_memory
from moecompress.passes.base import Decision, ModelContext, Scope
from moecompress.progress import Progress
from moecompress.stream.divergence import layer_divergence
from moecompress.stream.fisher import output_fisher
from moecompress.stream.train import TrainContext
from moecompress.sweep import weights_before
from moecompress.types import LayerWeights


def decided(job: Job, position: int, progress: Progress) -> Decision:
    """The decision of a MODEL or TRAIN pass: loaded, or made now and kept."""
    step = job.passes[position]
    folder = job.run.decisions / job.folder(position)
    decision = load_decision(folder, "model")
    if decision is None:
        progress.note(f"{step.name} decides over all layers")
        statistics = saved_statistics(job, position)
        if step.decides is Scope.TRAIN:
            decision = step.decide(_train_context(job, position, statistics, progress))
        else:
            decision = step.decide(model_context(job, position, statistics))
        save_decision(folder, "model", decision)
    return decision


def _train_context(
    job: Job, position: int, statistics: Mapping[int, Mapping[str, Any]], progress: Progress
) -> TrainContext:
    """What the TRAIN pass at `position` decides on."""
    step = job.passes[position]
    generator = seeded(getattr(step, "seed", 0), step.name, -1)
    resident = fits_in_memory(2 * job.model.facts.source_bytes)  # held in float32, and what gradients need of it
    weights = weights_before(job, position)
    source = weights_before(job, 1) if job.moved else None
    return TrainContext(job.model, job.tokens, weights, statistics, generator, resident, progress.note, source)


def model_context(job: Job, position: int, statistics: Mapping[int, Mapping[str, Any]]) -> ModelContext:
    """What the MODEL pass at `position` decides on. statistics: what its `measure` kept, by layer."""
    step = job.passes[position]
    generator = seeded(getattr(step, "seed", 0), step.name, -1)

    def ids(sequences: int) -> torch.Tensor:
        tokens = job.tokens[set_of(job, step)].tokens
        return tokens.ids[[row for row in range(len(tokens.ids)) if row not in tokens.heldout][:sequences]]

    def fisher(sequences: int) -> Mapping[int, torch.Tensor]:
        return output_fisher(job.model, weights_before(job, position), ids(sequences), generator())

    def divergence(sequences: int, changed: Callable[[LayerWeights], LayerWeights]) -> Mapping[int, float]:
        return layer_divergence(job.model, weights_before(job, position), changed, ids(sequences))

    fixed, quantizer = job.plan.estimate.fixed_bytes, job.quantizer_after(step)
    return ModelContext(job.facts_at(position), statistics, generator, fisher, divergence, quantizer, fixed)


def saved_statistics(job: Job, position: int) -> dict[int, dict[str, dict[str, torch.Tensor]]]:
    """What the pass at `position` kept of every MoE layer: layer -> statistic -> key."""
    return {layer.index: _of_layer(job, position, layer.index) for layer in job.model.facts.moe_layers}


def _of_layer(job: Job, position: int, index: int) -> dict[str, dict[str, torch.Tensor]]:
    path = job.run.stats / job.folder(position) / f"{index:05d}.safetensors"
    nested: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in (load_tensors(path) if path.is_file() else {}).items():
        statistic, _, key = name.partition("/")
        nested.setdefault(statistic, {})[key] = value
    return nested
