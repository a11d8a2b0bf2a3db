"""report.json of a finished run, from what its layers left behind."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from moecompress.checkpoint.writer import ShardRecord
from moecompress.evaluate import evaluate_dir
from moecompress.fingerprint import versions
from moecompress.job import PROBE, Job
from moecompress.passes.budget import expert_weights
from moecompress.portable import engines, portable_schemes
from moecompress.progress import Progress
from moecompress.recipe import recipe_data
from moecompress.report import Report
from moecompress.report.schema import AllocationInfo, ExpertInfo


def evaluate_output(job: Job, progress: Progress) -> None:
    """The recipe's `evaluate` section on the staged output, against the source model (tasks: if that fits)."""
    wanted = job.plan.recipe.evaluate
    if wanted.perplexity:
        evaluate_dir(
            job.run.staging,
            wanted.perplexity,
            job.plan.root,
            length=wanted.length,
            windows=wanted.windows,
            progress=progress,
        )
    if wanted.tasks:
        from moecompress.tasks import evaluate_tasks, fits

        source = job.plan.root if fits(job.plan.root) else None
        if source is None:
            progress.step("the source is larger than the free memory: tasks without paired differences")
        evaluate_tasks(job.run.staging, wanted.tasks, source, limit=wanted.limit, progress=progress)


def make_report(
    job: Job,
    parts: Sequence[Mapping[str, Any]],
    records: Sequence[ShardRecord],
    cursor: Mapping[str, Any],
    checked: Mapping[str, Any],
) -> Report:
    """Everything HOUSE 7 asks of report.json; what was not measured is null."""
    plan, facts = job.plan, job.model.facts
    written = sum(int(row["nbytes"]) for record in records for row in record.tensors.values())
    rows = [_known(part["row"]) for part in parts if part.get("row")]
    return Report.model_validate(
        {
            "model": {
                "name": plan.recipe.model,
                "source": "directory" if Path(plan.recipe.model).is_dir() else "hub",
                "revision": plan.recipe.revision,
                "model_type": facts.model_type,
                "architecture": facts.architecture,
            },
            "recipe": recipe_data(plan.recipe),
            "versions": versions(),
            "seeds": {name: spec.seed for name, spec in plan.recipe.calibration.items()},
            "hardware": hardware(),
            "backend": checked["backend"],
            "format": plan.output,
            "size": _size(job, written),
            "plan": {
                "peak_bytes": plan.estimate.peak_bytes,
                "disk_bytes": plan.estimate.disk_bytes,
                "seconds": plan.estimate.seconds,
            },
            "peak_rss_bytes": cursor["peak"],
            "seconds": cursor["seconds"],
            "resumed": cursor["resumed"],
            "calibration": [
                {
                    "name": name,
                    "origin": dict(run.tokens.origin),
                    "samples": run.tokens.ids.shape[0],
                    "length": run.tokens.ids.shape[1],
                    "digest": run.tokens.digest,
                }
                for name, run in job.tokens.items()
                if name != PROBE
            ],
            "passes": _passes(job, parts),
            "layers": rows,
            "allocation": _allocation(job),
            "warnings": [*plan.warnings, *_coverage_warnings(rows)],
            "loadable": loadable(job, checked),
        }
    )


def _known(row: Mapping[str, Any]) -> dict[str, Any]:
    """A layer's row with what the report's schema has of its experts; the rest stays in the passes' decisions."""
    experts = [{key: value for key, value in one.items() if key in ExpertInfo.model_fields} for one in row["experts"]]
    return {**row, "experts": experts}


def _size(job: Job, written: int) -> dict[str, Any]:
    estimate = job.plan.estimate
    return {
        "source_bytes": job.model.facts.source_bytes,
        "output_bytes": written,
        "expert_bits_per_weight": _allocated_bits(job) or estimate.expert_bits_per_weight,
        "total_bits_per_weight": estimate.total_bits_per_weight * written / estimate.output_bytes,
        "components": {
            role: {"source_bytes": before, "output_bytes": after}
            for role, (before, after) in estimate.component_bytes.items()
        },
    }


def _allocation(job: Job) -> dict[str, Any] | None:
    """What the last allocation decided, without its widths: those are in the experts' rows."""
    found = [(job.passes[position].name, decision.data) for position, decision in sorted(job.decided.items())]
    made = [(name, data) for name, data in found if "curve" in data]
    if not made:
        return None
    name, data = made[-1]
    return {"name": name, **{key: value for key, value in data.items() if key in AllocationInfo.model_fields}}


def _allocated_bits(job: Job) -> float | None:
    """Stored bits per routed-expert weight as they were allocated; None without an allocation."""
    found = [decision.data["stored_bits"] for decision in job.decided.values() if "stored_bits" in decision.data]
    return found[-1] / expert_weights(job.model.facts) if found else None


def _passes(job: Job, parts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for position, step in enumerate(job.passes):
        seconds = [part["seconds"].get(str(position)) for part in parts if "seconds" in part]
        resident = [part["resident"].get(str(position)) for part in parts if "resident" in part]
        rows.append(
            {
                "name": step.name,
                "paper": step.paper,
                "parameters": step.model_dump(mode="json"),
                "seconds": sum(value for value in seconds if value is not None),
                "peak_rss_bytes": max((value for value in resident if value is not None), default=None),
            }
        )
    return rows


def _coverage_warnings(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines per layer: experts that no calibration token reached, and experts that were given a fallback."""
    lines = []
    for row in rows:
        unseen = [expert["id"] for expert in row["experts"] if expert["tokens"] == 0]
        if unseen:
            lines.append(f"layer {row['layer']}: no calibration token reached experts {unseen}")
        fallbacks: dict[str, list[int]] = {}
        for expert in row["experts"]:
            if expert.get("fallback"):
                fallbacks.setdefault(expert["fallback"], []).append(expert["id"])
        for name, experts in sorted(fallbacks.items()):
            lines.append(f"layer {row['layer']}: too few calibration tokens, fallback {name} for experts {experts}")
    return lines


def loadable(job: Job, checked: Mapping[str, Any]) -> dict[str, Any]:
    """What loads the output: tested here for transformers, by rule for the serving engines."""
    portable = job.plan.output == "portable"
    if checked["whole"]:
        mode = "with `import moecompress`" if job.plan.output == "native" else "as it is"
        transformers = {"status": "tested", "reason": f"loaded {mode} in a fresh process, compared layer by layer"}
    else:
        transformers = {"status": "by_rule", "reason": f"checked layer by layer ({checked['how']})"}
    if portable:
        transformers["reason"] += ". Needs the package compressed-tensors (0.18 or newer); experts expand while loading"
        return {"transformers": transformers, **engines(*portable_schemes(job.model, job.plan.schemes))}
    if job.plan.output == "dense":
        engine = {"status": "by_rule", "reason": "a plain Hugging Face checkpoint in the source's layout and dtype"}
    else:
        engine = {"status": "no", "reason": "the native format needs moecompress's own loader"}
    return {"transformers": transformers, "vllm": engine, "sglang": engine}


def hardware() -> dict[str, Any]:
    """Processor, cores, memory and threads of this machine."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": pages,
    }
