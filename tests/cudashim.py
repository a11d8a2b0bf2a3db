"""The CUDA kernels on the CPU: their own sources under csrc/cuda_shim.cuh, behind the CUDA backend's own functions."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest

from moecompress_kernels import cuda
from moecompress_kernels.build import SOURCES
from moecompress_kernels.cuda_build import UNITS

ROOM = 227 * 1024  # shared memory of a block on compute capability 9.0


def compile_shim(folder: Path, extra: Sequence[str] = ()) -> Path:
    """The shim library in `folder`."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the CUDA kernels for the CPU")
    command = [compiler, "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-w", "-DMC_SHIM", *extra]
    running = [
        subprocess.Popen([*command, "-x", "c++", "-c", str(SOURCES / f"{unit}.cu"), "-o", str(folder / f"{unit}.o")])
        for unit in UNITS
    ]
    assert [one.wait() for one in running] == [0] * len(UNITS)
    library = folder / "shim.so"
    subprocess.run([*command, "-shared", "-o", str(library), *(str(folder / f"{u}.o") for u in UNITS)], check=True)
    return library


def device(library: Path, room: int = ROOM, capability: int = 90) -> cuda.Device:
    return cuda.Device(cuda.load(library), "cpu", capability, room, "on the CPU")


def install(patch: pytest.MonkeyPatch, one: cuda.Device) -> None:
    """Let the backend's functions run on CPU tensors through the shim."""
    patch.setattr(cuda, "_of", lambda tensor: one)
    patch.setattr(cuda, "_stream", lambda tensor: None)
    patch.setattr(cuda, "_guard", lambda tensor: nullcontext())
    patch.setattr(cuda, "_device", lambda index: one)
