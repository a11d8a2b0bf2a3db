"""Do the files of a native checkpoint hold what its config block says? Asked before anything is built from them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from moecompress.checkpoint.index import CheckpointIndex
from moecompress.checkpoint.native import RecordLayout
from moecompress.checkpoint.native_config import ExpertsLayout, NativeConfig
from moecompress.checkpoint.native_gate import LEAF
from moecompress.checkpoint.native_turns import PREFIX, check_turn
from moecompress.errors import CheckpointError, message

GUARDS = {"experts": "down_proj", "linears": "weight"}
_RECORD = re.compile(r"rec\d+")
_AGAIN = "download the checkpoint again"


def is_native_tensor(native: NativeConfig, name: str) -> bool:
    """Whether a checkpoint tensor belongs to the native format: records, slot maps, mask routers and guards."""
    module, _, leaf = name.rpartition(".")
    if module in native.linears:
        return leaf in ("rec0", "weight")
    own = leaf.startswith(("rec", PREFIX)) or leaf in ("slot_map", "down_proj", LEAF)
    return module in native.experts and own


def comes_from_native(native: NativeConfig, name: str) -> bool:
    """Whether a module tensor is made from records: expert matrices (not their biases) and quantized linears."""
    module, _, leaf = name.rpartition(".")
    if module in native.linears:
        return leaf == "weight"
    return module in native.experts and not leaf.endswith("_bias")


def check_records(
    native: NativeConfig, index: CheckpointIndex, read: Callable[[str], Tensor]
) -> Mapping[str, tuple[int, ...]]:
    """Records per layout of every experts module, after checking names, dtypes, shapes and slot maps.

    Raises CheckpointError naming the tensor that is missing, not announced, of another form, or out of range.
    """
    found: dict[str, set[str]] = {}
    for name in index.tensors:
        module, _, leaf = name.rpartition(".")
        if leaf and _RECORD.fullmatch(leaf):
            found.setdefault(module, set()).add(leaf)
    unknown = sorted(found.keys() - native.experts.keys() - native.linears.keys())
    if unknown:
        raise CheckpointError(message(f"{index.root}: {unknown[0]}", "has records but is not in config.json"))
    for module, layout in native.linears.items():
        _check_module(index, module, (layout,), found, GUARDS["linears"])
        _expect(index, f"{module}.rec0", torch.uint8, (1, layout.row_bytes))
    for module, gate in native.gates.items():
        if gate.kind == "mask_router":
            matrix = native.experts[module].records[0].matrix("gate_up")
            _expect(index, f"{module}.{LEAF}", torch.uint8, (gate.mask_bytes(matrix.shape[1]),))
    return {module: _check_experts(index, module, layout, found, read) for module, layout in native.experts.items()}


def _check_experts(
    index: CheckpointIndex,
    module: str,
    layout: ExpertsLayout,
    found: Mapping[str, set[str]],
    read: Callable[[str], Tensor],
) -> tuple[int, ...]:
    _check_module(index, module, layout.records, found, GUARDS["experts"])
    counts = []
    for k, record in enumerate(layout.records):
        shape = index.tensors[f"{module}.rec{k}"].shape
        _expect(index, f"{module}.rec{k}", torch.uint8, (shape[0] if shape else 0, record.row_bytes))
        counts.append(shape[0])
    if sum(counts) > layout.num_experts:
        found_counts, allowed = f"{sum(counts)} records ({counts})", f"at most {layout.num_experts} (config.json)"
        raise CheckpointError(message(f"{index.root}: {module}", found_counts, allowed))
    name = f"{module}.slot_map"
    _expect(index, name, torch.int32, (layout.num_experts, 2))
    seen: set[tuple[int, int]] = set()
    for expert, (k, row) in enumerate(read(name).tolist()):
        if not (0 <= k < len(counts) and 0 <= row < counts[k]):
            allowed = f"(k, row) with row < {counts}[k]"
            raise CheckpointError(message(f"{index.root}: {name}", f"expert {expert} is at {(k, row)}", allowed))
        seen.add((k, row))
    if len(seen) < sum(counts):  # experts may share a record, but none is there for nothing
        wrong = f"{layout.num_experts} experts use {len(seen)} of {sum(counts)} records"
        raise CheckpointError(message(f"{index.root}: {name}", wrong, "every record"))
    for turn in layout.turns:
        for leaf, (dtype, wanted) in turn.tensors().items():
            _expect(index, f"{module}.{leaf}", dtype, wanted)
            check_turn(f"{index.root}: {module}.{leaf}", read(f"{module}.{leaf}"), turn.block)
    return tuple(counts)


def _check_module(
    index: CheckpointIndex,
    module: str,
    layouts: tuple[RecordLayout, ...],
    found: Mapping[str, set[str]],
    guard: str,
) -> None:
    """Its records are exactly rec0..rec<n-1>, and the guard is there."""
    wanted = {f"rec{k}" for k in range(len(layouts))}
    missing, extra = sorted(wanted - found.get(module, set())), sorted(found.get(module, set()) - wanted)
    if missing:
        raise CheckpointError(message(f"{index.root}: {module}.{missing[0]}", "is missing", then=_AGAIN))
    if extra:
        allowed = f"rec0 to rec{len(layouts) - 1} (config.json)"
        raise CheckpointError(message(f"{index.root}: {module}.{extra[0]}", "is not in config.json", allowed))
    _expect(index, f"{module}.{guard}", torch.uint8, (1,))


def _expect(index: CheckpointIndex, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    info = index.tensors.get(name)
    if info is None:
        raise CheckpointError(message(f"{index.root}: {name}", "is missing", then=_AGAIN))
    if info.dtype != dtype or info.shape != shape:
        wrong = f"{info.dtype} {list(info.shape)}"
        raise CheckpointError(message(f"{index.root}: {name}", wrong, f"{dtype} {list(shape)} (config.json)"))
