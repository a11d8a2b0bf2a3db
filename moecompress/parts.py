"""Parts of the output as they are kept in the run directory: shards in staging, everything else as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moecompress.checkpoint.native_config import NativeConfig
from moecompress.checkpoint.writer import Entry, write_shard
from moecompress.job import Job
from moecompress.rundir import RunDir
from moecompress.stream.expert_source import ExpertSource
from moecompress.writing import Written, outer_output


def layer_file(folder: RunDir, sweep: int, index: int) -> Path:
    """The JSON file that a processed layer leaves in the run directory."""
    path = folder.path / "layers" / f"{sweep:02d}-{index:05d}.json"
    path.parent.mkdir(exist_ok=True)
    return path


def write_part(job: Job, stem: str, written: Written) -> dict[str, Any]:
    """Write entries as shards of the staging directory; returns shards, manifest and native block as JSON."""
    groups = split_entries(written.entries, job.plan.recipe.output.shard_bytes)
    shards = []
    for number, group in enumerate(groups):
        record = write_shard(job.run.staging / f"{stem}-{number:03d}.safetensors", group)
        shards.append({"file": record.file, "tensors": dict(record.tensors), "bytes": record.bytes})
    return {
        "shards": shards,
        "manifest": written.manifest,
        "native": NativeConfig(written.experts, written.linears, written.gates).to_json(),
        "portable": {name: [scheme.bits, scheme.group_size] for name, scheme in written.portable.items()},
    }


def outer_part(job: Job) -> dict[str, Any]:
    """Write everything outside the decoder layers."""
    owned = job.plan.owners
    written = outer_output(job.model, lambda key: owned[key].layer is not None, job.plan.dropped)
    return write_part(job, "outer", written)


def split_entries(entries: Sequence[Entry], limit: int) -> list[list[Entry]]:
    """Entries in order, in groups of at most `limit` bytes (a larger tensor is alone)."""
    groups: list[list[Entry]] = []
    size = 0
    for entry in entries:
        if not groups or size + entry.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.nbytes
    return groups


def note_errors(
    manifest: Mapping[str, dict[str, Any]], source: ExpertSource, rows: Sequence[Mapping[str, Any]]
) -> None:
    """Put every expert's relative weight error into the manifest rows of its tensors; stacked tensors get the mean."""
    errors = {row["id"]: row["weight_error"] for row in rows if row["weight_error"] is not None}
    if not errors:
        return
    mean = sum(errors.values()) / len(errors)
    for part in source.projections.values():
        for key in part.assembly.keys:
            manifest[key]["error"] = mean
        for expert, keys in enumerate(part.keys):
            for key in keys:
                manifest[key]["error"] = errors.get(expert)
