"""What the Triton kernel computes, against float64: in Triton's interpreter, and with `-m gpu` on a device."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from packed_layers import MIXED, Packed, error, experts, handle_of, linear, oracle, routing, values, weight
from torch import Tensor

from moecompress import ops
from moecompress.numerics.activation import activation_codes
from moecompress.types import QuantizedTensor, Scheme
from moecompress_kernels import triton as backend
from moecompress_kernels.layer import Matrix, Record

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
LIMITS = {FP32: 1e-6, BF16: 3e-3, FP16: 4e-4}  # relative errors: nothing is rounded but the result and down's input
W4 = (Scheme(4, 32), Scheme(4, 32))

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
interpreted = pytest.param(
    "cpu", marks=[needs_triton, pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="there is a GPU")]
)


@pytest.fixture(params=[interpreted, pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request: pytest.FixtureRequest) -> str:
    """Where tensors are."""
    if request.param == "cuda" and (reason := backend.unavailable()):
        pytest.skip(reason)
    return str(request.param)


def run(packed: Packed, inputs: list[Tensor], place: str) -> Tensor:
    return backend.moe_mlp(packed.layer, prepare(packed, place), *(one.to(place) for one in inputs)).cpu()


def run_linear(packed: Packed, inputs: Tensor, place: str) -> Tensor:
    return backend.packed_linear(packed.layer, prepare(packed, place), inputs.to(place)).cpu()


def prepare(packed: Packed, place: str) -> list[Tensor]:
    return handle_of(packed, ops.backend("triton"), place)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_every_code_is_decoded_exactly(bits: int, dtype: torch.dtype, place: str) -> None:
    """Unit vectors through a Linear with scale one give the integers themselves; rows that end inside a word."""
    rows, columns = 24, 44
    codes = torch.arange(rows * columns).reshape(rows, columns).mul(7919) % (1 << bits)
    assert len(codes.unique()) == 1 << bits
    ones, zeros = torch.ones(rows, 1, dtype=BF16), (torch.arange(rows)[:, None] % (1 << bits)).to(torch.uint8)
    matrix = QuantizedTensor(codes.to(torch.uint8), ones, zeros, Scheme(bits, -1, False, "int"))
    packed, units, wanted = linear(matrix), torch.eye(columns, dtype=dtype), values(matrix).T
    assert torch.equal(run_linear(packed, units, place).double(), wanted)
    assert torch.equal(run_linear(packed, units[7:8], place).double(), wanted[7:8])  # one row: no tensor cores


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("tokens", [1, 9])
def test_mixed_bits_in_one_launch(tokens: int, dtype: torch.dtype, place: str) -> None:
    """Every width, group, kind of zero point and sign of scale, per expert and projection; biases; skipped slots."""
    packed = experts(MIXED, 128, 96, bias=True)
    inputs = routing(tokens, len(MIXED), 3, 128, dtype, seed=tokens)
    assert error(run(packed, inputs, place), oracle(packed, *inputs, dtype)) < LIMITS[dtype]


@pytest.mark.parametrize(
    "activation",
    [
        ops.Activation("silu"),
        ops.Activation("gelu"),
        ops.Activation("gelu_tanh"),
        ops.Activation("silu", interleaved=True, alpha=1.702, limit=0.7, shift=1.0),
        ops.Activation("relu2", gated=False),
        ops.Activation("relu"),
    ],
    ids=str,
)
def test_activations_and_orders_of_rows(activation: ops.Activation, place: str) -> None:
    """A width and a hidden size that fill no block; clamps that bite; without a gate; one slot or many a block."""
    packed = experts([(Scheme(4), Scheme(3)), (Scheme(3), Scheme(4))], 50, 36, activation, bias=True)
    for tokens in (1, 4):
        inputs = routing(tokens, 2, 2, 50, FP16)
        assert error(run(packed, inputs, place), oracle(packed, *inputs, FP16)) < LIMITS[FP16]


@pytest.mark.parametrize("scales", [FP16, FP32], ids=str)
def test_scales_of_other_types(scales: torch.dtype, place: str) -> None:
    schemes = [(Scheme(4, 16, False, "float"), Scheme(3, 32)), (Scheme(3, 32), Scheme(4, -1, False, "float"))]
    packed = experts(schemes, 64, 32, dtype=scales)
    inputs = routing(3, 2, 2, 64, FP32)
    assert error(run(packed, inputs, place), oracle(packed, *inputs)) < LIMITS[FP32]


@pytest.mark.parametrize(("size", "dtype"), [(1e-12, FP32), (1e12, FP32), (3e-5, FP16), (300.0, FP16)], ids=str)
def test_scales_far_from_one(size: float, dtype: torch.dtype, place: str) -> None:
    """Scales never enter the products, so float16 does not lose small ones; only results may be subnormal there."""
    matrix = weight(16, 64, Scheme(4, 32), FP32)
    assert isinstance(matrix, QuantizedTensor)
    packed = linear(QuantizedTensor(matrix.codes, matrix.scales * size, None, matrix.scheme))
    inputs = torch.randn(3, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    found, wanted = run_linear(packed, inputs, place), inputs.double() @ values(matrix).T * size
    assert error(found.double() / size, wanted / size) < max(LIMITS[dtype], 2.0**-25 / size * (dtype == FP16))


@pytest.mark.parametrize("tokens", [1, 16, 40])
def test_linears(tokens: int, place: str) -> None:
    packed, inputs = linear(matrix := weight(40, 72, Scheme(4))), torch.randn(tokens, 72).to(FP16)
    assert error(run_linear(packed, inputs, place), inputs.double() @ values(matrix).T) < LIMITS[FP16]


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_rounded_inputs(dtype: torch.dtype, place: str) -> None:
    """int4 and int8 codes per token, clipped, on both projections: what PyTorch's own path gives; a token of zeros."""
    up, down = Scheme(4, 32, activation="int4", activation_clip=0.8), Scheme(3, 32, activation="int8")
    packed = experts([(up, down), (replace(up, bits=8), replace(down, bits=4))], 64, 32, bias=True)
    for tokens in (1, 5):
        inputs = routing(tokens, 2, 2, 64, dtype, seed=3)
        inputs[0][tokens - 1] *= tokens == 1
        plain = ops.backend("torch")
        wanted = plain.moe_mlp(packed.layer, handle_of(packed, plain, "cpu"), *inputs)
        assert error(run(packed, inputs, place), wanted) < (1e-5 if dtype == FP32 else 1e-2)
    matrix = weight(24, 64, Scheme(4, 32, activation="int8"))
    units = torch.randn(3, 64, generator=torch.Generator().manual_seed(5))
    codes, steps = activation_codes(units, 8)
    found = run_linear(linear(matrix), units, place)
    assert error(found, (codes.double() * steps.double()) @ values(matrix).T) < LIMITS[FP32]


