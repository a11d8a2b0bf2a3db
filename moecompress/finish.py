"""From staged shards to a published directory: names, index, config, side files, reload check, evaluation, report."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moecompress.checkpoint.native_config import NativeConfig
from moecompress.checkpoint.writer import ShardRecord, atomic_write, write_index
from moecompress.errors import CoverageError, OutputError, message
from moecompress.job import PROBE, Job
from moecompress.layerstore import save_tensors
from moecompress.memory import peak_resident
from moecompress.parts import layer_file, outer_part
from moecompress.portable import Layout, config_block
from moecompress.progress import Progress
from moecompress.recipe import resolved_yaml
from moecompress.reload import ENDS
from moecompress.stream.streams import final_logits
from moecompress.types import Scheme

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")
_NOT_COPIED = ("README.md", "config.json", ".gitattributes", ".gitignore")
FOLDER = "moecompress"


def finish(job: Job, cursor: dict[str, Any], began: float, progress: Progress) -> None:
    """Complete the staging directory, check that it loads, describe it, and rename it to the output path."""
    progress.stage("finish", 2)
    parts = _parts(job)
    records = _name_shards(job, parts)
    _write_config(job, _quantization_block(job, parts))
    _copy_side_files(job)
    write_manifest(job, parts, records)
    atomic_write(job.run.staging / FOLDER / "recipe.yaml", resolved_yaml(job.plan.recipe))
    progress.step(f"{len(records)} shards, {sum(record.bytes for record in records) / 2**20:.1f} MiB")
    checked = reload_check(job)
    progress.step(f"reload check: {checked['how']}, relative difference {checked['difference']:.1e}")
    describe(job, parts, records, cursor, began, checked, progress)
    job.run.publish()
    progress.note(f"done: {job.run.out}")


def _parts(job: Job) -> list[dict[str, Any]]:
    """The JSON parts of the last sweep's layers and of everything outside them, in output order."""
    last = len(job.plan.sweeps) - 1
    layers = [json.loads(layer_file(job.run, last, index).read_text("utf-8")) for index in range(len(job.model.layers))]
    kept = job.run.path / "outer.json"
    if not kept.is_file():
        atomic_write(kept, json.dumps(outer_part(job), indent=1) + "\n")
    return [json.loads(kept.read_text("utf-8")), *layers]


def _name_shards(job: Job, parts: list[dict[str, Any]]) -> list[ShardRecord]:
    """Give the shards their customary names (now that their number is known) and write the index."""
    shards = [shard for part in parts for shard in part["shards"]]
    records = []
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        before = job.run.staging / shard["file"]
        if before.is_file():
            os.replace(before, job.run.staging / name)
        elif not (job.run.staging / name).is_file():
            raise OutputError(message(str(before), "a finished shard is gone", then="run again with --restart"))
        records.append(ShardRecord(name, shard["tensors"], shard["bytes"]))
    write_index(job.run.staging, records)
    return records


def _native(parts: list[dict[str, Any]]) -> NativeConfig:
    found = [NativeConfig.from_json(part["native"]) for part in parts]
    experts = {name: layout for part in found for name, layout in part.experts.items()}
    linears = {name: layout for part in found for name, layout in part.linears.items()}
    gates = {name: gate for part in found for name, gate in part.gates.items()}
    return NativeConfig(experts, linears, gates)


def _quantization_block(job: Job, parts: list[dict[str, Any]]) -> dict[str, Any] | None:
    """config.json's `quantization_config`, or None when nothing is stored as codes."""
    native = _native(parts)
    if native.experts or native.linears:
        return native.to_json()
    found = {name: Scheme(*values) for part in parts for name, values in part["portable"].items()}
    prefixes = {source.prefix for source in job.model.expert_sources.values()}
    experts = {scheme for name, scheme in found.items() if name in prefixes}
    linears = {name: scheme for name, scheme in found.items() if name not in prefixes}
    if not found:
        return None
    if len(experts) != 1 or len(set(linears.values())) > 1:
        raise OutputError(message("output.format portable", f"layers with schemes {found}", "one", "use native"))
    scheme, other = experts.pop(), next(iter(linears.values()), None)
    return config_block(Layout.of(job.model), scheme, other, linears).to_json()


