"""The device layout of packed weights: where every code lies, and records that come back byte for byte."""

from __future__ import annotations

import pytest
import torch
from golden import cuda_bits
from packed_layers import Packed, experts, linear, weight
from torch import Tensor

from moecompress import ops
from moecompress.numerics.packing import unpack_codes
from moecompress.types import QuantizedTensor, Scheme
from moecompress_kernels import cuda, cuda_table
from moecompress_kernels.layer import Matrix, Record


def prepare(packed: Packed) -> list[Tensor]:
    return cuda.prepare(packed.layer, packed.records, packed.slot_map, packed.biases)


pytestmark = pytest.mark.usefixtures("on_shim")

BITS = (1, 2, 3, 4, 8)
SCHEMES = [
    Scheme(4, 32),
    Scheme(3, 64),
    Scheme(2, 128),
    Scheme(8, -1),
    Scheme(4, 96),
    Scheme(1, -1, binary=True),
    Scheme(1, 64, False, "int"),
    Scheme(3, 32, False, "int"),
    Scheme(2, 192, False, "float"),
    Scheme(8, 64, False, "float"),
]


@pytest.mark.parametrize("bits", BITS)
def test_every_bit_of_a_tile_has_its_place_and_only_one(bits: int) -> None:
    spots = [spot for row in range(16) for column in range(128) for spot in cuda_bits(bits, row, column)]
    assert len(set(spots)) == len(spots) == 16 * 128 * bits
    assert max(byte for byte, _ in spots) == 256 * bits - 1


@pytest.mark.parametrize("bits", BITS)
def test_codes_are_where_the_mma_wants_them(bits: int) -> None:
    scheme = Scheme(bits, 128, False, "int")
    matrix = weight(32, 256, scheme)
    assert isinstance(matrix, QuantizedTensor) and matrix.zeros is not None
    blob, _, _ = prepare(linear(matrix))
    stride = 256 * bits + 16 * 2 + 16
    assert blob.numel() == 4 * stride
    for tile in range(4):
        data = blob[tile * stride : (tile + 1) * stride]
        first_row, first_column = tile // 2 * 16, tile % 2 * 128
        for row in range(16):
            for column in range(0, 128, 3):
                code = int(matrix.codes[first_row + row, first_column + column])
                for i, (byte, bit) in enumerate(cuda_bits(bits, row, column)):
                    assert int(data[byte]) >> bit & 1 == code >> i & 1
        scales = data[256 * bits :][:32].view(torch.bfloat16)
        zeros = data[256 * bits + 32 :]
        for row in range(16):  # the two rows of a lane are neighbours
            at = row % 8 * 2 + row // 8
            assert float(scales[at]) == float(matrix.scales[first_row + row, tile % 2])
            assert int(zeros[at]) == int(matrix.zeros[first_row + row, tile % 2])


def test_one_code_by_hand() -> None:
    """Row 9, column 43 of a 4-bit tile: block 1, q 1, step 0, upper columns, second of its pair; lane 5, register 3."""
    assert cuda_bits(4, 9, 43) == [(256 * 4 // 8 * 0 + 5 * 16 + 2 * 4 + 3, bit) for bit in (4, 5, 6, 7)]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
def test_records_come_back_byte_for_byte(scheme: Scheme, dtype: torch.dtype) -> None:
    packed = linear(weight(40, 384, scheme, dtype))
    handle = prepare(packed)
    assert torch.equal(cuda.record(packed.layer, handle, 0), packed.records[0][0])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [32, 40])
def test_records_of_experts_come_back(interleaved: bool, width: int) -> None:
    schemes = [(Scheme(4, 32), Scheme(3)), (Scheme(3), Scheme(4, -1, False, "float")), (Scheme(4, 32), Scheme(3))]
    activation = ops.Activation("silu", interleaved=interleaved)
    packed = experts(schemes, 96, width, activation)
    handle = prepare(packed)
    for expert, (k, row) in enumerate(packed.slot_map.tolist()):
        assert torch.equal(cuda.record(packed.layer, handle, expert), packed.records[k][row])


def test_gate_and_up_tiles_alternate() -> None:
    packed = experts([(Scheme(8), Scheme(8))], 128, 32)
    blob, table, _ = prepare(packed)
    codes = unpacked(packed.records[0][0], packed.layer.records[0].matrices[0])
    stride = int(table[0, 0, 1])
    for tile in range(4):
        row = tile % 2 * 32 + tile // 2 * 16 + 5
        found = [int(blob[tile * stride + cuda_bits(8, 5, column)[0][0]]) for column in range(128)]
        assert found == codes[row].tolist()


def unpacked(record: Tensor, matrix: Matrix) -> Tensor:
    words = -(-matrix.columns * matrix.bits // 32) * 4
    part = record[matrix.codes : matrix.codes + matrix.rows * words].view(matrix.rows, words)
    return unpack_codes(part, matrix.bits, matrix.columns)


def layer_of(activation: ops.Activation | None = None, **changes: object) -> ops.Layer:
    matrix = {"rows": 64, "columns": 64, "bits": 4, "group": 32, "values": "symmetric", "dtype": "bfloat16", "codes": 0}
    return ops.Layer(1, (Record((Matrix(**{**matrix, **changes}),), 64),), activation)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bits": 16, "values": "raw"}, "16 bits"),
        ({"rounding": 8}, "rounded to 8 bits"),
        ({"columns": 60, "group": 60}, "60 input columns"),
        ({"group": 16}, "groups of 16 columns"),
    ],
)
def test_what_the_layout_cannot_hold_has_a_reason(changes: dict[str, object], reason: str) -> None:
    assert reason in str(cuda_table.misfit(layer_of(**changes)))
    assert cuda_table.misfit(layer_of()) is None


def test_experts_of_different_sizes_have_a_reason() -> None:
    small, large = layer_of().records[0], layer_of(rows=128).records[0]
    assert cuda_table.misfit(ops.Layer(2, (small, large))) == "experts have different sizes"


def test_a_device_with_little_shared_memory_is_told(on_shim: cuda.Device) -> None:
    packed = linear(weight(32, 256, Scheme(8, 32, False, "float"), torch.float32))
    assert cuda._unfit(packed.layer, on_shim) is None
    small = cuda.Device(on_shim.library, "cpu", 86, 99 * 1024, "small")
    assert "shared memory" in str(cuda._unfit(packed.layer, small))
    common = linear(weight(32, 256, Scheme(8, 128)))
    assert cuda._unfit(common.layer, small) is None


def test_weights_elsewhere_are_refused() -> None:
    packed = linear(weight(32, 256, Scheme(4, 128)))
    assert cuda.unfit(packed.layer, torch.device("cpu")) == "the weights are on cpu"


def test_experts_that_share_a_record_share_their_tiles() -> None:
    packed = experts([(Scheme(4, 32), Scheme(3, 32))] * 2, 64, 32)
    shared = torch.tensor([[0, 1], [0, 0], [0, 1]], dtype=torch.int32)
    layer = ops.Layer(3, packed.layer.records, packed.layer.activation)
    handle = cuda.prepare(layer, packed.records, shared, [])
    assert handle[0].numel() == prepare(packed)[0].numel()
    for expert, (_, row) in enumerate(shared.tolist()):
        assert torch.equal(cuda.record(layer, handle, expert), packed.records[0][row])
