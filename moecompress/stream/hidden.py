"""Hidden states of one stream on disk: written and read by batches, never resident as a whole.

Reads and writes use pread / pwrite, so the operating system's page cache keeps them fast while the process's own
memory holds one batch.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moecompress.errors import Stopped, message

_DTYPE = torch.float32
_THEN = "free some space and run again with --resume"


class HiddenStore:
    """A float32 tensor [N, T, ...] in one file."""

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        self.path, self.shape = path, tuple(shape)
        self._row = 4
        for size in shape[1:]:
            self._row *= size

    @property
    def nbytes(self) -> int:
        return self._row * self.shape[0]

    def create(self) -> None:
        """Make (or empty) the file. Raises Stopped when the disk is full."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(self.path, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, self.nbytes))
        except OSError as error:
            found = f"cannot reserve {self.nbytes} bytes ({error.strerror})"
            raise Stopped(message(str(self.path), found, then=_THEN)) from error

    def write(self, start: int, values: Tensor) -> None:
        """Rows start : start + len(values). values: float32 [n, T, ...]. Raises Stopped when the disk is full."""
        if tuple(values.shape[1:]) != self.shape[1:] or start + values.shape[0] > self.shape[0]:
            raise ValueError(message(self.path.name, f"rows {tuple(values.shape)} at {start}", f"inside {self.shape}"))
        view = _bytes(values.detach().to(_DTYPE).contiguous())
        with open(self.path, "r+b") as file:
            done, offset = 0, start * self._row
            while done < len(view):
                try:
                    done += os.pwrite(file.fileno(), view[done:], offset + done)
                except OSError as error:
                    found = f"cannot be written ({error.strerror})"
                    raise Stopped(message(str(self.path), found, then=_THEN)) from error

    def read(self, start: int, stop: int) -> Tensor:
        """Rows start : stop, float32 [n, T, ...]."""
        values = torch.empty((stop - start, *self.shape[1:]), dtype=_DTYPE)
        view = _bytes(values)
        with open(self.path, "rb") as file:
            done, offset = 0, start * self._row
            while done < len(view):
                count = os.preadv(file.fileno(), [view[done:]], offset + done)
                if count == 0:
                    raise OSError(f"{self.path} is shorter than {self.nbytes} bytes")
                done += count
        return values

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def _bytes(values: Tensor) -> memoryview:
    array: Any = values.numpy()
    return memoryview(array).cast("B")