def _write_config(job: Job, block: Mapping[str, Any] | None) -> None:
    config = {key: value for key, value in job.plan.config.items() if key != "quantization_config"}
    if block is not None:
        config["quantization_config"] = block
    atomic_write(job.run.staging / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _copy_side_files(job: Job) -> None:
    """Tokenizer, chat templates, generation config, licence: everything that is no weight, index or card."""
    for path in sorted(job.plan.root.iterdir()):
        target = job.run.staging / path.name
        if path.is_dir() and path.name == "chat_templates":
            shutil.copytree(path, target, dirs_exist_ok=True)
        code = path.suffix == ".py" and not job.plan.recipe.trust_remote_code
        if path.is_file() and not code and path.name not in _NOT_COPIED and not path.name.endswith(_WEIGHTS):
            shutil.copyfile(path, target)


def write_manifest(job: Job, parts: list[dict[str, Any]], records: list[ShardRecord]) -> None:
    """manifest.json. Raises CoverageError unless every source tensor is accounted for exactly once."""
    rows: dict[str, Any] = {}
    for part in parts:
        twice = sorted(rows.keys() & part["manifest"].keys())
        if twice:
            raise CoverageError(message("manifest", f"{len(twice)} tensors are handled twice: {twice[:3]}"))
        rows |= part["manifest"]
    source = set(job.model.index.tensors)
    if source != set(rows):
        lost, extra = sorted(source - set(rows)), sorted(set(rows) - source)
        raise CoverageError(message("manifest", f"source tensors lost {lost[:3]}, unknown {extra[:3]}", "each once"))
    outputs = {name: {"file": record.file, **facts} for record in records for name, facts in record.tensors.items()}
    data = {"schema": 1, "tensors": dict(sorted(rows.items())), "outputs": dict(sorted(outputs.items()))}
    folder = job.run.staging / FOLDER
    folder.mkdir(exist_ok=True)
    atomic_write(folder / "manifest.json", json.dumps(data, indent=1) + "\n")


def reload_check(job: Job) -> dict[str, Any]:
    """Load the staged directory in a fresh process and compare every layer of it with the compressed stream.

    Returns {how, difference, backend}. Raises OutputError when it does not load or computes something else.
    """
    run = job.tokens[PROBE]
    ids, wanted = next(final_logits(job.model, run, "compressed"))
    save_tensors(job.run.probe / ENDS, {"ids": ids, "logits": wanted})
    command = [sys.executable, "-P", "-m", "moecompress.reload", str(job.run.staging), str(job.run.probe)]
    dense = job.plan.output == "portable"  # transformers expands its experts while loading
    size = job.model.facts.source_bytes if dense else job.plan.estimate.output_bytes
    command += [str(torch.get_num_threads()), str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, process_group=0)
    if done.returncode != 0:
        tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-6:])
        raise OutputError(message(str(job.run.staging), f"the output does not load or differs:\n{tail}"))
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def describe(
    job: Job,
    parts: list[dict[str, Any]],
    records: list[ShardRecord],
    cursor: dict[str, Any],
    began: float,
    checked: Mapping[str, Any],
    progress: Progress,
) -> None:
    """eval.json, report.json / .md / .html and the model card."""
    from moecompress.report import model_card, read_evaluation, write_report, write_report_json
    from moecompress.results import evaluate_output, make_report

    evaluate_output(job, progress)
    cursor["peak"] = max(cursor["peak"], peak_resident())
    cursor["seconds"] = cursor["before"] + time.perf_counter() - began
    report = make_report(job, parts, records, cursor, checked)
    write_report_json(job.run.staging, report)
    write_report(job.run.staging)
    card = model_card(report, read_evaluation(job.run.staging), _licence(job.plan.root))
    atomic_write(job.run.staging / "README.md", card)


def _licence(root: Path) -> str | None:
    """The `license:` of the source's model card, when it has one."""
    card = root / "README.md"
    if not card.is_file():
        return None
    head = card.read_text(encoding="utf-8", errors="replace").split("---")
    lines = head[1].splitlines() if len(head) > 2 and not head[0].strip() else []
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("license:")]
    return found[0] if found and found[0] else None
