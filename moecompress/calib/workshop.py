"""What calibration sources need that run the model: the model, room on disk, a place to report, and kept parts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moecompress.calib.cache import cache_key, cache_read, cache_write
from moecompress.checkpoint.index import CheckpointIndex
from moecompress.progress import NoProgress, Progress
from moecompress.stream.model import StreamModel

Made = tuple[dict[str, Tensor], dict[str, Any]]  # whole-number tensors, JSON-able facts


@dataclass(frozen=True)
class Workshop:
    """model: the checkpoint that generates and routes. scratch: for hidden states and parked caches, emptied after use.
    kept: folder of finished parts and token ids, or None."""

    model: StreamModel
    scratch: Path
    kept: Path | None = None
    progress: Progress = NoProgress()


@dataclass(frozen=True)
class Kept:
    """Finished parts of one token set on disk, so that a stopped run goes on. parts: all that decides the ids."""

    folder: Path | None
    parts: Mapping[str, Any]

    def part(self, number: int, make: Callable[[], Made]) -> Made:
        """dict[str, Tensor] and facts of part `number`: read back, or made and kept."""
        return self._once({**self.parts, "part": number}, make)

    def whole(self, make: Callable[[], Made]) -> Made:
        """The finished set; its parts are removed."""
        made = self._once(self.parts, make)
        if self.folder is not None:
            number = 0
            while (entry := self.folder / f"{cache_key({**self.parts, 'part': number})}.json").is_file():
                entry.with_suffix(".safetensors").unlink(missing_ok=True)
                entry.unlink()
                number += 1
        return made

    def _once(self, parts: Mapping[str, Any], make: Callable[[], Made]) -> Made:
        key = cache_key(parts)
        found = cache_read(self.folder, key) if self.folder else None
        if found is None:
            found = make()
            if self.folder:
                cache_write(self.folder, key, found[0], parts, found[1])
        return found


class Gauge:
    """A stage of a known number of units, shown in a few steps."""

    STEPS = 20

    def __init__(self, progress: Progress, title: str, total: int) -> None:
        self._progress, self._total, self._shown = progress, total, 0
        progress.stage(title, self.STEPS)

    def reach(self, done: int) -> None:
        """`done` units are finished by now."""
        while self._shown < done * self.STEPS // self._total:
            self._shown += 1
            self._progress.step(f"{self._shown * 100 // self.STEPS} %")


def model_identity(index: CheckpointIndex) -> str:
    """sha256 of config.json and of every tensor's name, dtype, shape and place, and the files' sizes and times."""
    config = (index.root / "config.json").read_bytes()
    tensors = [[name, str(info.dtype), list(info.shape), info.file.name] for name, info in index.tensors.items()]
    files = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in index.files]
    return hashlib.sha256(config + json.dumps([tensors, files]).encode()).hexdigest()


def seeded(seed: int, source: str, sequence: int) -> torch.Generator:
    """One generator per (seed, source, sequence): what a sequence becomes depends on no other."""
    digest = hashlib.sha256(f"{seed}/{source}/{sequence}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
