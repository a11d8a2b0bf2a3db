"""Gates in the native format: what leaves out some of a token's experts, beside the records of a module's experts.

Numbers are in config.json. A mask router's matrices are one uint8 tensor `<experts>.mask_router`, the bytes of float32
w_in [width, H + K], w_out [K, width] and start [K]: whatever dtype a model is loaded in, they choose the same experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, cast, get_args

import torch
from torch import Tensor

from moecompress.checkpoint.header import is_count, short
from moecompress.checkpoint.writer import Entry, tensor_entry
from moecompress.errors import CheckpointError, message, suggest
from moecompress.gate import Gate, GateKind
from moecompress.numerics.gating import MASK_ROUTER

LEAF = "mask_router"
_LARGEST = 1 << 24


@dataclass(frozen=True)
class GateLayout:
    """One gate as config.json holds it. slots: K. threshold: of kind ratio. width: of kind mask_router."""

    kind: GateKind
    renormalise: bool
    slots: int
    protect: float = 0.0
    count: int = 0
    threshold: float = 0.0
    width: int = 0

    def shapes(self, hidden: int) -> tuple[tuple[int, ...], ...]:
        """Shapes of MASK_ROUTER's tensors for expert inputs of `hidden` elements."""
        return (self.width, hidden + self.slots), (self.slots, self.width), (self.slots,)

    def mask_bytes(self, hidden: int) -> int:
        """Bytes of the tensor `mask_router`; 0 for other kinds."""
        if self.kind != "mask_router":
            return 0
        return 4 * sum(torch.Size(shape).numel() for shape in self.shapes(hidden))

    def gate(self, hidden: int, read: Callable[[], Tensor]) -> Gate:
        """The gate. read: gives the tensor `mask_router`, uint8 [mask_bytes]. Raises CheckpointError otherwise."""
        tensors: dict[str, Tensor] = {}
        if self.kind == "mask_router":
            raw = read()
            if raw.dtype != torch.uint8 or tuple(raw.shape) != (self.mask_bytes(hidden),):
                allowed = f"uint8 [{self.mask_bytes(hidden)}]"
                raise CheckpointError(message(LEAF, f"{raw.dtype} {list(raw.shape)}", allowed))
            shapes = self.shapes(hidden)
            flat = raw.clone().view(torch.float32).split([torch.Size(shape).numel() for shape in shapes])
            tensors = {name: part.reshape(shape) for name, part, shape in zip(MASK_ROUTER, flat, shapes, strict=True)}
            if not all(bool(value.isfinite().all()) for value in tensors.values()):
                raise CheckpointError(message(LEAF, "holds NaN or Inf", "finite values", "copy the checkpoint again"))
        return Gate(self.kind, self.renormalise, tensors, self.count, self.threshold, self.protect)


def gate_layout(gate: Gate, slots: int) -> GateLayout:
    """How a gate over `slots` slots is stored."""
    width = gate.tensors["w_out"].shape[1] if gate.kind == "mask_router" else 0
    return GateLayout(gate.kind, gate.renormalise, slots, gate.protect, gate.count, gate.threshold, width)


def gate_entries(module: str, gate: Gate) -> tuple[Entry, ...]:
    """What goes into a shard."""
    if gate.kind != "mask_router":
        return ()
    flat = torch.cat([gate.tensors[name].detach().float().reshape(-1) for name in MASK_ROUTER])
    return (tensor_entry(f"{module}.{LEAF}", flat.view(torch.uint8)),)


def gate_to_json(layout: GateLayout) -> dict[str, Any]:
    return asdict(layout)


def gate_from_json(block: object, where: str) -> GateLayout:
    """Inverse of `gate_to_json`. Raises CheckpointError naming the key that is wrong."""
    if not isinstance(block, dict):
        raise CheckpointError(message(where, short(repr(block)), "an object"))
    names = tuple(GateLayout.__dataclass_fields__)
    wrong = [key for key in block if key not in names] + [name for name in names if name not in block]
    if wrong:
        raise CheckpointError(message(where, f"unknown or missing key '{short(str(wrong[0]))}'", ", ".join(names)))
    kind, threshold = block["kind"], block["threshold"]
    if kind not in get_args(GateKind):
        raise CheckpointError(message(f"{where}.kind", short(repr(kind)) + suggest(str(kind), get_args(GateKind))))
    slots, count, width = block["slots"], block["count"], block["width"]
    sound = {
        "renormalise": type(block["renormalise"]) is bool,
        "slots": is_count(slots) and 2 <= slots <= _LARGEST,
        "count": is_count(count) and (1 <= count <= slots if kind == "count" else count == 0),
        "width": is_count(width) and (1 <= width <= _LARGEST if kind == "mask_router" else width == 0),
        "protect": type(block["protect"]) in (int, float) and 0 <= block["protect"] < 1,
        "threshold": type(threshold) in (int, float)
        and math.isfinite(threshold)
        and (threshold >= 0 if kind == "ratio" else threshold == 0),
    }
    for key, fine in sound.items():
        if not fine:
            raise CheckpointError(message(f"{where}.{key}", f"{short(repr(block[key]))} for kind {kind}"))
    return GateLayout(
        cast(GateKind, kind), block["renormalise"], slots, float(block["protect"]), count, float(threshold), width
    )
