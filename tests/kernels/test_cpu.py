"""The compiled CPU kernels: every width, group, zero point and instruction set against float64."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import packed_layers as layers
import pytest
import torch

from moecompress import ops
from moecompress.numerics.activation import activation_codes
from moecompress.types import Scheme
from moecompress_kernels import cpu

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
ISAS = cpu.isas() if cpu.unavailable() is None else []
BF16, F32 = torch.bfloat16, torch.float32
SCHEMES = [
    Scheme(bits, group, zero == "none", zero)  # type: ignore[arg-type]
    for bits, group, zero in itertools.product((1, 2, 3, 4, 8), (16, 32, 64, -1), ("none", "int", "float"))
] + [Scheme(1, group, binary=True) for group in (16, 64, -1)]
LIMIT = {F32: 3e-6, BF16: 4e-3, torch.float16: 6e-4}  # relative: sums in another order; rounding of inner and of output


def run(packed: layers.Packed, inputs: Any, isa: int | None = None) -> torch.Tensor:
    handle = cpu.prepare(packed.layer, packed.records, packed.slot_map, packed.biases)
    return cpu.moe_mlp(packed.layer, handle, *inputs, isa=isa)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa[1])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_every_scheme_multiplies(isa: tuple[int, str], dtype: torch.dtype) -> None:
    """Linears of every width, group and zero point: one row, two, and enough for the blocked path."""
    for number, scheme in enumerate((*SCHEMES, Scheme(16))):
        matrix = layers.weight(80, 192, scheme, seed=number)
        packed = layers.linear(matrix)
        handle = cpu.prepare(packed.layer, packed.records, packed.slot_map, [])
        for rows in (1, 2, 13):
            x = torch.randn(rows, 192, generator=layers.generator(rows)).to(dtype)
            found = cpu.packed_linear(packed.layer, handle, x, isa=isa[0])
            wanted = x.double() @ layers.values(matrix).T
            assert layers.error(found, wanted) <= LIMIT[dtype], (scheme, rows)


@pytest.mark.parametrize("dtype", [F32, torch.float16, BF16], ids=str)
@pytest.mark.parametrize("columns", [32, 40, 7, 100])
def test_sizes_that_do_not_divide(columns: int, dtype: torch.dtype) -> None:
    for rows, stored, bits in itertools.product((1, 33), (BF16, torch.float16, F32), (3, 4, 8, 16)):
        matrix = layers.weight(rows, columns, Scheme(bits), stored, seed=rows)
        packed = layers.linear(matrix)
        handle = cpu.prepare(packed.layer, packed.records, packed.slot_map, [])
        x = torch.randn(5, columns, generator=layers.generator(1)).to(dtype)
        for isa, _ in ISAS:
            found = cpu.packed_linear(packed.layer, handle, x, isa=isa)
            assert layers.error(found, x.double() @ layers.values(matrix).T) <= LIMIT[dtype], (rows, stored, bits, isa)


MIXED = [
    (Scheme(4, 32), Scheme(4, 16)),
    (Scheme(3, 64), Scheme(2, 16, False, "int")),
    (Scheme(4, 32), Scheme(4, 16)),
    (Scheme(1, -1, binary=True), Scheme(8)),
    (Scheme(16), Scheme(3, -1, False, "float")),
    (Scheme(8, 32, False, "int"), Scheme(16)),
]
ACTIVATIONS = [
    layers.SILU,
    ops.Activation("silu", interleaved=True, alpha=1.702, limit=7.0, shift=1.0),
    ops.Activation("silu", limit=0.5),
    ops.Activation("gelu"),
    ops.Activation("gelu_tanh"),
    ops.Activation("relu2", gated=False),
    ops.Activation("relu", gated=False),
]


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa[1])
@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
def test_mixed_experts_in_one_call(isa: tuple[int, str], tokens: int, dtype: torch.dtype) -> None:
    packed = layers.experts(MIXED)
    inputs = layers.routing(tokens, len(MIXED), 3, 64, dtype, seed=tokens)
    assert layers.error(run(packed, inputs, isa[0]), layers.oracle(packed, *inputs)) <= LIMIT[dtype]


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa[1])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activations_biases_and_ragged_widths(isa: tuple[int, str], activation: ops.Activation) -> None:
    for width in (48, 20):
        packed = layers.experts([(Scheme(4, 32), Scheme(3))] * 3, 64, width, activation, bias=True)
        inputs = layers.routing(7, 3, 2, 64, F32)
        assert layers.error(run(packed, inputs, isa[0]), layers.oracle(packed, *inputs)) <= LIMIT[F32]


def test_records_come_back_byte_for_byte() -> None:
    for dtype, width in itertools.product((BF16, torch.float16, F32), (48, 20)):
        schemes = [pair for pair in MIXED if width % 16 == 0 or pair[1].group_size == -1]
        for activation in (layers.SILU, ACTIVATIONS[1], ACTIVATIONS[5]):
            packed = layers.experts(schemes, 64, width, activation, dtype)
            handle = cpu.prepare(packed.layer, packed.records, packed.slot_map, [])
            for expert, (k, row) in enumerate(packed.slot_map.tolist()):
                assert torch.equal(cpu.record(packed.layer, handle, expert), packed.records[k][row])
    for number, scheme in enumerate(SCHEMES):
        packed = layers.linear(layers.weight(50, 64, scheme, seed=number))
        handle = cpu.prepare(packed.layer, packed.records, packed.slot_map, [])
        assert torch.equal(cpu.record(packed.layer, handle, 0), packed.records[0][0]), scheme


def test_experts_may_share_a_record() -> None:
    packed = layers.experts([MIXED[0], MIXED[1]])
    slot_map = packed.slot_map[[0, 1, 0]]
    shared = layers.Packed(
        replace(packed.layer, experts=3), packed.records, slot_map, [], packed.weights + packed.weights[:1]
    )
    inputs = layers.routing(6, 3, 2, 64, F32)
    assert layers.error(run(shared, inputs), layers.oracle(shared, *inputs)) <= LIMIT[F32]
    sizes = [cpu.prepare(p.layer, p.records, p.slot_map, [])[0].numel() for p in (packed, shared)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa[1])
@pytest.mark.parametrize("bits", ["int4", "int8"])
def test_rounded_inputs_have_the_codes_of_the_definition(isa: tuple[int, str], bits: str) -> None:
    """Against the product of integer codes; a code off by one anywhere would be seen at 1e-6."""
    for clip, group in itertools.product((1.0, 0.8), (32, -1)):
        scheme = Scheme(4, group, False, "int", activation=bits, activation_clip=clip)  # type: ignore[arg-type]
        matrix = layers.weight(48, 96, scheme)
        packed = layers.linear(matrix)
        handle = cpu.prepare(packed.layer, packed.records, packed.slot_map, [])
        x = torch.randn(9, 96, generator=layers.generator(3))
        x[4] = 0
        x[5] = torch.arange(96) / 16 - 3  # many ties
        codes, steps = activation_codes(x, int(bits[3:]), clip)
        wanted = steps.double() * (codes.double() @ layers.values(matrix).T)
        for rows in (1, 9):
            assert layers.error(cpu.packed_linear(packed.layer, handle, x[-rows:], isa=isa[0]), wanted[-rows:]) <= 1e-6
        halves = x.bfloat16()
        codes, steps = activation_codes(halves, int(bits[3:]), clip)
        wanted = steps.double() * (codes.double() @ layers.values(matrix).T)
        assert layers.error(cpu.packed_linear(packed.layer, handle, halves, isa=isa[0]), wanted) <= LIMIT[BF16]


@pytest.mark.parametrize("bits", ["int4", "int8"])
def test_integer_products_have_the_same_bits_everywhere(bits: Any) -> None:
    """Whatever the instruction set and the number of rows; and they are the float64 product of the codes, rounded."""
    wide = [Scheme(width, -1, zero == "none", zero) for width in (3, 8) for zero in ("none", "int")]  # type: ignore[arg-type]
    cases = [(scheme, 192) for scheme in SCHEMES] + [(scheme, 1120) for scheme in wide]  # 1120: pieces of a group
    for number, (scheme, columns) in enumerate(cases):
        scheme = replace(scheme, activation=bits)
        matrix = layers.weight(80, columns, scheme, seed=number)
        packed = layers.linear(matrix)
        handle = cpu.prepare(packed.layer, packed.records, packed.slot_map, [])
        x = torch.randn(23, columns, generator=layers.generator(number))
        found = [cpu.packed_linear(packed.layer, handle, x, isa=isa) for isa, _ in ISAS]
        for isa, other in zip(ISAS, found, strict=True):
            assert torch.equal(other, found[0]), (scheme, isa)
            for rows in (1, 2, 7):
                few = cpu.packed_linear(packed.layer, handle, x[:rows], isa=isa[0])
                assert torch.equal(few, found[0][:rows]), (scheme, isa, rows)
        codes, steps = activation_codes(x, int(bits[3:]))
        assert layers.error(found[0], steps.double() * (codes.double() @ layers.values(matrix).T)) <= 3e-7, scheme


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_rounded_experts_have_the_same_bits_everywhere(activation: ops.Activation, dtype: torch.dtype) -> None:
    """Activations too: a last bit that differs there would change codes of what goes into `down`."""
    schemes = [(replace(up, activation="int8"), replace(down, activation="int8")) for up, down in MIXED[:4]]
    packed = layers.experts(schemes, 64, 48, activation, bias=True)
    inputs = layers.routing(40, len(schemes), 3, 64, dtype)
    found = [run(packed, inputs, isa) for isa, _ in ISAS]
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_rounded_experts() -> None:
    schemes = [(Scheme(4, 32, activation="int4"), Scheme(3, 16, activation="int8")), (Scheme(4, 32), Scheme(4, 16))]
    packed = layers.experts(schemes)
    inputs = layers.routing(6, 2, 2, 64, F32)
    wanted = ops.moe_mlp(*inputs, layers.sealed_handle(packed, "torch"), "torch", packed.layer.text)
    assert layers.error(run(packed, inputs), wanted) <= LIMIT[F32]
