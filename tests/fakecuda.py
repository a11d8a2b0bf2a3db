"""A device that is not there: what is meant for "cuda" runs on the CPU, kernels under the shim or Triton's interpreter.

So what only a device runs (`pytest -m gpu`, `bench_cuda.py`) is known to get through its Python before it meets one. As
a plugin (`pytest -p fakecuda -m gpu tests/gpu`, with the shim library in FAKE_CUDA) it does this for a whole session,
with small layers. Times and speeds mean nothing here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cudashim
import pytest
import torch
from torch.overrides import TorchFunctionMode

from moecompress import ops
from moecompress_kernels import triton


class OnCpu(TorchFunctionMode):
    """Tensors that are asked for on "cuda" are made, or stay, on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to:
            args = tuple("cpu" if str(one).startswith("cuda") else one for one in args)
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


class Graph:
    """Runs the operator's calls of its capture again, into the same results."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, torch.Tensor]] = []

    def replay(self) -> None:
        for args, out in self.calls:
            out.copy_(RUN(*args))


RUN: Callable[..., torch.Tensor] = ops.moe_mlp


def _of_graphs(patch: pytest.MonkeyPatch) -> None:
    open_graphs: list[Graph] = []

    @contextmanager
    def capture(graph: Graph) -> Iterator[None]:
        open_graphs.append(graph)
        yield
        open_graphs.pop()

    def moe_mlp(*args: Any) -> torch.Tensor:
        out = RUN(*args)
        for graph in open_graphs:
            graph.calls.append((args, out))
        return out

    patch.setattr(torch.cuda, "CUDAGraph", Graph)
    patch.setattr(torch.cuda, "graph", capture)
    patch.setattr(ops, "moe_mlp", moe_mlp)


@contextmanager
def pretended(library: Path) -> Iterator[None]:
    """Within it there seems to be a device of compute capability 9.0."""
    with pytest.MonkeyPatch.context() as patch, OnCpu():
        one = cudashim.device(library)
        cudashim.install(patch, one)
        _of_graphs(patch)
        name, event = "a device that is not there", SimpleNamespace
        facts = {
            "is_available": lambda: True,
            "current_device": lambda: 0,
            "get_device_name": lambda: name,
            "get_device_properties": lambda index: SimpleNamespace(name=name, major=9, minor=0),
            "synchronize": lambda: None,
            "stream": lambda stream: nullcontext(),
            "Stream": lambda: SimpleNamespace(synchronize=lambda: None),
            "Event": lambda enable_timing: event(
                record=lambda: None, synchronize=lambda: None, elapsed_time=lambda other: 100.0
            ),
            "_sleep": lambda cycles: None,
        }
        for what, value in facts.items():
            patch.setattr(torch.cuda, what, value)
        patch.setattr(triton, "_trouble", lambda index: None)
        patch.setattr(ops, "unavailable", lambda backend: None if backend in ("cuda", "triton") else "not asked for")
        yield


SMALL = {"HIDDEN": 128, "WIDTH": 64, "REPEATS": 1}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One of each kind of test, with small layers, since a shim is no device."""
    for module in {item.module for item in items if isinstance(item, pytest.Function)}:
        for name in module.SHAPES:
            module.SHAPES[name] = (128, 128, 3, 2, module.SHAPES[name][-1])
        for name, value in SMALL.items():
            setattr(module, name, value)
    items[:] = [item for item in items if _few(getattr(item, "callspec", None))]


def _few(spec: Any) -> bool:
    chosen = spec.params if spec else {}
    real = chosen.get("real", ("gpt-oss", 3))
    return real == ("gpt-oss", 3) and chosen.get("tokens", 1) in ((1, 33) if "real" in chosen else (1,))


@pytest.fixture(scope="session", autouse=True)
def pretending() -> Iterator[None]:
    if "FAKE_CUDA" not in os.environ:  # imported for `pretended` alone
        yield
        return
    with pretended(Path(os.environ["FAKE_CUDA"])):
        yield