def test_odd_routing(place: str) -> None:
    """One expert for all, an id twice in a token, ids outside the range on both sides, tokens with no expert."""
    packed = experts([W4] * 3, 32, 32)
    hidden, _, gates = routing(4, 3, 2, 32, FP16)
    for tokens in (1, 4):
        for pair in ([1, 1], [2, 3], [-1, 0], [7, -(1 << 40)], [3, 3]):
            inputs = [hidden[:tokens], torch.tensor([pair]).repeat(tokens, 1), gates[:tokens]]
            wanted, found = oracle(packed, *inputs, FP16), run(packed, inputs, place)
            assert not found.any() if not wanted.any() else error(found, wanted) < LIMITS[FP16]


@pytest.mark.parametrize(("tokens", "slots"), [(0, 2), (3, 0), (0, 0)])
def test_nothing_to_do(tokens: int, slots: int, place: str) -> None:
    ids, gates = torch.zeros(tokens, slots, dtype=torch.int64), torch.zeros(tokens, slots)
    found = run(experts([W4], 64, 32), [torch.ones(tokens, 64, dtype=BF16), ids, gates], place)
    assert found.shape == (tokens, 64) and not found.any()
    if not tokens:
        assert run_linear(linear(weight(8, 64, Scheme(4))), torch.ones(0, 64), place).shape == (0, 8)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_row(bad: float, place: str) -> None:
    packed = experts([W4, (Scheme(3, 32), Scheme(4, 32))], 64, 32)
    hidden, _, gates = routing(4, 2, 2, 64, FP16)
    ids = torch.tensor([[0, 1]]).repeat(4, 1)
    clean = run(packed, [hidden, ids, gates], place)
    hidden[1, 3] = bad
    found = run(packed, [hidden, ids, gates], place)
    assert not found[1].isfinite().any()
    assert torch.equal(found[[0, 2, 3]], clean[[0, 2, 3]])


