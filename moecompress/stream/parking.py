"""A generation cache whose layers are on disk while they are not running.

Between two calls of its layer a cache layer holds meta tensors of the right shapes (masks are made from those) and its
values lie in one file. Two generations of files: a step reads one and writes the other, so what belonged to the last
saved step is still whole when a step is interrupted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from moecompress.checkpoint.writer import atomic_write

_PLAIN = (bool, int, float)


class Parking:
    """The parked layers of one cache, in `folder`."""

    def __init__(self, folder: Path, layers: int) -> None:
        self._folder, self._layers = folder, layers
        self._step = 0
        self._parked: set[int] = set()
        self._order: Tensor | None = None
        self._cache: Any = None
        self._state: dict[str, Any] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def clear(self) -> None:
        """A new cache begins; files of a saved step stay until that step's generation is written again."""
        self._parked.clear()
        self._order = self._cache = None

    def reorder(self, parents: Tensor) -> None:
        """Rows int64 [R'] of every layer at its next call."""
        self._order = parents

    @contextmanager
    def present(self, index: int, arguments: Iterable[Any]) -> Iterator[None]:
        """Within the context the cache found among a layer's arguments holds the values of layer `index`."""
        from transformers import Cache

        cache = next((value for value in arguments if isinstance(value, Cache)), None)
        if cache is None:  # this family is run without one
            yield
            return
        self._cache = cache
        if index in self._parked:
            self._fill(index, self._path(index, self._step), self._order)
        yield
        if index < len(cache.layers):
            self._park(index)
        if index == self._layers - 1:
            self._step += 1
            self._order = None

    def save(self, note: str, tensors: Mapping[str, Tensor]) -> None:
        """Make the state after the last complete step, and `tensors`, what `load(note)` finds."""
        atomic_write(self._folder / f"state.{self._step % 2}.safetensors", save(_copies(tensors)))
        state = {"note": note, "step": self._step, "parked": sorted(self._parked)}
        atomic_write(self._folder / "state.json", json.dumps(state))

    def load(self, note: str) -> dict[str, Tensor] | None:
        """The tensors of the saved step; `adopt` makes a fresh cache continue it. None for another note, or none."""
        path = self._folder / "state.json"
        state = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if state.get("note") != note:
            return None
        self._state = state
        self._step = state["step"] + 2  # same parity: the pass that makes a new cache writes the other one
        return load_file(self._folder / f"state.{state['step'] % 2}.safetensors")

    def adopt(self) -> None:
        """Give the cache of the pass just made the saved values."""
        self._step = self._state["step"]
        self._parked = set(self._state["parked"])
        for index in self._parked:
            self._fill(index, self._path(index, self._step), None)
            _hollow(vars(self._cache.layers[index]))

    def _path(self, index: int, step: int) -> Path:
        return self._folder / f"{index:05d}.{step % 2}.safetensors"

    def _fill(self, index: int, path: Path, order: Tensor | None) -> None:
        layer = self._cache.layers[index]
        tensors = load_file(path)
        plain = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        _restore(vars(layer), "", tensors, plain)
        if order is not None:
            layer.reorder_cache(order)

    def _park(self, index: int) -> None:
        tensors: dict[str, Tensor] = {}
        plain: dict[str, Any] = {}
        held = vars(self._cache.layers[index])
        _collect(held, "", tensors, plain)
        path = self._path(index, self._step + 1)
        atomic_write(path, save(_copies(tensors)))
        atomic_write(path.with_suffix(".json"), json.dumps(plain))
        _hollow(held)
        self._parked.add(index)


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file cannot hold two names of one memory."""
    return {key: value.clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}


def _items(held: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(held, dict):
        yield from held.items()
    elif isinstance(held, list):
        yield from enumerate(held)


def _collect(held: Any, prefix: str, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    for key, value in _items(held):
        name = f"{prefix}{key}"
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, _PLAIN):
            plain[name] = value
        else:
            _collect(value, name + ".", tensors, plain)


def _hollow(held: Any) -> None:
    for key, value in list(_items(held)):
        if isinstance(value, Tensor):
            held[key] = value.to("meta")
        else:
            _hollow(value)


def _restore(held: Any, prefix: str, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    for key, value in list(_items(held)):
        name = f"{prefix}{key}"
        if isinstance(value, Tensor):
            held[key] = tensors[name]
        elif isinstance(value, _PLAIN):
            held[key] = plain[name]
        else:
            _restore(value, name + ".", tensors, plain)
