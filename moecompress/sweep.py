"""One layer of one sweep: collect what the passes need, let them decide and apply, advance both streams, measure."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moecompress.context import layer_context, set_of
from moecompress.job import PROBE, SAMPLE_TOKENS, Finished, Job, LayerResult, LayerStatistics, each_once
from moecompress.layerstore import load_decision, load_layer, save_decision, save_layer, save_tensors
from moecompress.measure import expert_rows, expert_use, router_comparison, stream_error
from moecompress.memory import resident_bytes
from moecompress.passes.base import Decision, Pass, Scope
from moecompress.planned import Sweep
from moecompress.settle import as_loaded, settle
from moecompress.stats.base import Statistic
from moecompress.stats.routing import RoutingCounts, TokenSample
from moecompress.stream.collect import Collector
from moecompress.stream.layers import experts_of, filled_layer
from moecompress.stream.probe import probed
from moecompress.stream.streams import run_layer
from moecompress.types import ExpertWeights, LayerWeights


def process_layer(job: Job, sweep: Sweep, index: int, *, last: bool) -> LayerResult:
    """Take one layer through the sweep's steps. The streams' next generation is written; nothing else is."""
    original = job.model.read_layer(index)
    statistics, source = LayerStatistics(), original
    if job.moved:
        source = _step(job, sweep, 0, original, original, LayerStatistics())
    logs = _advance_original(job, sweep, source, statistics)
    result = LayerResult(original, source, source)
    kept, done = latest_stored(job, sweep.steps, original)
    if done is not None:
        result.weights = kept
        for position in sweep.steps[: done + 1]:
            statistics.invalidate(job.passes[position].changes)
    for position in sweep.steps[int(job.moved) if done is None else done + 1 :]:
        began = time.perf_counter()
        result.weights = _step(job, sweep, position, original, result.weights, statistics)
        result.seconds[position] = time.perf_counter() - began
        result.resident[position] = resident_bytes()
    if sweep.barrier is not None:
        _collect_for_barrier(job, sweep.barrier, result.weights, statistics)
    if last:
        result.weights = settle(result.weights, original, job.plan.output)
    loaded = as_loaded(result.weights, job.plan.output) if last else result.weights
    compressed = _advance_compressed(job, loaded, last=last)
    if last and original.experts:
        result.row = _row(job, result, logs, compressed, statistics)
    return result


def _leading_needs(job: Job, sweep: Sweep, name: str) -> list[Statistic]:
    """Statistics on the original stream that can be had from the one run of the unchanged layer."""
    wanted: list[Statistic] = []
    positions = [*sweep.steps, *([sweep.barrier] if sweep.barrier is not None else [])]
    for position in positions:
        step = job.passes[position]
        if step.propagate == "original" and set_of(job, step) == name:
            wanted += step.needs()
        if step.changes and not step.moves_residual:
            break
    return wanted


def _advance_original(job: Job, sweep: Sweep, original: LayerWeights, statistics: LayerStatistics) -> Collector | None:
    """Run the source layer on every token set; returns the collector of the report's set."""
    site = job.model.facts.layers[original.index].site
    report: Collector | None = None
    for name, run in job.tokens.items():
        collector = None
        if site is not None:
            wanted = _leading_needs(job, sweep, name)
            if name == job.report_set:
                wanted += [RoutingCounts(), TokenSample(SAMPLE_TOKENS)]
            measured = run.measured if name == job.report_set else None
            collector = Collector(site, each_once(wanted), run.tokens.heldout, measured)
        run_layer(job.model, original, run, "original", collector=collector)
        if collector is not None:
            statistics.add(name, "original", collector)
            report = collector if name == job.report_set else report
    return report


