"""What the CUDA kernels compute, against float64: from their own sources on the CPU, and with `-m gpu` on a device."""

from __future__ import annotations

import pytest
import torch
from packed_layers import MIXED, Packed, error, experts, handle_of, linear, oracle, routing, values, weight
from torch import Tensor

from moecompress import ops
from moecompress.types import QuantizedTensor, Scheme
from moecompress_kernels import cuda

BF16, FP16 = torch.bfloat16, torch.float16
DTYPES = [BF16, FP16]
DECODE = {BF16: 3e-3, FP16: 4e-4}  # relative error of results rounded to this dtype
PREFILL = {BF16: 5e-3, FP16: 6e-4}  # weights and each slot's result are rounded to it as well
W4 = (Scheme(4, 32), Scheme(4, 32))


class Place:
    """Where the kernels run: "cpu" under the shim, or "cuda"."""

    device = "cpu"


@pytest.fixture(autouse=True, params=["shim", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "shim":
        request.getfixturevalue("on_shim")
    elif reason := cuda.unavailable():
        pytest.skip(reason)
    monkeypatch.setattr(Place, "device", "cpu" if request.param == "shim" else "cuda")


def gate(tokens: int, dtype: torch.dtype) -> float:
    return (DECODE if tokens <= cuda.DECODE_TOKENS else PREFILL)[dtype]


def prepare(packed: Packed) -> list[Tensor]:
    return handle_of(packed, ops.backend("cuda"), Place.device)


def run(packed: Packed, hidden: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
    inputs = [one.to(Place.device) for one in (hidden, ids, gates)]
    return cuda.moe_mlp(packed.layer, prepare(packed), *inputs).cpu()


def run_linear(packed: Packed, inputs: Tensor) -> Tensor:
    return cuda.packed_linear(packed.layer, prepare(packed), inputs.to(Place.device)).cpu()


def exact(packed: Packed, hidden: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
    return oracle(packed, hidden, ids, gates, hidden.dtype)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_code_at_every_place_is_decoded_exactly(bits: int, dtype: torch.dtype) -> None:
    """Unit vectors through a Linear with scale one give the integers themselves: no tolerance."""
    rows, columns = 24, 136
    codes = torch.arange(rows * columns).reshape(rows, columns).mul(7919) % (1 << bits)
    assert len(codes.unique()) == 1 << bits
    ones, zeros = torch.ones(rows, 1, dtype=BF16), (torch.arange(rows)[:, None] % (1 << bits)).to(torch.uint8)
    matrix = QuantizedTensor(codes.to(torch.uint8), ones, zeros, Scheme(bits, -1, False, "int"))
    packed, units, wanted = linear(matrix), torch.eye(columns, dtype=dtype), values(matrix).T
    assert torch.equal(run_linear(packed, units).double(), wanted)  # prefill
    for start in range(0, columns, cuda.DECODE_TOKENS):
        part = slice(start, start + cuda.DECODE_TOKENS)
        assert torch.equal(run_linear(packed, units[part]).double(), wanted[part])


@pytest.mark.parametrize("tokens", [1, 2, 8, 11, 19])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_bits_in_one_launch(tokens: int, dtype: torch.dtype) -> None:
    """Every width, group, kind of zero point and sign of scale, per expert and projection; biases; skipped slots."""
    packed = experts(MIXED, 256, 96, bias=True)
    inputs = routing(tokens, len(MIXED), 3, 256, dtype, seed=tokens)
    assert error(run(packed, *inputs), exact(packed, *inputs)) < gate(tokens, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_rounds_nothing_but_its_result(dtype: torch.dtype) -> None:
    packed = experts(MIXED, 256, 96, bias=True)
    inputs = routing(9, len(MIXED), 3, 256, dtype)
    found, wanted = run(packed, *inputs), exact(packed, *inputs).to(dtype)
    assert (found != wanted).float().mean() < 0.03  # only what lies beside a tie may round the other way
    assert error(found, wanted) < DECODE[dtype] / 5


ACTIVATIONS = [
    ops.Activation("silu"),
    ops.Activation("gelu"),
    ops.Activation("gelu_tanh"),
    ops.Activation("silu", interleaved=True, alpha=1.702, limit=0.7, shift=1.0),
    ops.Activation("silu", limit=0.5),
    ops.Activation("relu2", gated=False),
    ops.Activation("silu", gated=False),
    ops.Activation("relu"),
]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("tokens", [2, 17])
def test_activations_and_orders_of_rows(activation: ops.Activation, tokens: int) -> None:
    """A width and a hidden size that fill no tile; clamps that bite; without a gate."""
    packed = experts([(Scheme(4), Scheme(3)), (Scheme(3), Scheme(4))], 72, 40, activation, bias=True)
    inputs = routing(tokens, 2, 2, 72, FP16)
    assert error(run(packed, *inputs), exact(packed, *inputs)) < gate(tokens, FP16)


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [3, 18])
def test_scales_of_other_types(scale_dtype: torch.dtype, tokens: int) -> None:
    schemes = [(Scheme(4, 32, False, "float"), Scheme(3, 32)), (Scheme(3, 64), Scheme(4, -1, False, "float"))]
    packed = experts(schemes, 128, 64, dtype=scale_dtype)
    inputs = routing(tokens, 2, 2, 128, BF16)
    assert error(run(packed, *inputs), exact(packed, *inputs)) < gate(tokens, BF16)


@pytest.mark.parametrize(("size", "dtype"), [(1e-12, BF16), (1e12, BF16), (3e-5, FP16), (300.0, FP16)], ids=str)
def test_scales_far_from_one_survive_16_bits(size: float, dtype: torch.dtype) -> None:
    """Prefill multiplies codes with scales in 16 bits: a power of two per matrix keeps them in range."""
    matrix = weight(32, 128, Scheme(4, 32), torch.float32)
    assert isinstance(matrix, QuantizedTensor)
    packed = linear(QuantizedTensor(matrix.codes, matrix.scales * size, None, matrix.scheme))
    inputs = torch.randn(20, 128, generator=torch.Generator().manual_seed(2)).to(dtype)
    found, wanted = run_linear(packed, inputs), inputs.double() @ values(matrix).T * size
    assert error(found.double() / size, wanted / size) < max(PREFILL[dtype], 2.0**-25 / size)


@pytest.mark.parametrize("tokens", [1, 7, 16, 17, 70, 140])
def test_linears(tokens: int) -> None:
    """Decode and all shapes of prefill for a Linear."""
    matrix = weight(72, 264, Scheme(4))
    packed = linear(matrix)
    inputs = torch.randn(tokens, 264, generator=torch.Generator().manual_seed(8)).to(FP16)
    found = run_linear(packed, inputs)
    assert error(found, inputs.double() @ values(matrix).T) < gate(tokens, FP16)


@pytest.mark.parametrize("tokens", [33, 290])
def test_larger_blocks_of_prefill(tokens: int) -> None:
    """Blocks of 64 and of 128 tokens with several experts."""
    packed = experts([(Scheme(4, 64), Scheme(3, 64)), (Scheme(3, 64), Scheme(2, 64))], 64, 64)
    assert cuda.block_of(tokens) == (64 if tokens == 33 else 128)
    inputs = routing(tokens, 2, 2, 64, BF16)
    assert error(run(packed, *inputs), exact(packed, *inputs)) < PREFILL[BF16]


@pytest.mark.parametrize("tokens", [6, 20])
def test_odd_routing(tokens: int) -> None:
    """One expert for all, an id twice in a token, ids outside the range on both sides, tokens with no expert."""
    packed = experts([W4] * 3, 64, 32)
    hidden, _, gates = routing(tokens, 3, 2, 64, BF16)
    for pair in ([1, 1], [2, 3], [-1, 0], [7, -(1 << 40)], [3, 3]):
        ids = torch.tensor([pair]).expand(tokens, -1).contiguous()
        wanted, found = exact(packed, hidden, ids, gates), run(packed, hidden, ids, gates)
        if wanted.any():
            assert error(found, wanted) < gate(tokens, BF16)
        else:
            assert not found.any()


@pytest.mark.parametrize(("tokens", "slots"), [(0, 2), (3, 0), (0, 0)])
def test_nothing_to_do(tokens: int, slots: int) -> None:
    ids, gates = torch.zeros(tokens, slots, dtype=torch.int64), torch.zeros(tokens, slots)
    found = run(experts([W4], 64, 32), torch.ones(tokens, 64, dtype=BF16), ids, gates)
    assert found.shape == (tokens, 64) and not found.any()


@pytest.mark.parametrize("tokens", [5, 18])
def test_many_slots(tokens: int) -> None:
    """More slots than the decode pair has room for go through prefill."""
    packed = experts([W4] * 40, 32, 32)
    inputs = routing(tokens, 40, 34, 32, BF16)
    assert error(run(packed, *inputs), exact(packed, *inputs)) < PREFILL[BF16]


@pytest.mark.parametrize("tokens", [4, 18])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_row(tokens: int, bad: float) -> None:
    packed = experts([W4, (Scheme(3, 32), Scheme(4, 32))], 64, 32)
    hidden, _, gates = routing(tokens, 2, 2, 64, BF16)
    ids = torch.tensor([[0, 1]]).repeat(tokens, 1)
    clean = run(packed, hidden, ids, gates)
    hidden[1, 3] = bad
    found = run(packed, hidden, ids, gates)
    assert not found[1].isfinite().any()
    others = [token for token in range(tokens) if token != 1]
    assert torch.equal(found[others], clean[others])


def test_inputs_of_another_type_are_refused() -> None:
    packed = experts([W4], 64, 32)
    with pytest.raises(ValueError, match="float32; allowed: bfloat16 and float16"):
        run(packed, torch.zeros(1, 64), torch.zeros(1, 1).long(), torch.ones(1, 1))


def test_inputs_at_any_address() -> None:
    matrix = weight(32, 64, Scheme(4, 32))
    packed, inputs = linear(matrix), torch.zeros(2 * 64 + 1, dtype=BF16)[1:].view(2, 64)
    inputs.copy_(torch.randn(2, 64, generator=torch.Generator().manual_seed(1)))
    assert inputs.data_ptr() % 16
    found = run_linear(packed, inputs)
    assert error(found, inputs.double() @ values(matrix).T) < DECODE[BF16]


def test_the_operator_reaches_the_backend() -> None:
    packed = experts([W4] * 2, 64, 32)
    hidden, ids, gates = (one.to(Place.device) for one in routing(3, 2, 2, 64, BF16))
    handle, gates = prepare(packed), gates.bfloat16()
    found = ops.moe_mlp(hidden, ids.int(), gates, ops.sealed("cuda", packed.layer, handle), "cuda", packed.layer.text)
    assert error(found.cpu(), exact(packed, hidden.cpu(), ids.cpu(), gates.cpu())) < DECODE[BF16]


def test_records_come_back() -> None:
    packed = experts(MIXED, 256, 96)
    handle = prepare(packed)
    for expert, (k, row) in enumerate(packed.slot_map.tolist()):
        assert torch.equal(cuda.record(packed.layer, handle, expert).cpu(), packed.records[k][row])
