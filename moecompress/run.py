"""Execute a plan: sweeps over the layers, decisions at barriers, shards, and the finish. Resumable at every layer."""

from __future__ import annotations

import errno
import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from moecompress.barrier import decided
from moecompress.calib.tokenizer import load_tokenizer
from moecompress.calib.tokens import GENERATED, build_token_set, make_token_set
from moecompress.calib.workshop import Workshop
from moecompress.checkpoint.writer import atomic_write
from moecompress.errors import NotFinite, RecipeError, Stopped, UnsupportedModel, message
from moecompress.fingerprint import fingerprint
from moecompress.finish import finish
from moecompress.job import PROBE, Job, LayerResult, seeded
from moecompress.memory import peak_resident, return_freed_memory
from moecompress.parts import layer_file, note_errors, write_part
from moecompress.plan import BATCH_TOKENS, PROBE_TOKENS, make_plan
from moecompress.planned import Sweep
from moecompress.progress import NoProgress, Progress
from moecompress.recipe import Recipe
from moecompress.rundir import already_published, open_run
from moecompress.stream.streams import start_run
from moecompress.sweep import process_layer
from moecompress.types import TokenSet
from moecompress.writing import check_copied, layer_output


def run(
    recipe: Recipe,
    *,
    resume: bool = False,
    restart: bool = False,
    memory: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Compress a model as the recipe says; returns the output directory.

    Raises RecipeError with every problem of the plan, Stopped (state kept, exit code 75) after SIGTERM, Ctrl-C or on
    a full disk, and the other MoecompressErrors. Nothing appears at the output path before all is written and checked.
    """
    shown = progress or NoProgress()
    return_freed_memory()
    began = time.perf_counter()
    if resume and already_published(recipe.out):
        return recipe.out
    plan = make_plan(recipe, memory)
    if plan.problems:
        raise RecipeError("\n".join(plan.problems))
    if any(step.needs_attention for step in plan.passes):
        plan.model.skeleton.set_attn_implementation("eager")
    for warning in plan.warnings:
        shown.note(warning)
    with (
        stop_requests() as stop,
        open_run(recipe.out, fingerprint(recipe, plan.root), resume=resume, restart=restart) as folder,
    ):
        # nothing is saved before the first layer is done: an error until then leaves no run directory
        cursor = folder.load_cursor() or {"sweep": 0, "layer": 0, "resumed": -1, "seconds": 0.0, "peak": 0}
        cursor["resumed"] += 1
        cursor["before"] = cursor["seconds"]
        job = Job(plan, plan.passes, folder, {})
        with full_disk_stops():
            _work(job, cursor, shown, stop, began)
            finish(job, cursor, began, _Stoppable("finish", shown, stop))
    return recipe.out


class _Stoppable(NoProgress):
    """Passes everything on and stops after a step when that was asked for; resuming repeats this part of the work."""

    def __init__(self, where: str, shown: Progress, stop: Callable[[], bool]) -> None:
        self._where, self._shown, self._stop = where, shown, stop

    def stage(self, title: str, total: int, done: int = 0) -> None:
        self._shown.stage(title, total, done)

    def note(self, text: str) -> None:
        self._shown.note(text)

    def step(self, text: str) -> None:
        self._shown.step(text)
        if self._stop():
            raise Stopped(message(self._where, f"stopped after: {text}", then="run again with --resume"))


@contextmanager
def full_disk_stops() -> Iterator[None]:
    """Within the context a full disk raises Stopped, whoever met it."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where, then = str(error.filename or "disk"), "free some space and run again with --resume"
        raise Stopped(message(where, f"no space left ({error.strerror})", then=then)) from error


def _work(job: Job, cursor: dict[str, Any], progress: Progress, stop: Callable[[], bool], began: float) -> None:
    """Token sets and all sweeps. An input that has to change leaves no state: it could not be resumed."""
    try:
        if (cursor["sweep"], cursor["layer"]) == (0, 0):
            owned = job.plan.owners
            check_copied(job.model, lambda key: owned[key].layer is not None, job.plan.dropped)
        try:
            _start_tokens(job, cursor, _Stoppable("calibration", progress, stop))
        except Stopped:
            job.run.save_cursor(cursor)  # what was generated so far stays
            raise
        for number, sweep in enumerate(job.plan.sweeps):
            if number >= cursor["sweep"]:
                _run_sweep(job, number, sweep, cursor, progress, stop, began)
            elif sweep.barrier is not None:
                job.decided[sweep.barrier] = decided(job, sweep.barrier, progress)
    except (NotFinite, UnsupportedModel):
        job.run.discard()
        raise


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Within the context SIGTERM and Ctrl-C are remembered instead of obeyed; the yielded function tells."""
    seen: list[int] = []
    before: dict[signal.Signals, Any] = {}
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, lambda received, _frame: seen.append(received))
    except ValueError:  # not in the main thread: signals stay the caller's business
        before.clear()
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start_tokens(job: Job, cursor: Mapping[str, Any], progress: Progress) -> None:
    """Build the token sets and run what comes before layer 0. At layer 0 the hidden states are written anew."""
    fresh = cursor["layer"] == 0
    for tokens in _token_sets(job, progress):
        job.tokens[tokens.name] = start_run(  # type: ignore[index]
            job.model,
            tokens,
            job.run.hidden,
            batch_tokens=BATCH_TOKENS,
            streams=("original", "compressed") if fresh else None,
        )


def _token_sets(job: Job, progress: Progress) -> list[TokenSet]:
    recipe, facts = job.plan.recipe, job.model.facts
    made = []
    sources = recipe.calibration
    tokenizer = None
    if any(spec.source != "tokens" for spec in sources.values()):
        tokenizer = load_tokenizer(job.plan.root, trust_remote_code=recipe.trust_remote_code)
    progress.stage("calibration", len(sources) + 1)
    kept, scratch = job.run.path / "calibration", job.run.hidden / "calibration"
    workshop = Workshop(job.plan.model, scratch, kept, progress)
    for name, spec in sources.items():
        made.append(
            build_token_set(
                name,
                spec,  # type: ignore[arg-type]
                tokenizer,
                vocab_size=facts.vocab_size,
                cache_dir=kept,
                workshop=workshop,
            )
        )
        if spec.source in (*GENERATED, "mix") or spec.balance is not None:  # it may have had stages of its own
            progress.stage("calibration", len(sources) + 1, len(made) - 1)
        progress.step(f"{name}: {made[-1].ids.shape[0]} x {made[-1].ids.shape[1]} tokens")
    ids = torch.randint(0, facts.vocab_size, (1, PROBE_TOKENS), generator=seeded(0, PROBE, 0)())
    made.append(make_token_set(PROBE, ids, {"source": "random tokens of the reload check"}, heldout=0))
    progress.step(PROBE)
    return made


def _run_sweep(
    job: Job,
    number: int,
    sweep: Sweep,
    cursor: dict[str, Any],
    progress: Progress,
    stop: Callable[[], bool],
    began: float,
) -> None:
    count = len(job.model.layers)
    last = number == len(job.plan.sweeps) - 1
    title = f"sweep {number + 1}/{len(job.plan.sweeps)}"
    if number > 0 and cursor["layer"] == 0:
        _start_tokens(job, cursor, progress)
    progress.stage(title, count, cursor["layer"])
    for index in range(cursor["layer"], count):
        result = process_layer(job, sweep, index, last=last)
        _keep(job, number, index, result, last)
        cursor.update(layer=index + 1, peak=max(cursor["peak"], peak_resident()))
        cursor["seconds"] = cursor["before"] + time.perf_counter() - began
        job.run.save_cursor(cursor)
        progress.step(_line(index, result))
        del result  # two layers must never be in memory together
        if stop():
            raise Stopped(
                message(str(job.run.path), f"stopped after layer {index} of {title}", then="run again with --resume")
            )
    if sweep.barrier is not None:
        job.decided[sweep.barrier] = decided(job, sweep.barrier, progress)
        cursor.update(sweep=number + 1, layer=0)
        job.run.save_cursor(cursor)


def up_to_barrier(job: Job, position: int, progress: Progress) -> None:
    """Only what the pass at `position` decides on: every sweep until its barrier, nothing written and no state kept."""
    _start_tokens(job, {"layer": 0}, progress)
    for number, sweep in enumerate(job.plan.sweeps):
        if number:
            _start_tokens(job, {"layer": 0}, progress)
        progress.stage(f"sweep {number + 1}", len(job.model.layers))
        for index in range(len(job.model.layers)):
            process_layer(job, sweep, index, last=False)
            progress.step(f"layer {index}")
        if sweep.barrier == position or sweep.barrier is None:
            return
        job.decided[sweep.barrier] = decided(job, sweep.barrier, progress)


def _line(index: int, result: LayerResult) -> str:
    text = f"layer {index}"
    row = result.row
    if row is not None and row["output_error"] is not None:
        text += f" error {row['output_error']:.2e} router {row['router']['topk_agreement']:.3f}"
    return text


def _keep(job: Job, number: int, index: int, result: LayerResult, last: bool) -> None:
    """Write what the layer leaves behind: its shards (last sweep) and one JSON file with everything said about it."""
    data: dict[str, Any] = {
        "row": result.row,
        "seconds": {str(k): v for k, v in result.seconds.items()},
        "resident": {str(k): v for k, v in result.resident.items()},
    }
    if last:
        written = layer_output(job.model, result.original, result.weights, job.plan.output)
        if result.row is not None and index in job.model.expert_sources:
            note_errors(written.manifest, job.model.expert_sources[index], result.row["experts"])
        data |= write_part(job, f"layer-{index:05d}", written)
    atomic_write(layer_file(job.run, number, index), json.dumps(data, indent=1) + "\n")