def _advance_compressed(job: Job, weights: LayerWeights, *, last: bool) -> Collector | None:
    site = job.model.facts_of(weights).site
    report: Collector | None = None
    for name, run in job.tokens.items():
        if name == PROBE and last:
            kept = probed(job.model, weights, run)
            save_tensors(job.run.probe / f"{weights.index:05d}.safetensors", kept)
            continue
        collector = None
        if site is not None and name == job.report_set:
            report = collector = Collector(site, (), run.tokens.heldout, run.measured)
        run_layer(job.model, weights, run, "compressed", collector=collector)
    return report


def _collected(
    job: Job, step: Pass, weights: LayerWeights, statistics: LayerStatistics
) -> dict[str, Mapping[str, Tensor]]:
    """The finished statistics a pass needs, running the layer as it is now when something is missing."""
    site = job.model.facts_of(weights).site
    if site is None:
        return {}
    name, stream = set_of(job, step), step.propagate
    missing = statistics.missing(name, stream, step.needs())
    if missing or step.needs_block_error:
        run = job.tokens[name]
        collector = Collector(site, missing, run.tokens.heldout)
        keep = step.needs_block_error and stream == "compressed"  # overwritten when the finished layer runs
        run_layer(job.model, weights, run, stream, collector=collector, write=keep)
        statistics.add(name, stream, collector)
    return statistics.get(name, stream, step.needs())


def _step(
    job: Job, sweep: Sweep, position: int, original: LayerWeights, weights: LayerWeights, statistics: LayerStatistics
) -> LayerWeights:
    step, index = job.passes[position], weights.index
    folder, name = job.run.decisions / job.folder(position), f"{index:05d}"
    decision = job.decided.get(position) or load_decision(folder, name)
    # `apply` alone reads no statistics (see `weights_before`): they are collected for deciding
    finished = {} if decision is not None else _collected(job, step, weights, statistics)
    with filled_layer(job.model, weights) as layer:
        context = layer_context(job, step, layer, weights, finished)
        if decision is None:
            assert step.decides is Scope.LAYER
            decision, changed = step.process(context)
            save_decision(folder, name, decision)
        else:
            changed = step.apply(context, decision)
    if changed is not weights:
        statistics.invalidate(step.changes)
    if step.expensive and sweep.barrier is not None:
        save_layer(_stored_path(job, position, index), original, changed)
    return changed


def _stored_path(job: Job, position: int, index: int) -> Any:
    return job.run.path / "stored" / job.folder(position) / f"{index:05d}.safetensors"


def latest_stored(job: Job, steps: Sequence[int], original: LayerWeights) -> tuple[LayerWeights, int | None]:
    """The layer as the last expensive pass of an earlier sweep left it, and that pass's place in `steps`."""
    for place in reversed(range(len(steps))):
        kept = load_layer(_stored_path(job, steps[place], original.index), original)
        if kept is not None:
            return kept, place
    return original, None


def weights_before(job: Job, position: int) -> Callable[[int], LayerWeights]:
    """layer index -> its weights as the passes before `position` left them, from stored layers and decisions."""

    def weights(index: int) -> LayerWeights:
        original = job.model.read_layer(index)
        steps = tuple(range(position))
        current, done = latest_stored(job, steps, original)
        for step in steps[0 if done is None else done + 1 :]:
            decision = job.decided.get(step) or load_decision(job.run.decisions / job.folder(step), f"{index:05d}")
            assert decision is not None, "a barrier comes after every earlier pass has decided"
            with filled_layer(job.model, current) as layer:
                current = job.passes[step].apply(layer_context(job, job.passes[step], layer, current, {}), decision)
        return current

    return weights


def _collect_for_barrier(job: Job, position: int, weights: LayerWeights, statistics: LayerStatistics) -> None:
    step = job.passes[position]
    finished: Finished = _collected(job, step, weights, statistics)
    if weights.experts:
        with filled_layer(job.model, weights) as layer, torch.no_grad():
            finished = step.measure(layer_context(job, step, layer, weights, finished))
    flat = {f"{name}/{key}": value for name, values in finished.items() for key, value in values.items()}
    if flat:
        save_tensors(job.run.stats / job.folder(position) / f"{weights.index:05d}.safetensors", flat)


