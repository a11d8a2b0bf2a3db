"""What an output directory (or any safetensors checkpoint) holds, and whether it still is what was written."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moecompress.arch.sites import role_of
from moecompress.checkpoint.header import TensorInfo
from moecompress.checkpoint.index import CheckpointIndex, open_index
from moecompress.checkpoint.native import RecordLayout
from moecompress.checkpoint.native_config import QUANT_METHOD, NativeConfig
from moecompress.checkpoint.reader import TensorReader
from moecompress.errors import CheckpointError, message
from moecompress.report.text import data_size, percent
from moecompress.types import Role

MANIFEST = Path("moecompress") / "manifest.json"
_LAYER = re.compile(r"^(?P<prefix>.*?\b(?:layers|blocks|h)\.\d+)\.(?P<inside>.+)$")
_OTHER_TOWERS = ("visual", "vision", "audio")
_OUTSIDE: tuple[tuple[str, Role], ...] = (
    ("lm_head", "lm_head"),
    ("embed", "embedding"),
    ("wte", "embedding"),
    ("norm", "norm"),
)


def inspect_dir(path: Path) -> str:
    """Sizes by component and the quantization of every layer, from headers and config.json alone.

    Raises CheckpointError when the directory is no sound checkpoint.
    """
    index, config = open_index(path), _read_json(path / "config.json")
    method = (config.get("quantization_config") or {}).get("quant_method", "none")
    kind = config.get("model_type", "unknown type")
    lines = [
        f"{path}: {', '.join(config.get('architectures') or ['unknown architecture'])} ({kind})",
        f"{len(index.tensors)} tensors in {len(index.files)} files, {data_size(index.total_bytes)}",
        "",
        *_component_lines(index),
        "",
        f"quantization: {method}",
    ]
    if method == QUANT_METHOD:
        lines += _native_lines(NativeConfig.from_json(config["quantization_config"]), index)
    else:
        counts = Counter(str(info.dtype).removeprefix("torch.") for info in index.tensors.values())
        lines.append("stored as: " + ", ".join(f"{name} ({count} tensors)" for name, count in counts.most_common()))
    return "\n".join(lines)


def verify_dir(path: Path) -> list[str]:
    """Every way in which the tensors are not those of `moecompress/manifest.json`; empty = all sha256 agree.

    Raises CheckpointError when there is no manifest, or the directory is no sound checkpoint.
    """
    manifest = _read_json(path / MANIFEST)
    outputs, sources = manifest.get("outputs"), manifest.get("tensors")
    if manifest.get("schema") != 1 or not isinstance(outputs, dict) or not isinstance(sources, dict):
        raise CheckpointError(message(str(path / MANIFEST), "not a manifest of schema 1"))
    index = open_index(path)
    problems = [f"{name}: not in the manifest" for name in index.tensors if name not in outputs]
    named = {name for row in sources.values() for name in row.get("outputs", ())}
    problems += [f"{name}: the manifest gives no hash for it" for name in sorted(named - outputs.keys())]
    with TensorReader(index) as reader:
        for name, row in outputs.items():
            info = index.tensors.get(name)
            if info is None:
                problems.append(f"{name}: missing")
            else:
                problems += _changes(reader, info, row)
    return problems


def component(name: str, shape: tuple[int, ...]) -> Role:
    """The role of a checkpoint tensor by its full name."""
    parts = name.split(".")
    if any(tower in part for tower in _OTHER_TOWERS for part in parts):
        return "other"
    found = _LAYER.match(name)
    if found is None:
        return next((role for key, role in _OUTSIDE if key in name), "other")
    inside = found["inside"].split(".")
    if "experts" in inside:
        return "routed_experts"
    if {"gate", "router", "shared_expert_gate"} & set(inside):
        return "router"
    return role_of(found["inside"], None, shape)


def _changes(reader: TensorReader, info: TensorInfo, row: Mapping[str, Any]) -> list[str]:
    if info.file.name != row.get("file"):
        return [f"{info.name}: in {info.file.name}, written to {row.get('file')}"]
    if info.nbytes != row.get("nbytes"):
        return [f"{info.name}: {info.nbytes} bytes, written were {row.get('nbytes')}"]
    digest = hashlib.sha256()
    for chunk in reader.chunks(info.name):
        digest.update(chunk)
    return [] if digest.hexdigest() == row.get("sha256") else [f"{info.name}: other bytes than those written"]


def _component_lines(index: CheckpointIndex) -> list[str]:
    sizes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for name, info in index.tensors.items():
        role = component(name, info.shape)
        sizes[role] += info.nbytes
        counts[role] += 1
    total = index.total_bytes or 1
    head = f"{'component':<16}{'tensors':>9}{'size':>12}{'share':>9}"
    rows = (
        f"{role:<16}{counts[role]:>9}{data_size(size):>12}{percent(size / total):>9}"
        for role, size in sizes.most_common()
    )
    return [head, *rows]


def _native_lines(config: NativeConfig, index: CheckpointIndex) -> list[str]:
    lines = []
    for module, layout in config.experts.items():
        groups = []
        for number, record in enumerate(layout.records):
            info = index.tensors.get(f"{module}.rec{number}")
            groups.append(f"{info.shape[0] if info else '?'} x ({_describe(record)})")
        lines.append(f"{module}: {layout.num_experts} experts: {', '.join(groups)}")
    linears = Counter(_describe(layout) for layout in config.linears.values())
    lines += [f"{count} other matrices: {text}" for text, count in linears.most_common()]
    return lines or ["no quantized tensors"]


def _describe(layout: RecordLayout) -> str:
    def one(bits: int, group: int) -> str:
        if bits == 16:
            return "not quantized"
        return f"{bits} bits {'per channel' if group == -1 else f'in groups of {group}'}"

    return ", ".join(f"{name} {one(m.scheme.bits, m.scheme.group_size)}" for name, m in layout.matrices)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        then = "give a directory that `moecompress run` has written"
        raise CheckpointError(message(str(path), "no such file", then=then)) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(message(str(path), f"not readable as JSON ({error})")) from None
    if not isinstance(data, dict):
        raise CheckpointError(message(str(path), "not a JSON object"))
    return data
