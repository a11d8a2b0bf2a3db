"""The CUDA kernels compiled for the CPU, once per session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cudashim
import pytest

from moecompress_kernels import cuda


@pytest.fixture(scope="session")
def shim_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cudashim.compile_shim(tmp_path_factory.mktemp("shim"))


@pytest.fixture
def on_shim(shim_library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[cuda.Device]:
    """The CUDA backend's functions work on CPU tensors; threads of a block run upwards."""
    one = cudashim.device(shim_library)
    cudashim.install(monkeypatch, one)
    yield one
    one.library.mc_shim_set_order(0)