def _row(
    job: Job, result: LayerResult, before: Collector | None, after: Collector | None, statistics: LayerStatistics
) -> dict[str, Any]:
    """The report row of one MoE layer; what was not measured is None."""
    index = result.original.index
    facts = job.model.facts.layers[index]
    measured: Finished = {}
    router: dict[str, Any] = {"topk_agreement": None, "kl": None, "load_cv": None, "aligned": _aligned(job, index)}
    error = use = None
    if before is not None and after is not None and job.report_set is not None:
        measured = before.finished()
        logs = before.log.joined(), _in_source_ids(after, result)
        router.update(router_comparison(*logs, job.model.facts.scoring))
        tokens = measured["routing_counts"]["tokens"].double()
        router["load_cv"] = float(tokens.std(correction=0) / tokens.mean()) if float(tokens.sum()) else None
        error = stream_error(job.tokens[job.report_set], index + 1)
        use = expert_use(result.original, result.weights, before.log.joined()[1], after.log.joined()[1])
    with torch.no_grad(), filled_layer(job.model, result.source) as layer:
        assert facts.site is not None
        experts = experts_of(layer, facts.site.experts)
        rows = expert_rows(
            result.source,
            result.weights,
            lambda w, x: experts.run_expert(w, x)[1],
            measured,
            _notes(job, index),
            lambda number, expert: _restored(job, index, number, expert),
        )
    return {
        "layer": index,
        "experts_before": len(result.original.experts),
        "experts_after": len(result.weights.experts),
        "router": router,
        "output_error": error,
        "notes": {key: value for said in _all_said(job, index) for key, value in said.get("layer", {}).items()},
        "use": use,
        "experts": rows,
    }


def _in_source_ids(collector: Collector, result: LayerResult) -> tuple[Tensor, Tensor]:
    """The router log of the result with experts under their numbers in the source, -1 for skipped slots."""
    logits, ids = collector.log.joined()
    return logits, torch.tensor([*result.weights.source_ids, -1])[ids]


def _decision(job: Job, position: int, index: int) -> Decision | None:
    return job.decided.get(position) or load_decision(job.run.decisions / job.folder(position), f"{index:05d}")


def _restored(job: Job, index: int, number: int, expert: ExpertWeights) -> ExpertWeights:
    """An expert of the output in the basis of the source's expert: exact transforms of the passes taken back."""
    for position in reversed(range(len(job.passes))):
        step, decision = job.passes[position], None
        if step.transforms_experts or step.removes_experts:
            decision = _decision(job, position, index)
        if decision is not None and step.transforms_experts:
            expert = step.restored(job.facts_at(position).layers[index], decision, number, expert)
        if decision is not None and step.removes_experts:
            number = decision.of_layer(index)["kept"][number]
    return expert


def _said(job: Job, position: int, index: int) -> Mapping[str, Any]:
    """What a pass's decision says about one layer."""
    decision = _decision(job, position, index)
    return {} if decision is None else decision.of_layer(index)


def _aligned(job: Job, index: int) -> list[Mapping[str, Any]]:
    """What the passes' decisions say about this layer's router (key `router`)."""
    return [data["router"] for data in _all_said(job, index) if "router" in data]


def _all_said(job: Job, index: int) -> list[Mapping[str, Any]]:
    """What every pass's decision says about one layer."""
    return [_said(job, position, index) for position in range(len(job.passes))]


def _notes(job: Job, index: int) -> dict[int, dict[str, Any]]:
    """What the passes' decisions say about experts of this layer (key `experts`), by number in the source."""
    notes: dict[int, dict[str, Any]] = {}
    site = job.model.facts.layers[index].site
    sources = list(range(site.num_experts)) if site is not None else []
    for data in _all_said(job, index):
        for expert, note in data.get("experts", {}).items():
            notes.setdefault(sources[int(expert)], {}).update(note)
        if "kept" in data:
            sources = [sources[number] for number in data["kept"]]
    return notes
