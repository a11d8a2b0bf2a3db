"""The tables that the CPU library reads: where everything of a layer is in its blob (csrc/mc_cpu.h has the structs)."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from moecompress_kernels.layer import Layer, Matrix

_TYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
_VALUES = {"raw": 0, "symmetric": 1, "binary": 2, "int": 3, "float": 4}
_FUNCTIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu2": 4}
SPARE = 16384  # bytes after everything else, for prefetches past the end
_PANEL, _TILE, _LINE = 32, 32, 64
_MATRIX, _INPUT, _LAYER = struct.Struct("=20q"), struct.Struct("=qdqqqqqqq"), struct.Struct("=6q3d3q")


def make_table(layer: Layer, slots: Sequence[Sequence[int]]) -> tuple[Tensor, int, list[int]]:
    """The table for experts in these slots (k, row), the size of the blob, and where its biases are.

    Experts in the same slot share their bytes.
    """
    forms: dict[bytes, int] = {}
    placed: dict[tuple[int, ...], list[bytes]] = {}
    rows, end = [], 0
    for slot in map(tuple, slots):
        if slot not in placed:
            placed[slot] = []
            for number, matrix in enumerate(layer.records[slot[0]].matrices):
                form = forms.setdefault(_form(matrix), len(forms))
                row, end = _matrix(layer, matrix, number, (form, slot[0]), end)
                placed[slot].append(row)
        rows += placed[slot]
    act = layer.activation
    bias_at = []
    for number in range(2 if layer.bias else 0):
        bias_at.append(end)
        end = _aligned(end + layer.experts * _panels(layer, layer.records[0].matrices[number], number) * _PANEL * 4)
    head = _LAYER.pack(
        layer.experts,
        len(layer.records[0].matrices),
        layer.columns,
        layer.records[0].matrices[-1].columns,
        _FUNCTIONS[act.function] if act else 0,
        bool(act and act.gated),
        act.alpha if act else 1.0,
        float("inf") if act is None or act.limit is None else act.limit,
        act.shift if act else 0.0,
        *(bias_at or (-1, -1)),
        len(forms),
    )
    data = bytearray(b"".join((head, *forms, *rows)))
    return torch.frombuffer(data, dtype=torch.int64).clone(), end + SPARE, bias_at


def _form(m: Matrix) -> bytes:
    """How the inputs of a matrix must look. Groups matter only where they are padded, or summed: for zero points, for
    integer products, which take codes as they are stored, and for three bits, some of which are read with an offset."""
    integers = m.rounding != 0 and m.values != "raw"
    sums = integers or m.values in ("int", "float")
    offsets = m.bits == 3 and m.values != "raw" and not integers
    whole = m.group % _TILE == 0 and not sums and not offsets
    group, groups = (m.columns, 1) if whole else (m.group, m.groups)
    factor = m.clip / (2 ** (m.rounding - 1) - 1) if m.rounding else 0.0
    floats = m.values == "raw" and m.dtype != "bfloat16"
    order = m.bits if integers else 0
    return _INPUT.pack(m.rounding, factor, group, _tiles(group), groups, sums, 0 if floats else 1, offsets, order)


def _matrix(layer: Layer, m: Matrix, number: int, numbers: tuple[int, int], start: int) -> tuple[bytes, int]:
    """One row of the table and the end of what it places in the blob. numbers: of its input form and its record."""
    form, kind = numbers
    raw = m.values == "raw"
    bits = m.bits if not raw else 16 if m.dtype == "bfloat16" else 32
    dtype = 1 if m.dtype == "bfloat16" else 0
    panels, padded = _panels(layer, m, number), _tiles(m.group)
    scales = _aligned(start + panels * m.groups * (padded // _TILE) * 2 * bits * _LINE)
    grid, kept = panels * m.groups * _PANEL, 2 if dtype else 4
    zeros = scales if raw else _aligned(scales + grid * kept)
    end = _aligned(zeros + grid * (1 if m.values == "int" else kept)) if m.zeros >= 0 else zeros
    order = 0 if number or layer.activation is None or not layer.activation.gated else 1
    order = 2 if order and layer.activation is not None and layer.activation.interleaved else order
    row = _MATRIX.pack(
        start,
        -1 if raw else scales,
        zeros if m.zeros >= 0 else -1,
        m.rows,
        m.columns,
        bits,
        m.group,
        padded,
        m.groups,
        _VALUES[m.values],
        dtype,
        order,
        panels,
        form,
        m.codes,
        m.scales,
        m.zeros,
        -(-m.columns * m.bits // 32) * 4,
        _TYPES[m.dtype],
        kind,
    )
    return row, end


def _panels(layer: Layer, m: Matrix, number: int) -> int:
    gated = number == 0 and layer.activation is not None and layer.activation.gated
    return -(-(m.rows // 2) // 16) if gated else -(-m.rows // _PANEL)


def padded_bias(bias: Tensor, layer: Layer, first: bool) -> Tensor:
    """[E, rows] in the order of panels, padded with zeros."""
    act = layer.activation
    if first and act is not None and act.gated:
        halves = (bias[:, ::2], bias[:, 1::2]) if act.interleaved else bias.chunk(2, 1)
        blocks = [torch.nn.functional.pad(half, (0, -half.shape[1] % 16)).unflatten(1, (-1, 16)) for half in halves]
        return torch.stack(blocks, 2).flatten(1).contiguous()
    return torch.nn.functional.pad(bias, (0, -bias.shape[1] % _PANEL)).contiguous()


def kind_of(table: Tensor, expert: int) -> int:
    """The record layout of an expert, from the table."""
    experts, matrices, inputs = (int(table[at]) for at in (0, 1, 11))
    if not 0 <= expert < experts:
        raise ValueError(f"expert {expert}; allowed: 0..{experts - 1}")
    return int(table[(_LAYER.size + inputs * _INPUT.size + (expert * matrices + 1) * _MATRIX.size) // 8 - 1])


def _aligned(offset: int) -> int:
    return -(-offset // _LINE) * _LINE


def _tiles(columns: int) -> int:
    return -(-columns // _TILE) * _TILE
