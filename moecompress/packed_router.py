"""A router whose matrix stays in a native record: the family's own module, which reads `weight` as ever.

Where the record says so, what the router receives is rounded per token before the family's code sees it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moecompress.checkpoint.native import LINEAR, RecordLayout, decode_linear
from moecompress.errors import CheckpointError, message
from moecompress.numerics.activation import rounded_as
from moecompress.ops import materialise
from moecompress.packed import require_full_inputs


class _Packed:
    """What a packed router has besides its family's class: `weight` is expanded from `rec0` whenever it is read."""

    layout: RecordLayout
    dtype: torch.dtype
    rec0: nn.Parameter

    @property
    def weight(self) -> Tensor:
        return self.dense(self.dtype)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix [R, H]."""
        return materialise(decode_linear(self.layout, self.rec0[0]), dtype)


def pack_router(router: nn.Module, layout: RecordLayout, where: str) -> None:
    """Take the parameter `weight` [R, H] out of `router` and give it an empty record instead, on the default device.

    Raises CheckpointError, naming `where`, when there is no such matrix or the record has another shape.
    """
    weight, stored = router._parameters.get("weight"), layout.matrix(LINEAR).shape
    if weight is None or tuple(weight.shape) != stored:
        found = "no matrix" if weight is None else f"a matrix {list(weight.shape)}"
        raise CheckpointError(message(where, found, f"{list(stored)}, as its record has"))
    packed: Any = router
    del router._parameters["weight"]
    packed.__class__ = type(f"Packed{type(router).__name__}", (_Packed, type(router)), {})
    packed.layout, packed.dtype = layout, weight.dtype
    for name, size in (("rec0", (1, layout.row_bytes)), ("guard", (1,))):
        packed.register_parameter(name, nn.Parameter(torch.empty(size, dtype=torch.uint8), requires_grad=False))
    if layout.matrix(LINEAR).scheme.activation != "none":
        packed.register_forward_pre_hook(_round_inputs)


def _round_inputs(router: Any, inputs: Any) -> Any:
    return (rounded_as(router.layout.matrix(LINEAR).scheme, inputs[0]), *inputs[1:])


def is_packed_router(module: nn.Module) -> bool:
    return isinstance(module, _Packed)


def unpack_router(router: Any, dtype: torch.dtype) -> None:
    """Give a packed router its family's class and a dense `weight` again.

    Raises UnsupportedModel where its inputs are rounded, which the family's class does not do.
    """
    require_full_inputs(router.layout.matrix(LINEAR).scheme)
    weight = router.dense(dtype)
    router.__class__ = type(router).__mro__[2]
    for name in ("rec0", "guard"):
        del router._parameters[name]
    router.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
