"""What the operators of ops.py refuse: arguments with which a kernel could only give nonsense, or leave its memory.

Raised while a graph is traced, too, but for handles, whose contents graphs do not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

import torch
from torch import Tensor

from moecompress.errors import message
from moecompress_kernels.layer import Layer

DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)


def sealed(name: str, layer: Layer, handle: Sequence[Tensor]) -> list[Tensor]:
    """The handle that backend `name` prepared as operators take it, so that they can refuse it for anything else.

    A last tensor is added, an empty one: its shape, which can be read without waiting for a device, stands for
    the backend, the layer and how much each of the others holds.
    """
    return [*handle, handle[0].new_empty(_seal(name, layer, handle))]


def unsealed(name: str, layer: Layer, handle: Sequence[Tensor]) -> Sequence[Tensor]:
    """What the backend made. Raises ValueError when it was made by another, for another layer, or is not all of it."""
    held = handle[:-1]
    if not handle or handle[-1].shape != _seal(name, layer, held) or not all(part.is_contiguous() for part in held):
        found = f"{len(handle)} tensors of something else"
        raise ValueError(message("handle", found, f"what {name} prepared for the same layer, `sealed`"))
    return held


def _seal(name: str, layer: Layer, handle: Sequence[Tensor]) -> tuple[int, int]:
    told = (crc32(name.encode()), layer.digest, *(part.numel() for part in handle))
    return 0, hash(told) & (1 << 60) - 1


def require_moe_mlp(hidden: Tensor, ids: Tensor, weights: Tensor, handle: Sequence[Tensor], layer: Layer) -> None:
    """Raises ValueError for what `ops.moe_mlp` does not take, but for the values of ids."""
    _require_inputs("moe_mlp", (hidden, ids, weights), handle, layer)
    if layer.activation is None:
        raise ValueError(message("moe_mlp", "the handle of a Linear", "of routed experts"))
    if hidden.dim() != 2 or ids.dim() != 2 or ids.shape[0] != hidden.shape[0] or weights.shape != ids.shape:
        found = f"hidden {list(hidden.shape)}, ids {list(ids.shape)}, weights {list(weights.shape)}"
        raise ValueError(message("moe_mlp", found, "hidden [T, H], ids and weights [T, K]"))
    if ids.dtype not in (torch.int64, torch.int32) or not weights.is_floating_point():
        raise ValueError(message("moe_mlp", f"ids {ids.dtype}, weights {weights.dtype}", "int64 or int32, and floats"))


def require_packed_linear(inputs: Tensor, handle: Sequence[Tensor], layer: Layer) -> None:
    """Raises ValueError for what `ops.packed_linear` does not take."""
    _require_inputs("packed_linear", (inputs,), handle, layer)
    if layer.activation is not None:
        raise ValueError(message("packed_linear", "the handle of routed experts", "of a Linear"))


def _require_inputs(where: str, inputs: Sequence[Tensor], handle: Sequence[Tensor], layer: Layer) -> None:
    first = inputs[0]
    if first.dtype not in DTYPES:
        raise ValueError(message(where, str(first.dtype), ", ".join(map(str, DTYPES))))
    if first.dim() < 1 or first.shape[-1] != layer.columns:
        raise ValueError(message(where, f"shape {list(first.shape)}", f"[..., {layer.columns}]"))
    device = first.device
    for part in (*inputs, *handle[-1:]):  # the last one was made beside the others
        if part.device != device or part.layout is not torch.strided:
            found = f"{part.layout} on {part.device} with inputs on {device}"
            raise ValueError(message(where, found, "strided tensors on one device"))
    if torch.is_grad_enabled() and any(part.requires_grad for part in inputs):
        raise ValueError(message(where, "gradients are asked for, packed weights give none", "torch.no_grad()"))
