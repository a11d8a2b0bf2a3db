"""What all tests share: no network, one thread, repeatable random examples, and where the demo checkpoint is."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before torch and the Hugging Face libraries are imported; inherited by processes that tests start.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton's kernels on CPU tensors; read when triton is imported

import pytest
from hypothesis import settings

TESTS = Path(__file__).resolve().parent
# At the end, so that a folder of tests never shadows a library: `import families` works in every test.
sys.path.append(str(TESTS))

# Derandomized: the same examples on every machine. No deadline: the first example often pays for an import.
settings.register_profile("house", deadline=None, derandomize=True, max_examples=50, database=None)
settings.load_profile("house")


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """A test that opens a connection to another machine fails, and says where to."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        local = self.family == socket.AF_UNIX or str(address[0]) in ("127.0.0.1", "::1", "localhost")
        if not local:
            raise AssertionError(f"a test tried to connect to {address}")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        yield


@pytest.fixture(scope="session")
def bench_a() -> Path:
    """The demo checkpoint: a small trained Qwen3-MoE model. Read only."""
    return TESTS / "checkpoints" / "bench-a"