def test_long_inputs_are_cut_into_parts(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, inputs = experts([W4] * 2, 32, 32), routing(5, 2, 2, 32, FP16)
    whole = run(packed, inputs, place)
    monkeypatch.setattr(backend, "_CHUNK", 3)
    assert error(run(packed, inputs, place), whole) < LIMITS[FP16]


@pytest.mark.parametrize("tokens", [1, 3])
def test_the_operator_reaches_the_backend(tokens: int, place: str) -> None:
    packed = experts([W4] * 2, 64, 32)
    hidden, ids, gates = (one.to(place) for one in routing(tokens, 2, 2, 64, BF16))
    found = ops.moe_mlp(
        hidden,
        ids.int(),
        gates,
        ops.sealed("triton", packed.layer, prepare(packed, place)),
        "triton",
        packed.layer.text,
    )
    assert error(found.cpu(), oracle(packed, hidden.cpu(), ids.cpu(), gates.cpu(), BF16)) < LIMITS[BF16]


@pytest.mark.parametrize(("tokens", "per_token"), [(1, 1), (40, 2), (300, 3)])
def test_sorting(tokens: int, per_token: int) -> None:
    """Slots by expert, in order, in blocks of one expert; those without one together; nothing outside its block."""
    count = 5
    ids = routing(tokens, count, per_token, 8, BF16)[1].flatten()
    ids[0] = -4
    cut = backend.sort(ids, count)
    assert cut.order is not None and cut.blocks is not None and cut.number == len(cut.blocks)
    found: list[tuple[int, int]] = []
    for expert, first, end in cut.blocks.tolist():
        found += [(expert, slot) for slot in cut.order[first : min(end, first + cut.tokens)].tolist()]
    owners = [expert if 0 <= expert < count else count for expert in ids.tolist()]
    assert found == sorted((expert, slot) for slot, expert in enumerate(owners))


def test_records_come_back() -> None:
    packed = experts(MIXED, 128, 96)
    handle = prepare(packed, "cpu")
    for expert, (k, row) in enumerate(packed.slot_map.tolist()):
        assert torch.equal(backend.record(packed.layer, handle, expert), packed.records[k][row])


def test_records_of_one_layout_are_not_copied() -> None:
    packed = experts([W4] * 3, 64, 32)
    assert prepare(packed, "cpu")[0].data_ptr() == packed.records[0].data_ptr()


def layer_of(**changes: object) -> ops.Layer:
    matrix = {"rows": 64, "columns": 64, "bits": 4, "group": 32, "values": "symmetric", "dtype": "bfloat16", "codes": 0}
    return ops.Layer(1, (Record((Matrix(**{**matrix, **changes}),), 64),))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bits": 16, "values": "raw"}, "16 bits"),
        ({"columns": 60, "group": 20}, "groups of 20 columns"),
    ],
)
def test_what_the_kernel_does_not_do_has_a_reason(changes: dict[str, object], reason: str) -> None:
    assert reason in str(backend.misfit(layer_of(**changes)))
    assert backend.misfit(layer_of()) is None


def test_experts_that_differ_have_a_reason() -> None:
    one, larger, other = layer_of().records[0], layer_of(rows=128).records[0], layer_of(dtype="float16").records[0]
    assert backend.misfit(ops.Layer(2, (one, larger))) == "experts have different sizes"
    assert backend.misfit(ops.Layer(2, (one, other))) == "scales of several types among its experts"
    rounding = layer_of(rounding=8).records[0]
    assert backend.misfit(ops.Layer(2, (one, rounding))) == "inputs rounded in several ways among its experts"
    assert backend.misfit(ops.Layer(1, (rounding,))) is None
    assert backend.unfit(layer_of(), torch.device("cpu")) == "the weights are on cpu"


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from moecompress_kernels.triton_kernels import product

pointers = {"inputs": "*%(dtype)s", "steps": "*fp32", "out": "*%(dtype)s", "blob": "*u8", "table": "*i64"}
pointers |= {"blocks": "*i64", "order": "*i64", "weights": "*fp32", "bias": "*%(dtype)s"}
whole = dict.fromkeys(["count", "per_row", "columns", "width", "experts"], "i32")
real = dict.fromkeys(["alpha", "limit", "shift"], "fp32")
words = {"MULTIPLY": triton.language.dtype("%(dtype)s"), "SCALES": triton.language.bfloat16, "OFFSETS": True}
words |= {"STRADDLE": True, "FUNCTION": "silu", "GATED": True, "INTERLEAVED": False, "CHANNELS": 32, "COLUMNS": 64}
plain = {"FUNCTION": "none", "GATED": False}
linear = plain | {"blocks": None, "order": None, "weights": None, "bias": None}
one_each = {"order": None, "steps": None}  # a call gives None and 1 as constants
kinds = [(1, one_each), (16, {}), (64, {}), (1, linear | {"count": 1, "per_row": 1, "experts": 1})]
kinds += [(16, linear | {"per_row": 1, "OFFSETS": False}), (1, plain | one_each | {"per_row": 1})]
for tokens, own in kinds[: %(kinds)d]:
    constants = words | {"TOKENS": tokens} | own
    signature = {**pointers, **whole, **real, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(product, {name: signature[name] for name in product.arg_names}, constants)
    made = triton.compile(source, target=GPUTarget("cuda", %(capability)d, 32))
    print(tokens, "mma" in made.asm["ptx"], len(made.asm["cubin"]) > 0)
"""


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize(
    ("capability", "dtype", "kinds"), [(80, "bf16", 6), (86, "fp16", 3), (89, "fp32", 3), (90, "bf16", 3)]
)
def test_the_kernel_compiles_for_every_architecture(capability: int, dtype: str, kinds: int, tmp_path: Path) -> None:
    """By Triton's own compiler, without a device: tensor cores for blocks of 16-bit inputs, none for one slot."""
    environment = dict(os.environ) | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    code = COMPILE % {"capability": capability, "dtype": dtype, "kinds": kinds}
    done = subprocess.run([sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    cores = dtype != "fp32"
    wanted = [
        "1 False True",
        f"16 {cores} True",
        f"64 {cores} True",
        "1 False True",
        f"16 {cores} True",
        "1 False True",
    ]
    assert done.stdout.splitlines() == wanted[:kinds]
