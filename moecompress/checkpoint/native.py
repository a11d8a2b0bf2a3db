"""Records of the native format: all of one routed expert (or of one quantized Linear) in one row of bytes.

A record is the expert's projections in order, each as codes, scales, zero points (or the raw tensor of a
projection that is not quantized). Parts start at multiples of 64 and the row is a multiple of 64 long, so that one
expert is one contiguous read and every part is a view. Biases are not in records; padding is zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from moecompress.checkpoint.writer import Entry, tensor_entry
from moecompress.errors import CheckpointError, message
from moecompress.numerics.grids import no_bits
from moecompress.numerics.packing import pack_codes, row_bytes, unpack_codes
from moecompress.types import PROJECTIONS, ExpertWeights, QuantizedTensor, Scheme, Weight

ALIGNMENT = 64
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
GUARD = torch.zeros(1, dtype=torch.uint8)
RAW = Scheme(16)
LINEAR = "weight"  # the one matrix of a Linear's record


class Part(NamedTuple):
    """One tensor inside a record: offset in bytes from the row's start."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, int]

    @property
    def stop(self) -> int:
        return self.offset + prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class MatrixLayout:
    """Where one matrix lies in a record.

    shape: [out, in]. dtype: of the scales, or of the tensor itself for 16 bits.
    codes: packed uint8 [out, row_bytes(in, bits)], or the raw tensor [out, in].
    scales, zeros: [out, G] or None.
    """

    shape: tuple[int, int]
    scheme: Scheme
    dtype: torch.dtype
    codes: Part
    scales: Part | None
    zeros: Part | None

    def views(self, records: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Views (no copies) of codes, scales, zeros in `records` uint8 [..., R]; leading dimensions stay."""
        scales, zeros = (part and _view(records, part) for part in (self.scales, self.zeros))
        return _view(records, self.codes), scales, zeros


@dataclass(frozen=True)
class RecordLayout:
    """The matrices of one record by name: "gate_up" and "down", or "weight" for a Linear. row_bytes: R."""

    matrices: tuple[tuple[str, MatrixLayout], ...]
    row_bytes: int

    def matrix(self, name: str) -> MatrixLayout:
        return dict(self.matrices)[name]


def plan_record(matrices: Sequence[tuple[str, tuple[int, int], Scheme, torch.dtype]]) -> RecordLayout:
    """The layout for these (name, shape, scheme, dtype). Raises ValueError for what a record cannot hold."""
    placed: list[tuple[str, MatrixLayout]] = []
    end = 0
    for name, shape, scheme, dtype in matrices:
        if len(shape) != 2 or min(shape) < 1:
            raise ValueError(f"{name}: shape {tuple(shape)}; allowed: [out, in]")
        if dtype not in FLOATS:
            raise ValueError(f"{name}: {dtype}; allowed: {', '.join(map(str, FLOATS))}")
        parts: list[Part] = []
        for part_dtype, part_shape in _part_shapes(shape, scheme, dtype):
            parts.append(Part(end, part_dtype, part_shape))
            end = -(-parts[-1].stop // ALIGNMENT) * ALIGNMENT
        codes, scales, zeros = (*parts, None, None)[:3]
        placed.append((name, MatrixLayout(shape, scheme, dtype, codes, scales, zeros)))  # type: ignore[arg-type]
    return RecordLayout(tuple(placed), end)


def record_layout(expert: ExpertWeights) -> RecordLayout:
    """The layout of one expert; equal for experts that can share a `rec<k>` tensor."""
    return plan_record([(name, *_description(name, expert.projection(name))) for name in PROJECTIONS])


def linear_layout(weight: Weight) -> RecordLayout:
    """The layout of one Linear's weight [out, in]."""
    return plan_record([(LINEAR, *_description(LINEAR, weight))])


def encode(layout: RecordLayout, expert: ExpertWeights) -> Tensor:
    """One record, uint8 [R]. Raises ValueError when the expert has another layout or a code is too large."""
    return _encode(layout, {name: expert.projection(name) for name in PROJECTIONS})


def encode_linear(layout: RecordLayout, weight: Weight) -> Tensor:
    """One Linear's record, uint8 [R]."""
    return _encode(layout, {LINEAR: weight})


def decode(layout: RecordLayout, row: Tensor) -> ExpertWeights:
    """The expert of one record uint8 [R]: codes unpacked, scales, zeros and raw tensors as views of the row.

    Raises CheckpointError for a row of the wrong size or with scales, zeros or weights that are not finite.
    """
    matrices = _decode(layout, row)
    return ExpertWeights(matrices["gate_up"], matrices["down"])


def decode_linear(layout: RecordLayout, row: Tensor) -> Weight:
    """The weight of one Linear's record, as `decode`."""
    return _decode(layout, row)[LINEAR]


def expert_entries(
    module: str, experts: Sequence[ExpertWeights], slots: Sequence[int] | None = None
) -> tuple[tuple[RecordLayout, ...], tuple[Entry, ...]]:
    """What one layer's experts are in a shard: the layouts k and the entries to be written.

    slots: for every id of the router the expert that serves it, where ids share experts.

    `<module>.rec<k>` uint8 [n_k, R_k] (rows by expert number, one encoded at a time while writing),
    `<module>.slot_map` int32 [E, 2] = (k, row) of every id, and the guard `<module>.down_proj`, which makes a load
    without our quantizer fail instead of giving random experts.
    """
    members: dict[RecordLayout, list[ExpertWeights]] = {}
    layouts = [record_layout(expert) for expert in experts]
    numbers = {layout: number for number, layout in enumerate(dict.fromkeys(layouts))}
    places = torch.empty(len(experts), 2, dtype=torch.int32)
    for row, (layout, expert) in zip(places, zip(layouts, experts, strict=True), strict=True):
        rows = members.setdefault(layout, [])
        row[0], row[1] = numbers[layout], len(rows)
        rows.append(expert)
    entries = [
        _record_entry(f"{module}.rec{number}", layout, [_projections(e) for e in members[layout]])
        for layout, number in numbers.items()
    ]
    if slots is not None:
        places = places[torch.tensor(slots)]
    entries += [tensor_entry(f"{module}.slot_map", places), tensor_entry(f"{module}.down_proj", GUARD)]
    return tuple(numbers), tuple(entries)


def linear_entries(module: str, weight: Weight) -> tuple[RecordLayout, tuple[Entry, ...]]:
    """A quantized Linear in a shard: `<module>.rec0` uint8 [1, R] and the guard `<module>.weight`."""
    layout = linear_layout(weight)
    record = _record_entry(f"{module}.rec0", layout, [{LINEAR: weight}])
    return layout, (record, tensor_entry(f"{module}.weight", GUARD))


def _view(records: Tensor, part: Part) -> Tensor:
    return records[..., part.offset : part.stop].view(part.dtype).unflatten(-1, part.shape)


def _projections(expert: ExpertWeights) -> dict[str, Weight]:
    return {name: expert.projection(name) for name in PROJECTIONS}


def _record_entry(name: str, layout: RecordLayout, rows: Sequence[Mapping[str, Weight]]) -> Entry:
    shape = (len(rows), layout.row_bytes)
    return Entry(name, torch.uint8, shape, lambda: (_encode(layout, row).numpy().data for row in rows))


def _description(name: str, weight: Weight) -> tuple[tuple[int, int], Scheme, torch.dtype]:
    """(shape, scheme, dtype) of a matrix. Raises ValueError when its tensors contradict its scheme."""
    if len(weight.shape) != 2:
        raise ValueError(f"{name}: shape {tuple(weight.shape)}; allowed: [out, in]")
    shape = (weight.shape[0], weight.shape[1])
    if isinstance(weight, Tensor):
        return shape, RAW, weight.dtype
    found = [(weight.codes.dtype, weight.codes.shape), (weight.scales.dtype, weight.scales.shape)]
    expected = [(torch.uint8, shape)]
    grid = (shape[0], weight.scheme.groups(shape[1]))
    expected.append((weight.scales.dtype, grid))
    if weight.zeros is not None:
        found.append((weight.zeros.dtype, weight.zeros.shape))
    if weight.scheme.zero != "none":
        expected.append((_zero_dtype(weight.scheme, weight.scales.dtype), grid))
    if found != expected or weight.scheme.bits == 16:
        raise ValueError(f"{name}: tensors {found} do not fit {weight.scheme}, which needs {expected}")
    return shape, weight.scheme, weight.scales.dtype


def _part_shapes(
    shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype
) -> list[tuple[torch.dtype, tuple[int, int]]]:
    if scheme.bits == 16:
        return [(dtype, shape)]
    grid = (shape[0], scheme.groups(shape[1]))
    parts = [(torch.uint8, (shape[0], row_bytes(shape[1], scheme.bits))), (dtype, grid)]
    return parts if scheme.zero == "none" else [*parts, (_zero_dtype(scheme, dtype), grid)]


def _zero_dtype(scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
    return torch.uint8 if scheme.zero == "int" else dtype


def _encode(layout: RecordLayout, weights: Mapping[str, Weight]) -> Tensor:
    actual = plan_record([(name, *_description(name, weight)) for name, weight in weights.items()])
    if actual != layout:
        raise ValueError(f"record layout differs: {actual} instead of {layout}")
    row = torch.zeros(layout.row_bytes, dtype=torch.uint8)
    for name, matrix in layout.matrices:
        weight = weights[name]
        if matrix.scheme.bits == 0:
            continue
        codes, scales, zeros = matrix.views(row)
        if isinstance(weight, Tensor):
            codes.copy_(weight)
            continue
        codes.copy_(pack_codes(weight.codes, matrix.scheme.bits))
        for view, tensor in ((scales, weight.scales), (zeros, weight.zeros)):
            if view is not None and tensor is not None:
                view.copy_(tensor)
    return row


def _decode(layout: RecordLayout, row: Tensor) -> dict[str, Weight]:
    if row.dtype != torch.uint8 or tuple(row.shape) != (layout.row_bytes,):
        found = f"{row.dtype} {list(row.shape)}"
        raise CheckpointError(message("expert record", found, f"uint8 [{layout.row_bytes}]"))
    if row.storage_offset() % ALIGNMENT or not row.is_contiguous():
        row = row.clone(memory_format=torch.contiguous_format)  # a wider dtype needs an aligned start
    weights: dict[str, Weight] = {}
    for name, matrix in layout.matrices:
        if matrix.scheme.bits == 0:
            weights[name] = no_bits(matrix.shape, matrix.dtype)
            continue
        codes, scales, zeros = matrix.views(row)
        for tensor in (codes, scales, zeros):
            if tensor is not None and tensor.is_floating_point() and not all(map(torch.isfinite, tensor.aminmax())):
                found = f"{name} holds NaN or Inf"
                raise CheckpointError(message("expert record", found, "finite values", "copy the checkpoint again"))
        if scales is None:
            weights[name] = codes
            continue
        unpacked = unpack_codes(codes, matrix.scheme.bits, matrix.shape[1])
        weights[name] = QuantizedTensor(unpacked, scales, zeros, matrix.scheme)
    return weights
