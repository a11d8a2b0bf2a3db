"""Kernels of CUDA devices on one: layers of real sizes, graphs, streams, the same bits every time. `pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from packed_layers import Packed, error, experts, handle_of, oracle, routing
from torch import Tensor

from moecompress import ops
from moecompress.types import Scheme
from moecompress_kernels import cuda

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
HIDDEN, WIDTH, REPEATS = 512, 256, 10
DECODE, PREFILL = 3e-3, 5e-3  # relative errors of bfloat16 results; see tests/kernels/test_cuda.py
OSS = ops.Activation("silu", interleaved=True, alpha=1.702, limit=7.0, shift=1.0)
SHAPES = {  # hidden, width, experts, experts per token, activation; fewer experts than the models have
    "Qwen3-30B-A3B": (2048, 768, 16, 8, ops.Activation("silu")),
    "DeepSeek-V2-Lite": (2048, 1408, 8, 6, ops.Activation("silu")),
    "gpt-oss": (2880, 2880, 6, 4, OSS),
    "Mixtral-8x7B": (4096, 14336, 2, 2, ops.Activation("silu")),
}


@pytest.fixture(scope="module", params=["cuda", "cuda wgmma", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """A backend's name; the compiled one with each of its prefills."""
    name, _, prefill = request.param.partition(" ")
    if reason := ops.backend(name).unavailable():
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cuda.PREFILL, prefill or "mma")
        if prefill:
            found, why = cuda.prefill_of(cuda._device(torch.cuda.current_device()))
            if found != prefill:
                pytest.skip(why)
        yield name


class Prepared(NamedTuple):
    """A layer on the device, and what runs it."""

    packed: Packed
    handle: list[Tensor]
    name: str

    @property
    def sealed(self) -> list[Tensor]:
        return ops.sealed(self.name, self.packed.layer, self.handle)

    def run(self, inputs: list[Tensor]) -> Tensor:
        return ops.moe_mlp(*inputs, self.sealed, self.name, self.packed.layer.text)


def prepared(packed: Packed, name: str) -> Prepared:
    return Prepared(packed, handle_of(packed, ops.backend(name), "cuda"), name)


def on_device(inputs: list[Tensor]) -> list[Tensor]:
    return [one.cuda() for one in inputs]


@pytest.fixture(scope="module", params=[(name, bits) for name in SHAPES for bits in (4, 3)], ids=str)
def real(request: pytest.FixtureRequest, backend: str) -> tuple[Prepared, int]:
    """(layer, experts per token)."""
    name, bits = request.param
    hidden, width, count, per_token, activation = SHAPES[name]
    schemes = [(Scheme(bits, 64 if hidden == 2880 else 128), Scheme(bits, 64 if width == 2880 else 128))] * count
    return prepared(experts(schemes, hidden, width, activation), backend), per_token


@pytest.mark.parametrize("tokens", [1, 5, 16, 33, 200])
def test_real_layers(real: tuple[Prepared, int], tokens: int) -> None:
    layer, per_token = real
    count, hidden = layer.packed.layer.experts, layer.packed.layer.columns
    inputs = routing(tokens, count, per_token, hidden, BF16, seed=tokens)
    found = layer.run(on_device(inputs)).cpu()
    checked = [*range(min(tokens, 12)), tokens - 1]  # each row of float64 takes a while
    wanted = oracle(layer.packed, *(one[checked] for one in inputs), BF16)
    assert error(found[checked], wanted) < (DECODE if tokens <= cuda.DECODE_TOKENS else PREFILL)


@pytest.fixture(scope="module")
def mixed(backend: str) -> Prepared:
    """Four widths in one layer, 24 experts."""
    widths = [(Scheme(4, 128), Scheme(3, 64)), (Scheme(3, 128), Scheme(4, 32)), (Scheme(2, 64), Scheme(8, 64))]
    return prepared(experts([*widths, (Scheme(8, 128), Scheme(2, 64))] * 6, HIDDEN, WIDTH), backend)


@pytest.mark.parametrize("tokens", [1, 6, 16, 40, 300])
def test_a_graph_replays_with_new_inputs(mixed: Prepared, tokens: int) -> None:
    held = on_device(routing(tokens, 24, 4, HIDDEN, BF16))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        mixed.run(held)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = mixed.run(held)
    for seed in (1, 2, 3):
        fresh = on_device(routing(tokens, 24, 4, HIDDEN, BF16, seed=seed))
        for mine, new in zip(held, fresh, strict=True):
            mine.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, mixed.run(fresh))


@pytest.mark.parametrize("tokens", [1, 16, 100])
def test_the_same_bits_every_time(mixed: Prepared, tokens: int) -> None:
    """While another stream keeps the device busy, and in a row without waiting (the second kernel starts early)."""
    many = [on_device(routing(tokens, 24, 4, HIDDEN, BF16, seed=seed)) for seed in range(8)]
    wanted = []
    for inputs in many:
        wanted.append(mixed.run(inputs))
        torch.cuda.synchronize()
    busy, other = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    for _ in range(REPEATS):
        with torch.cuda.stream(busy):
            other = other @ other * 1e-3
        found = [mixed.run(inputs) for inputs in many]
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_work_goes_to_the_current_stream(mixed: Prepared) -> None:
    hidden, ids, gates = on_device(routing(4, 24, 4, HIDDEN, BF16))
    wanted = mixed.run([hidden, ids, gates])
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        late = torch.zeros_like(hidden)
        torch.cuda._sleep(20_000_000)
        late.copy_(hidden)  # a kernel on another stream would read zeros
        found = mixed.run([late, ids, gates])
    side.synchronize()
    assert torch.equal(found, wanted)


def test_the_best_that_fits_is_chosen() -> None:
    layer, device = experts([(Scheme(4, 32), Scheme(3, 32))] * 2, 64, 32).layer, torch.device("cuda")
    able = [name for name in ("cuda", "triton") if ops.unavailable(name) is None]
    assert able and ops.choose(layer, device).backend == able[0]
    assert ops.choose(layer, device, torch.float32).backend == ("triton" if "triton" in able else "torch")
    assert ops.choose(layer, torch.device("cpu")).backend not in able
