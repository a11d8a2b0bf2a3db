"""The device layout in numbers: tiles, descriptors, and the structures of the C interface (csrc/cuda_layout.cuh)."""

from __future__ import annotations

import ctypes
import math
import struct
from dataclasses import dataclass
from functools import lru_cache

from moecompress_kernels.layer import Layer, Matrix

ABI = 2
ROWS, COLUMNS, BLOCK = 16, 128, 32  # of a tile; BLOCK: the finest run of columns with a scale of its own
WORDS = 8  # 32-bit words of a descriptor
KINDS = {"bfloat16": 2, "float16": 3, "float32": 4}
_SIZES = {0: 0, 1: 1, 2: 2, 3: 2, 4: 4}
_FUNCTIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu2": 4}
_PLAIN, _HALVES, _INTERLEAVED = 0, 1, 2

_P, _I, _L, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong, ctypes.c_float


class ActivationArgs(ctypes.Structure):
    _fields_ = [(name, _I) for name in ("function", "gated", "interleaved")] + [
        (name, _F) for name in ("alpha", "limit", "shift")
    ]


class MatrixArgs(ctypes.Structure):
    _fields_ = [(name, _P) for name in ("blob", "table", "bias")] + [
        (name, _I)
        for name in (
            *("rows", "columns", "row_tiles", "column_tiles"),
            *("which", "matrices", "experts", "bias_dtype", "max_stride"),
        )
    ]


class MoeArgs(ctypes.Structure):
    _fields_ = [
        *((name, _P) for name in ("hidden", "ids", "weights", "middle", "partial", "sorted", "out", "stream")),
        *((name, _I) for name in ("tokens", "slots", "dtype", "block")),
        ("activation", ActivationArgs),
        ("up", MatrixArgs),
        ("down", MatrixArgs),
    ]


class LinearArgs(ctypes.Structure):
    _fields_ = [
        *((name, _P) for name in ("inputs", "out", "dealt", "stream")),
        *((name, _I) for name in ("tokens", "dtype", "block", "unused")),
        ("matrix", MatrixArgs),
    ]


class RepackArgs(ctypes.Structure):
    _fields_ = [
        *((name, _P) for name in ("blob", "table", "records", "slot_map", "stream")),
        *((name, _L) for name in ("row_bytes", "codes", "scales", "zeros")),
        *((name, _I) for name in ("kind", "experts", "which", "matrices", "first", "unused")),
        *((name, _I) for name in ("rows", "columns", "row_tiles", "column_tiles", "order", "bits", "group", "groups")),
        *((name, _I) for name in ("scale_kind", "zero_kind")),
    ]


@dataclass(frozen=True)
class Tiles:
    """One matrix in tiles. stride: bytes of a tile; groups: scales of a row in a tile (1, 2 or 4)."""

    row_tiles: int
    column_tiles: int
    stride: int
    groups: int
    scale_kind: int
    zero_kind: int
    order: int

    @property
    def bytes(self) -> int:
        return self.row_tiles * self.column_tiles * self.stride


@dataclass(frozen=True)
class Plan:
    """tiles: per record layout, per matrix. strides: the largest of each matrix over the layouts."""

    tiles: tuple[tuple[Tiles, ...], ...]
    strides: tuple[int, ...]
    activation: ActivationArgs


def misfit(layer: Layer) -> str | None:
    """What the layout cannot hold of this layer, or None."""
    if reason := layer.uneven():
        return reason
    for matrix in (m for record in layer.records for m in record.matrices):
        if matrix.bits == 16:
            return "a matrix without codes (16 bits) among them"
        if matrix.rounding:
            return f"inputs rounded to {matrix.rounding} bits at run time"
        if matrix.columns % 8:
            return f"{matrix.columns} input columns, not a multiple of 8"
        if matrix.group != matrix.columns and matrix.group % BLOCK:
            return f"groups of {matrix.group} columns, not a multiple of {BLOCK}"
    return None


