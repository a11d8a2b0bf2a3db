"""Records: every width and mixture comes back exactly, parts are aligned views, wrong input is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from moecompress.checkpoint.native import (
    GUARD,
    RecordLayout,
    decode,
    decode_linear,
    encode,
    encode_linear,
    expert_entries,
    linear_entries,
    linear_layout,
    plan_record,
    record_layout,
)
from moecompress.checkpoint.writer import write_shard
from moecompress.errors import CheckpointError
from moecompress.types import Activation, ExpertWeights, QuantizedTensor, Scheme, Weight, Zero

FLOATS = [torch.bfloat16, torch.float16, torch.float32]


def matrix(rows: int, columns: int, scheme: Scheme, dtype: torch.dtype, seed: int = 0) -> Weight:
    generator = torch.Generator().manual_seed(seed)
    if scheme.bits == 16:
        return torch.randn(rows, columns, generator=generator).to(dtype)
    codes = torch.randint(0, 2**scheme.bits, (rows, columns), generator=generator, dtype=torch.uint8)
    grid = (rows, scheme.groups(columns))
    scales = torch.rand(grid, generator=generator).to(dtype)
    zeros = None
    if scheme.zero == "int":
        zeros = torch.randint(0, 2**scheme.bits, grid, generator=generator, dtype=torch.uint8)
    if scheme.zero == "float":
        zeros = torch.randn(grid, generator=generator).to(dtype)
    return QuantizedTensor(codes, scales, zeros, scheme)


def same(first: Weight, second: Weight) -> bool:
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        both = isinstance(first, Tensor) and isinstance(second, Tensor)
        return both and first.dtype == second.dtype and torch.equal(first, second)  # type: ignore[arg-type, union-attr]
    if first.scheme != second.scheme or (first.zeros is None) != (second.zeros is None):
        return False
    pairs = [(first.codes, second.codes), (first.scales, second.scales), (first.zeros, second.zeros)]
    return all(a is None or b is None or (a.dtype == b.dtype and torch.equal(a, b)) for a, b in pairs)


@st.composite
def schemes(draw: st.DrawFn) -> Scheme:
    bits = draw(st.sampled_from([1, 2, 3, 4, 8, 16]))
    if bits == 16:
        return Scheme(16)
    zero: Zero = draw(st.sampled_from(["none", "int", "float"]))
    binary = bits == 1 and zero == "none" and draw(st.booleans())
    group_size = draw(st.sampled_from([-1, 4]))
    activation: Activation = draw(st.sampled_from(["none", "int4", "int8"]))
    return Scheme(bits, group_size, zero == "none", zero, binary, activation)


@settings(max_examples=120, deadline=None)
@given(
    gate_up=schemes(),
    down=schemes(),
    dtypes=st.tuples(st.sampled_from(FLOATS), st.sampled_from(FLOATS)),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 7)),
    offset=st.sampled_from([0, 1, 64]),
)
def test_roundtrip(
    gate_up: Scheme,
    down: Scheme,
    dtypes: tuple[torch.dtype, torch.dtype],
    sizes: tuple[int, int, int],
    offset: int,
) -> None:
    hidden, width, rows = 4 * sizes[0], 4 * sizes[1], sizes[2]
    expert = ExpertWeights(matrix(2 * rows, hidden, gate_up, dtypes[0], 1), matrix(hidden, width, down, dtypes[1], 2))
    layout = record_layout(expert)
    row = encode(layout, expert)
    assert row.dtype == torch.uint8 and row.shape == (layout.row_bytes,) and layout.row_bytes % 64 == 0
    shifted = torch.cat([torch.full((offset,), 255, dtype=torch.uint8), row])[offset:]
    found = decode(layout, shifted)
    assert same(found.gate_up, expert.gate_up) and same(found.down, expert.down)
    assert torch.equal(encode(layout, found), row)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("zero", ["none", "int", "float"])
@pytest.mark.parametrize("columns", [32, 40, 33])
def test_bits_lie_where_the_format_says(bits: int, zero: Zero, columns: int) -> None:
    """Codes are read from the raw bytes with integer arithmetic alone, scales with their offsets."""
    scheme = Scheme(bits, -1, zero == "none", zero)
    weight = matrix(3, columns, scheme, torch.float32)
    assert isinstance(weight, QuantizedTensor)
    layout = linear_layout(weight)
    row = encode_linear(layout, weight)
    data = bytes(row.numpy())
    per_row = -(-columns * bits // 32) * 4
    for r in range(3):
        stream = int.from_bytes(data[r * per_row : (r + 1) * per_row], "little")
        assert [(stream >> (bits * c)) % 2**bits for c in range(columns)] == weight.codes[r].tolist()
    start = -(-3 * per_row // 64) * 64
    assert data[3 * per_row : start] == bytes(start - 3 * per_row)
    assert torch.frombuffer(bytearray(data[start : start + 12]), dtype=torch.float32).tolist() == (
        weight.scales[:, 0].tolist()
    )
    if weight.zeros is not None:
        size = 3 * weight.zeros.itemsize
        zeros = torch.frombuffer(bytearray(data[start + 64 : start + 64 + size]), dtype=weight.zeros.dtype)
        assert zeros.tolist() == weight.zeros[:, 0].tolist()
    assert len(data) == start + (64 if weight.zeros is None else 128)
    assert same(decode_linear(layout, row), weight)


def test_views_of_many_records_share_memory_and_keep_the_leading_dimension() -> None:
    scheme = Scheme(4, 8, False, "float")
    weights = [matrix(6, 16, scheme, torch.bfloat16, seed) for seed in range(3)]
    layout = linear_layout(weights[0])
    records = torch.stack([encode_linear(layout, weight) for weight in weights])
    codes, scales, zeros = layout.matrix("weight").views(records)
    assert codes.shape == (3, 6, 8) and scales is not None and zeros is not None
    for number, weight in enumerate(weights):
        assert isinstance(weight, QuantizedTensor) and weight.zeros is not None
        assert torch.equal(scales[number], weight.scales) and torch.equal(zeros[number], weight.zeros)
    begin, end = records.data_ptr(), records.data_ptr() + records.numel()
    assert all(begin <= view.data_ptr() < end for view in (codes, scales, zeros))


def test_equal_layouts_are_equal_and_hashable() -> None:
    def layout(bits: int, dtype: torch.dtype, activation: str = "none") -> RecordLayout:
        scheme = Scheme(bits, 4, activation=activation)  # type: ignore[arg-type]
        return record_layout(ExpertWeights(matrix(4, 8, scheme, dtype), matrix(8, 4, Scheme(2, 4), dtype)))

    assert layout(4, torch.bfloat16) == layout(4, torch.bfloat16)
    different = [(4, torch.bfloat16), (4, torch.float16), (3, torch.bfloat16), (4, torch.bfloat16, "int8")]
    assert len({layout(*case) for case in different * 2}) == 4  # type: ignore[arg-type]


def mixed_layer(count: int = 7) -> list[ExpertWeights]:
    widths = [4, 3, 16, 4, 1, 3, 4]
    return [
        ExpertWeights(
            matrix(8, 32, Scheme(widths[e]) if widths[e] == 16 else Scheme(widths[e], 16), torch.bfloat16, e),
            matrix(32, 4, Scheme(2), torch.bfloat16, 100 + e),
        )
        for e in range(count)
    ]


def test_entries_of_a_layer(tmp_path: Path) -> None:
    experts = mixed_layer()
    layouts, entries = expert_entries("model.layers.0.mlp.experts", experts)
    write_shard(tmp_path / "m.safetensors", entries)
    loaded = load_file(tmp_path / "m.safetensors")
    prefix = "model.layers.0.mlp.experts"
    expected = {f"{prefix}.{name}" for name in ("rec0", "rec1", "rec2", "rec3", "slot_map", "down_proj")}
    assert set(loaded) == expected and len(layouts) == 4
    assert torch.equal(loaded[f"{prefix}.down_proj"], GUARD)
    slots = loaded[f"{prefix}.slot_map"]
    assert slots.dtype == torch.int32
    assert slots.tolist() == [[0, 0], [1, 0], [2, 0], [0, 1], [3, 0], [1, 1], [0, 2]]
    for expert, (k, row) in zip(experts, slots.tolist(), strict=True):
        record = loaded[f"{prefix}.rec{k}"]
        assert record.shape[1] == layouts[k].row_bytes
        found = decode(layouts[k], record[row])
        assert same(found.gate_up, expert.gate_up) and same(found.down, expert.down)


def test_entries_of_a_linear(tmp_path: Path) -> None:
    weight = matrix(12, 20, Scheme(8), torch.float16)
    layout, entries = linear_entries("model.layers.0.self_attn.q_proj", weight)
    write_shard(tmp_path / "m.safetensors", entries)
    loaded = load_file(tmp_path / "m.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in loaded.items()} == {
        "model.layers.0.self_attn.q_proj.rec0": (1, layout.row_bytes),
        "model.layers.0.self_attn.q_proj.weight": (1,),
    }
    assert same(decode_linear(layout, loaded["model.layers.0.self_attn.q_proj.rec0"][0]), weight)


def test_wrong_rows_are_refused() -> None:
    expert = mixed_layer(1)[0]
    layout = record_layout(expert)
    row = encode(layout, expert)
    for wrong in (row[:-1], row[None], row.view(torch.int32), torch.cat([row, row])):
        with pytest.raises(CheckpointError, match=f"Allowed: uint8 .{layout.row_bytes}.$"):
            decode(layout, wrong)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_record_with_values_that_are_not_finite(value: float) -> None:
    for scheme, name in (
        (Scheme(4, 4, False, "float"), "scales"),
        (Scheme(4, 4, False, "float"), "zeros"),
        (RAW, "raw"),
    ):
        weight = matrix(4, 8, scheme, torch.bfloat16)
        target = weight if isinstance(weight, Tensor) else getattr(weight, name)
        target[1, 1] = value
        layout = linear_layout(weight)
        with pytest.raises(CheckpointError, match="weight holds NaN or Inf"):
            decode_linear(layout, encode_linear(layout, weight))


RAW = Scheme(16)


def test_tensors_that_contradict_their_scheme() -> None:
    good = matrix(4, 8, Scheme(3, 4, False, "int"), torch.bfloat16)
    assert isinstance(good, QuantizedTensor) and good.zeros is not None
    wrong: list[Weight] = [
        replace(good, scales=good.scales[:, :1]),
        replace(good, scales=good.scales.T.contiguous()),
        replace(good, zeros=None),
        replace(good, zeros=good.zeros.to(torch.bfloat16)),
        replace(good, codes=good.codes.to(torch.int16)),
        replace(good, scheme=Scheme(3, 4)),
        replace(good, scheme=Scheme(3, 3, False, "int")),
        replace(good, scheme=RAW),
        replace(good, scales=good.scales.double()),
        torch.zeros(4, 8, dtype=torch.float64),
        torch.zeros(4),
        torch.zeros(0, 4),
    ]
    for weight in wrong:
        with pytest.raises(ValueError):
            linear_layout(weight)
    linear_layout(good)


def test_encoding_into_a_foreign_layout_or_too_large_codes() -> None:
    four, three = matrix(4, 8, Scheme(4), torch.bfloat16), matrix(4, 8, Scheme(3), torch.bfloat16)
    with pytest.raises(ValueError, match="layout differs"):
        encode_linear(linear_layout(four), three)
    assert isinstance(three, QuantizedTensor)
    with pytest.raises(ValueError, match="8"):
        encode_linear(linear_layout(three), replace(three, codes=torch.full((4, 8), 8, dtype=torch.uint8)))


def test_size_is_codes_scales_zeros_and_padding_below_64_each() -> None:
    schemes = [("gate_up", (96, 128), Scheme(3, 32, False, "int")), ("down", (128, 48), Scheme(2))]
    layout = plan_record([(name, shape, scheme, torch.bfloat16) for name, shape, scheme in schemes])
    wanted = [96 * 128 * 3 // 8, 96 * 4 * 2, 96 * 4, 128 * 48 * 2 // 8, 128 * 2]
    assert layout.row_bytes == sum(-(-size // 64) * 64 for size in wanted)
