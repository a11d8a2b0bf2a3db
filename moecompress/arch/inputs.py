"""Rounding at run time what packed matrices receive, when whoever loads a checkpoint asks for it."""

from __future__ import annotations

from dataclasses import replace

from moecompress.arch.quirks import router_names
from moecompress.checkpoint.native import RecordLayout
from moecompress.checkpoint.native_config import NativeConfig
from moecompress.errors import RecipeError, message


def with_rounded_inputs(native: NativeConfig | None, bits: int | None, model_type: str, where: str) -> NativeConfig:
    """`native` with the inputs of its matrices rounded to int8 per token (numerics.activation): bits 8.

    Matrices whose inputs the checkpoint rounds already stay as they are, and so do routers and matrices without codes.
    Records do not change, so this is never written. Raises RecipeError, naming `where`, for other widths and for
    checkpoints that are not native.
    """
    if bits != 8:
        raise RecipeError(message(f"{where}: activation_bits", str(bits), "8"))
    if native is None:
        found = "activation_bits, which needs weights that stay packed"
        raise RecipeError(message(where, found, "a checkpoint in the native format"))
    experts = {
        name: replace(module, records=tuple(map(_rounding, module.records))) for name, module in native.experts.items()
    }
    routers = router_names(model_type)
    linears = {
        name: layout if name.rpartition(".")[2] in routers else _rounding(layout)
        for name, layout in native.linears.items()
    }
    return replace(native, experts=experts, linears=linears)


def _rounding(layout: RecordLayout) -> RecordLayout:
    matrices = []
    for name, matrix in layout.matrices:
        if matrix.scheme.bits not in (0, 16) and matrix.scheme.activation == "none":
            matrix = replace(matrix, scheme=replace(matrix.scheme, activation="int8"))
        matrices.append((name, matrix))
    return replace(layout, matrices=tuple(matrices))