def whole_blocks(columns: int) -> int:
    """Columns of a row whose blocks are dealt to lanes (csrc/cuda_wgmma.cu)."""
    return -(-columns // BLOCK) * BLOCK


@lru_cache(maxsize=1024)
def plan(layer: Layer) -> Plan:
    """How a layer without a `misfit` is laid out."""
    tiles = tuple(
        tuple(_tiles(matrix, _order(layer, number)) for number, matrix in enumerate(record.matrices))
        for record in layer.records
    )
    return Plan(tiles, tuple(max(one.stride for one in column) for column in zip(*tiles, strict=True)), _act(layer))


def _order(layer: Layer, number: int) -> int:
    act = layer.activation
    if act is None or number or not act.gated:
        return _PLAIN
    return _INTERLEAVED if act.interleaved else _HALVES


def _tiles(matrix: Matrix, order: int) -> Tiles:
    whole = matrix.group == matrix.columns or matrix.group % COLUMNS == 0
    groups = 1 if whole else 2 if matrix.group % (2 * BLOCK) == 0 else 4
    zero = {"int": 1, "float": KINDS[matrix.dtype]}.get(matrix.values, 0)
    scale = KINDS[matrix.dtype]
    codes = ROWS * COLUMNS * matrix.bits // 8
    stride = codes + ROWS * groups * (_SIZES[scale] + _SIZES[zero])
    row_tiles = 2 * -(-matrix.rows // 2 // ROWS) if order else -(-matrix.rows // ROWS)
    return Tiles(row_tiles, -(-matrix.columns // COLUMNS), stride, groups, scale, zero, order)


def _act(layer: Layer) -> ActivationArgs:
    act = layer.activation
    if act is None:
        return ActivationArgs(5, 0, 0, 1.0, math.inf, 0.0)
    limit = math.inf if act.limit is None else act.limit
    return ActivationArgs(_FUNCTIONS[act.function], act.gated, act.interleaved, act.alpha, limit, act.shift)


def descriptor(matrix: Matrix, tiles: Tiles, offset: int, largest_scale: float) -> tuple[int, ...]:
    """The eight words of one expert's matrix. offset: bytes from the blob's start, a multiple of 16.

    largest_scale: max |s|, which sets the power of two that brings the largest weight near 1.
    """
    mul, centre = (2.0, -0.5) if matrix.values == "binary" else (1.0, 0.0)
    largest = largest_scale * mul * 2 ** (matrix.bits - 1)
    exponent = math.ceil(math.log2(largest)) if 0 < largest < math.inf else 0
    boost = 2.0 ** -max(-100, min(100, exponent))
    packed = struct.pack(
        "<Ii4B3f2i",
        *(offset // 16, tiles.stride, matrix.bits, tiles.scale_kind, tiles.zero_kind, tiles.groups),
        *(mul, boost, centre, 0, 0),
    )
    return struct.unpack(f"<{WORDS}i", packed)


def matrix_args(layer: Layer, number: int) -> MatrixArgs:
    """The part of the arguments that does not change from call to call; pointers are filled in later."""
    made, matrix = plan(layer), layer.records[0].matrices[number]
    tiles = made.tiles[0][number]
    return MatrixArgs(
        *(None, None, None, matrix.rows, matrix.columns, tiles.row_tiles, tiles.column_tiles),
        *(number, len(layer.records[0].matrices), layer.experts, 0, made.strides[number]),
    )


def repack_args(layer: Layer, kind: int, number: int) -> RepackArgs:
    """Arguments of packing and unpacking one matrix of the experts in record layout `kind`, without pointers."""
    record = layer.records[kind]
    matrix, tiles = record.matrices[number], plan(layer).tiles[kind][number]
    return RepackArgs(
        *(None, None, None, None, None, record.row_bytes, matrix.codes, matrix.scales, max(matrix.zeros, 0)),
        *(kind, layer.experts, number, len(record.matrices), 0, 0),
        *(matrix.rows, matrix.columns, tiles.row_tiles, tiles.column_tiles, tiles.order),
        *(matrix.bits, matrix.group, matrix.groups, tiles.scale_kind, tiles.zero_kind),
    )
