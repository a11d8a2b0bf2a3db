"""What only the shim can show of prefill by warp groups: depths, orders of threads, dispatch, faults that are seen."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from packed_layers import Packed, experts, linear, routing, weight
from torch import Tensor

from moecompress.types import Scheme
from moecompress_kernels import cuda
from moecompress_kernels.build import SOURCES

BF16 = torch.bfloat16


def multiply(packed: Packed, inputs: Tensor) -> Tensor:
    handle = cuda.prepare(packed.layer, packed.records, packed.slot_map, [])
    return cuda.packed_linear(packed.layer, handle, inputs)


def test_depths_of_the_pipeline_and_orders_of_threads(on_shim: cuda.Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four stages, three, threads downwards: the same bits. Where three do not fit, an error and no other kernel."""
    packed = linear(weight(272, 640, Scheme(4, 64)))
    inputs = torch.randn(70, 640, generator=torch.Generator().manual_seed(3)).to(BF16)
    monkeypatch.setenv(cuda.PREFILL, "wgmma")
    found = multiply(packed, inputs)

    def within(kib: int) -> Tensor:
        one = cuda.Device(on_shim.library, "cpu", 90, kib * 1024, "")
        monkeypatch.setattr(cuda, "_of", lambda tensor: one)
        return multiply(packed, inputs)

    assert torch.equal(within(180), found)
    on_shim.library.mc_shim_set_order(1)
    assert torch.equal(within(180), found) and torch.equal(within(227), found)
    with pytest.raises(RuntimeError, match="an argument the library does not take"):
        within(140)
    layer = experts([(Scheme(4, 32), Scheme(4, 32))], 128, 64)  # mma has room enough: this is not it
    handle = cuda.prepare(layer.layer, layer.records, layer.slot_map, [])
    with pytest.raises(RuntimeError, match="an argument the library does not take"):
        cuda.moe_mlp(layer.layer, handle, *routing(100, 1, 1, 128, BF16))


FAULTS = {
    "none": (0, ""),
    "layout": (1, ""),
    "start": (1, ""),
    "early": (1, ""),
    "copies in flight": (1, ""),
    "two groups": (1, ""),  # there was one: waiting until one is left waits for nothing
    "stride": (1, ""),
    "end": (-6, "reads past its shared memory"),
    "proxy fence": (-6, "without a fence of the proxies"),
    "register fence": (-6, "without a fence of its registers"),
    "commit": (-6, "that were not committed"),
    "wait": (-6, "a kernel ends before its products"),
    "fragments": (-6, "fragments changed under a product"),
    "sums": (-6, "sums changed under a product"),
    "shared memory": (-6, "shared memory changed under a product"),
    "copy": (-6, "a copy into shared memory that a product reads"),
    "one warp": (-6, "without all warps of its group"),
    "descriptors": (-6, "different descriptors"),
    "swizzle of 64 bytes": (-6, "only swizzles of 128 bytes"),
    "base offset": (-6, "begins at no multiple of 1024 bytes"),
    "pattern": (-6, "begins at no multiple of 1024 bytes"),
}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory, shim_library: Path) -> Path:
    """The program; where the shim compiles, g++ is there."""
    program = tmp_path_factory.mktemp("faults") / "wgmma_faults"
    source = Path(__file__).with_name("wgmma_faults.cpp")
    flags = ["-std=c++17", "-O1", "-w", "-DMC_SHIM", f"-I{SOURCES}"]
    subprocess.run(["g++", *flags, str(source), "-o", str(program)], check=True)
    return program


def test_the_emulated_instruction_sees_faults(faulty: Path) -> None:
    """What these tests are worth: a wrong layout gives wrong numbers, a missing fence, commit or wait is an error."""
    for fault, (code, message) in FAULTS.items():
        done = subprocess.run([str(faulty), fault], capture_output=True, text=True, check=False)
        assert done.returncode == code and message in done.stderr, (fault, done)


def test_what_the_environment_chooses(on_shim: cuda.Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cuda.PREFILL, "wgmma")
    older = cuda.Device(on_shim.library, "cpu", 89, 99 * 1024, "")
    assert cuda.prefill_of(on_shim)[0] == "wgmma"
    assert cuda.prefill_of(older) == (
        "mma",
        "wgmma, for which MOECOMPRESS_CUDA_PREFILL asks, needs compute capability 9.0, this device has 8.9",
    )
    assert cuda._by_warp_groups(on_shim, 64) and not cuda._by_warp_groups(on_shim, 16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a device")
    assert cuda.describe().startswith("a device, on the CPU, prefill with wgmma (MOECOMPRESS_CUDA_PREFILL asks for it;")
    for chosen in ("", "mma"):
        monkeypatch.setenv(cuda.PREFILL, chosen)
        assert cuda.prefill_of(on_shim)[0] == "mma" and "prefill with mma" in cuda.describe()
        assert cuda.prefill_of(older)[0] == "mma" and not cuda._by_warp_groups(on_shim, 128)
    monkeypatch.setenv(cuda.PREFILL, "tma")
    assert "MOECOMPRESS_CUDA_PREFILL is 'tma'; allowed: mma and wgmma" in cuda.describe()
    with pytest.raises(ValueError, match="allowed: mma and wgmma"):
        multiply(linear(weight(32, 64, Scheme(4))), torch.ones(70, 64, dtype=BF16))
