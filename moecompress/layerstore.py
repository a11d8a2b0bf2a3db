"""Keep a finished layer or a decision in the run directory: safetensors for tensors, JSON for the rest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from moecompress.checkpoint.header import read_header
from moecompress.checkpoint.index import CheckpointIndex
from moecompress.checkpoint.reader import TensorReader
from moecompress.checkpoint.writer import atomic_write, tensor_entry, write_shard
from moecompress.gate import Gate
from moecompress.passes.base import Decision
from moecompress.types import ExpertWeights, LayerWeights, QuantizedTensor, Scheme, Turn, Weight


def save_decision(folder: Path, name: str, decision: Decision) -> None:
    """`<folder>/<name>.json` and, when it has tensors, `<name>.safetensors` (written first)."""
    folder.mkdir(parents=True, exist_ok=True)
    if decision.tensors:
        save_tensors(folder / f"{name}.safetensors", decision.tensors)
    atomic_write(folder / f"{name}.json", json.dumps(dict(decision.data), indent=1, sort_keys=True) + "\n")


def load_decision(folder: Path, name: str) -> Decision | None:
    """The saved decision, or None."""
    path = folder / f"{name}.json"
    if not path.is_file():
        return None
    tensors = folder / f"{name}.safetensors"
    return Decision(json.loads(path.read_text("utf-8")), load_tensors(tensors) if tensors.is_file() else {})


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Named tensors in sorted order, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_shard(path, [tensor_entry(name, tensors[name].contiguous()) for name in sorted(tensors)])


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one of our own files."""
    index = CheckpointIndex(path.parent, read_header(path), (path,))
    with TensorReader(index) as reader:
        return {name: reader.read(name) for name in index.tensors}


def save_layer(path: Path, original: LayerWeights, weights: LayerWeights) -> None:
    """Everything of `weights` that is not the source's own tensor; schemes go into a JSON file beside it."""
    tensors: dict[str, Tensor] = {}
    schemes: dict[str, Any] = {}
    turns: dict[str, int] = {}
    known: dict[int, int] = {}

    def put(name: str, value: Weight | Turn | None) -> None:
        if isinstance(value, QuantizedTensor):
            tensors[f"{name}:codes"], tensors[f"{name}:scales"] = value.codes, value.scales
            if value.zeros is not None:
                tensors[f"{name}:zeros"] = value.zeros
            schemes[name] = asdict(value.scheme)
        elif isinstance(value, Turn):
            turns[name] = number = known.setdefault(id(value), len(known))  # what experts share stays shared
            tensors.update({f"turn/{number}/{part}": v for part, v in vars(value).items() if v is not None})
        elif value is not None:
            tensors[name] = value

    for name, value in weights.tensors.items():
        if value is not original.tensors[name]:
            put(f"tensor/{name}", value)
    kept: list[str] = []
    for index, (source, expert) in enumerate(zip(weights.source_ids, weights.experts, strict=True)):
        before = vars(original.experts[source])
        for part, value in vars(expert).items():
            name = f"expert/{index}/{part}"
            if value is not None and value is before.get(part):
                kept.append(name)
            else:
                put(name, value)
    gate = weights.gate
    if gate is not None:
        tensors |= {f"gate/{name}": value for name, value in gate.tensors.items()}
    save_tensors(path, tensors)
    data = {"schemes": schemes, "experts": len(weights.experts), "kept": kept, "sources": weights.sources}
    data["turns"] = turns
    data["slots"], data["merged"] = weights.slots, weights.merged
    data["gate"] = None if gate is None else [gate.kind, gate.renormalise, gate.count, gate.threshold, gate.protect]
    atomic_write(path.with_suffix(".json"), json.dumps(data, sort_keys=True) + "\n")


def load_layer(path: Path, original: LayerWeights) -> LayerWeights | None:
    """A layer kept by `save_layer`, or None when there is none."""
    sidecar = path.with_suffix(".json")
    if not sidecar.is_file():
        return None
    data = json.loads(sidecar.read_text("utf-8"))
    tensors = load_tensors(path)
    sources = None if data["sources"] is None else tuple(data["sources"])

    numbers = sorted(set(data["turns"].values()))
    turns = {
        n: Turn(*(tensors.get(f"turn/{n}/{part}") for part in Turn.__dataclass_fields__))  # type: ignore[arg-type]
        for n in numbers
    }

    def get(name: str) -> Any:
        if name in data["turns"]:
            return turns[data["turns"][name]]
        if name in data["schemes"]:
            scheme = Scheme(**data["schemes"][name])
            return QuantizedTensor(
                tensors[f"{name}:codes"], tensors[f"{name}:scales"], tensors.get(f"{name}:zeros"), scheme
            )
        if name in data["kept"]:
            _, index, part = name.split("/")
            source = int(index) if sources is None else sources[int(index)]
            return vars(original.experts[source])[part]  # type: ignore[no-any-return]
        return tensors.get(name)

    changed = {name: value for name in original.tensors if (value := get(f"tensor/{name}")) is not None}
    experts = tuple(
        ExpertWeights(*(get(f"expert/{index}/{part}") for part in ExpertWeights.__dataclass_fields__))  # type: ignore[arg-type]
        for index in range(data["experts"])
    )
    slots = None if data["slots"] is None else tuple(data["slots"])
    merged = None if data["merged"] is None else tuple(map(tuple, data["merged"]))
    changed_layer = original.with_tensors(changed)
    gate = _gate(data["gate"], tensors)
    return replace(changed_layer, experts=experts, sources=sources, slots=slots, gate=gate, merged=merged)


def _gate(values: Any, tensors: Mapping[str, Tensor]) -> Gate | None:
    if values is None:
        return None
    kind, renormalise, count, threshold, protect = values
    own = {name.removeprefix("gate/"): value for name, value in tensors.items() if name.startswith("gate/")}
    return Gate(kind, renormalise, own, count, threshold, protect)
