"""What only the shim can show of the CUDA kernels: other orders of threads, other depths, the sort by itself."""

from __future__ import annotations

import pytest
import torch
from packed_layers import MIXED, Packed, error, experts, oracle, routing
from torch import Tensor

from moecompress_kernels import cuda

BF16 = torch.bfloat16


def run(packed: Packed, hidden: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
    handle = cuda.prepare(packed.layer, packed.records, packed.slot_map, packed.biases)
    return cuda.moe_mlp(packed.layer, handle, hidden, ids, gates)


@pytest.mark.parametrize("tokens", [5, 18])
def test_results_do_not_depend_on_the_order_of_threads(tokens: int, on_shim: cuda.Device) -> None:
    packed = experts(MIXED, 256, 96, bias=True)
    inputs = routing(tokens, len(MIXED), 3, 256, BF16)
    upwards = run(packed, *inputs)
    on_shim.library.mc_shim_set_order(1)
    assert torch.equal(run(packed, *inputs), upwards)


@pytest.mark.parametrize("room", [99, 163])
def test_results_do_not_depend_on_the_depth_of_pipelines(
    room: int, on_shim: cuda.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = experts(MIXED[:3], 384, 96)
    hidden, ids, gates = routing(20, 3, 2, 384, BF16)
    found = []
    for kib in (room, 227):
        one = cuda.Device(on_shim.library, "cpu", 90, kib * 1024, "")
        monkeypatch.setattr(cuda, "_of", lambda tensor, one=one: one)
        found += [run(packed, hidden, ids, gates), run(packed, hidden[:1], ids[:1], gates[:1])]
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])


@pytest.mark.parametrize("room", [80, 99])
def test_devices_with_little_shared_memory_take_fewer_tokens_at_a_time(
    room: int, on_shim: cuda.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = experts(MIXED[1:3], 128, 128)
    one = cuda.Device(on_shim.library, "cpu", 86, room * 1024, "")
    monkeypatch.setattr(cuda, "_of", lambda tensor: one)
    inputs = routing(11, 2, 2, 128, BF16)
    assert error(run(packed, *inputs), oracle(packed, *inputs, BF16)) < 3e-3


@pytest.mark.parametrize(("tokens", "block"), [(1, 16), (40, 16), (600, 64), (1100, 128)])
def test_sorting(tokens: int, block: int, on_shim: cuda.Device) -> None:
    """Slots by expert, in order, padded to whole blocks; skipped slots nowhere."""
    count = 5
    ids = routing(tokens, count, 2, 8, BF16)[1]
    args = cuda.table.MoeArgs(None, ids.data_ptr())
    args.tokens, args.slots, args.block, args.up.experts = tokens, 2, block, count
    words = torch.full((on_shim.library.mc_cuda_sort_words(cuda.ctypes.byref(args)),), -7, dtype=torch.int32)
    args.sorted = words.data_ptr()
    assert on_shim.library.mc_cuda_sort(cuda.ctypes.byref(args)) == 0
    slots, blocks = ids.flatten().tolist(), int(words[-1])
    most = min(2 * tokens, 2 * tokens // block + min(count, 2 * tokens))
    order = words[(-(-2 * tokens // 1024) + 1) * count :][: most * block].view(most, block).tolist()
    owners = words[-1 - most : -1].tolist()
    wanted = []
    for expert in range(count):
        mine = [slot for slot, e in enumerate(slots) if e == expert]
        mine += [2 * tokens] * (-len(mine) % block)
        wanted += [(expert, mine[at : at + block]) for at in range(0, len(mine), block)]
    assert list(zip(owners, order, strict=True))[:blocks] == wanted
