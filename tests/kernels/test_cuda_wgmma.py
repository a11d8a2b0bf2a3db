"""Prefill by warp groups (wgmma) against float64 and against the other prefill: its own source on the CPU, where the
instruction is emulated from its documentation, and with `-m gpu` on a device that has it."""

from __future__ import annotations

import pytest
import torch
from packed_layers import MIXED, Packed, error, experts, handle_of, linear, oracle, routing, values, weight
from torch import Tensor

from moecompress import ops
from moecompress.types import QuantizedTensor, Scheme
from moecompress_kernels import cuda

BF16, FP16 = torch.bfloat16, torch.float16
PREFILL = {BF16: 5e-3, FP16: 6e-4}  # as in test_cuda.py: weights and each slot's result are rounded to it
DEVICE = {"shim": "cpu", "cuda": "cuda"}


@pytest.fixture(autouse=True, params=["shim", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the kernels run."""
    if request.param == "shim":
        request.getfixturevalue("on_shim")
    elif reason := cuda.unavailable():
        pytest.skip(reason)
    monkeypatch.setenv(cuda.PREFILL, "wgmma")
    name, why = cuda.prefill_of(cuda._device(torch.cuda.current_device() if request.param == "cuda" else 0))
    if name != "wgmma":
        pytest.skip(why)
    return str(request.param)


def run(packed: Packed, inputs: list[Tensor], place: str) -> Tensor:
    """What a layer or a Linear gives; on the CPU the same bits as with mma, which adds the same terms in this order."""
    device = DEVICE[place]
    handle, inputs = handle_of(packed, ops.backend("cuda"), device), [one.to(device) for one in inputs]
    call = cuda.moe_mlp if len(inputs) == 3 else cuda.packed_linear
    if place == "cuda":
        return call(packed.layer, handle, *inputs).cpu()
    products, found = cuda._of(inputs[0]).library.mc_shim_products, []
    for prefill in ("wgmma", "mma"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(cuda.PREFILL, prefill)
            before = products()
            found.append(call(packed.layer, handle, *inputs))
        assert (products() > before) == (prefill == "wgmma")  # it was the instruction that was asked for
    assert torch.equal(*(one.nan_to_num(7.0) for one in found))
    return found[0]


def check(packed: Packed, inputs: list[Tensor], place: str) -> None:
    dtype = inputs[0].dtype
    assert error(run(packed, inputs, place), oracle(packed, *inputs, dtype)) < PREFILL[dtype]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_every_code_at_every_place_is_decoded_exactly(bits: int, dtype: torch.dtype, place: str) -> None:
    """Unit vectors through a Linear with scale one give the integers themselves: no tolerance."""
    rows, columns = 24, 136
    codes = torch.arange(rows * columns).reshape(rows, columns).mul(7919) % (1 << bits)
    ones, zeros = torch.ones(rows, 1, dtype=BF16), (torch.arange(rows)[:, None] % (1 << bits)).to(torch.uint8)
    matrix = QuantizedTensor(codes.to(torch.uint8), ones, zeros, Scheme(bits, -1, False, "int"))
    assert torch.equal(run(linear(matrix), [torch.eye(columns, dtype=dtype)], place).double(), values(matrix).T)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_mixed_bits_in_one_launch(dtype: torch.dtype, place: str) -> None:
    """Every width, group, kind of zero point and sign of scale, per expert and projection; biases; skipped slots."""
    check(experts(MIXED, 256, 96, bias=True), routing(40, len(MIXED), 3, 256, dtype), place)


ACTIVATIONS = [
    ops.Activation("silu", limit=0.5),
    ops.Activation("gelu_tanh"),
    ops.Activation("silu", interleaved=True, alpha=1.702, limit=0.7, shift=1.0),
    ops.Activation("relu2", gated=False),
]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activations_and_orders_of_rows(activation: ops.Activation, place: str) -> None:
    """A width and a hidden size that fill no tile and no block of 32 columns."""
    packed = experts([(Scheme(4), Scheme(3)), (Scheme(3), Scheme(4))], 72, 40, activation, bias=True)
    check(packed, routing(33, 2, 2, 72, FP16), place)


@pytest.mark.parametrize("scale_dtype", [FP16, torch.float32], ids=str)
def test_scales_of_other_types(scale_dtype: torch.dtype, place: str) -> None:
    schemes = [(Scheme(4, 32, False, "float"), Scheme(3, 32)), (Scheme(3, 64), Scheme(4, -1, False, "float"))]
    check(experts(schemes, 128, 64, dtype=scale_dtype), routing(40, 2, 2, 128, BF16), place)


def test_the_largest_tiles_fit(place: str) -> None:
    """8 bits with float32 scales and zero points of 32 columns: three stages of 128 tokens, what a block may have."""
    matrix = weight(40, 512, Scheme(8, 32, False, "float"), torch.float32)
    inputs = torch.randn(130, 512, generator=torch.Generator().manual_seed(9)).to(FP16)
    assert error(run(linear(matrix), [inputs], place), inputs.double() @ values(matrix).T) < PREFILL[FP16]


@pytest.mark.parametrize("tokens", [17, 64, 65, 128, 129, 300])
def test_linears_of_any_number_of_tokens(tokens: int, place: str) -> None:
    matrix = weight(72, 264, Scheme(4))
    inputs = torch.randn(tokens, 264, generator=torch.Generator().manual_seed(8)).to(FP16)
    assert error(run(linear(matrix), [inputs], place), inputs.double() @ values(matrix).T) < PREFILL[FP16]


def test_both_warp_groups_and_more_columns_than_stages(place: str) -> None:
    """300 rows: a whole block of rows, and one in which one warp group has some. Ten column tiles, the last ragged."""
    matrix = weight(300, 1160, Scheme(4))
    inputs = torch.randn(70, 1160, generator=torch.Generator().manual_seed(3)).to(BF16)
    assert error(run(linear(matrix), [inputs], place), inputs.double() @ values(matrix).T) < PREFILL[BF16]


def test_uneven_routing(place: str) -> None:
    """An expert with most of the tokens, one with few, one with none, skipped slots; NaN stays in its row."""
    packed = experts([(Scheme(4, 32), Scheme(3, 96))] * 3, 64, 96)
    hidden, ids, gates = routing(150, 3, 2, 64, BF16)
    ids[:, 0] = 2
    ids[5::7, 1] = torch.where(ids[5::7, 1] == 2, 3, ids[5::7, 1])
    ids[:, 1] = torch.where(ids[:, 1] == 1, 3, ids[:, 1])
    assert not (ids == 1).any() and (ids == 3).any() and (ids == 0).sum() < 64
    check(packed, [hidden, ids, gates], place)
    clean = run(packed, [hidden, ids, gates], place)
    hidden[1, 3] = float("nan")
    found = run(packed, [hidden, ids, gates], place)
    assert not found[1].isfinite().any() and torch.equal(found[2:], clean[2:]) and torch.equal(found[0], clean[0])
