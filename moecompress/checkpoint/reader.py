"""Reads tensors into fresh memory with positioned reads.

Not mmap: mapped pages would count as resident memory for as long as the mapping lives, and a file that is cut
short while mapped kills the process instead of raising an error.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from moecompress.checkpoint.fp8 import dequantize_blocks
from moecompress.checkpoint.header import TensorInfo, short
from moecompress.checkpoint.index import CheckpointIndex
from moecompress.errors import CheckpointError, message

SCALE_SUFFIX = "_scale_inv"
DEFAULT_BLOCK = (128, 128)
_MAX_READ = 1 << 30  # Linux moves at most 2 GiB - 4 KiB per call
_MAX_OPEN = 64  # descriptors kept; files beyond it are opened for each read
_ITEMS = 1 << 22  # elements tested at a time where a test needs a temporary


class TensorReader:
    """Tensors of one checkpoint by name; safe to use from several threads.

    block: rows and columns that share one FP8 scale (`weight_block_size` of a DeepSeek-style config); None means
    128 x 128. A float8_e4m3fn tensor `X` with a companion `X_scale_inv` reads as bfloat16.
    """

    def __init__(self, index: CheckpointIndex, *, block: tuple[int, int] | None = None) -> None:
        self._index = index
        self._block = block or DEFAULT_BLOCK
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()
        if min(self._block) < 1:
            raise CheckpointError(message("weight_block_size", f"{self._block}", "two positive sizes"))

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files. A later read opens them again."""
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def names(self) -> list[str]:
        """Names in file order, without the scale companions that `read` consumes."""
        consumed = {info.name for name in self._index.tensors if (info := self._companion(name))}
        return [name for name in self._index.tensors if name not in consumed]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.info(name).shape

    def logical_dtype(self, name: str) -> torch.dtype:
        """The dtype that `read` returns."""
        return torch.bfloat16 if self._companion(name) else self.info(name).dtype

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        """The tensor, or rows start:stop of its dimension 0, in memory of its own.

        Raises CheckpointError for an unknown name, a file that ends early, FP8 scales that do not fit;
        ValueError for rows outside the tensor.
        """
        info = self.info(name)
        first, last = _rows(info, start, stop)
        stored = self._read_rows(info, first, last)
        companion = self._companion(name)
        if companion is None:
            return stored
        return self._dequantized(info, stored, companion, first, last)

    def chunks(self, name: str, size: int = 1 << 24) -> Iterator[memoryview]:
        """The stored bytes of one tensor in pieces of at most `size`, each valid until the next is asked for."""
        info = self.info(name)
        buffer = memoryview(bytearray(min(size, info.nbytes)))
        for done in range(0, info.nbytes, size):
            piece = buffer[: min(size, info.nbytes - done)]
            self._read_into(info, info.offset + done, piece)
            yield piece

    def check_finite(self, name: str, tensor: Tensor) -> None:
        """Raises CheckpointError naming `name` and the number of NaN and Inf values in `tensor`, if any."""
        if not tensor.is_floating_point() or not tensor.numel():
            return
        if tensor.dtype.itemsize > 1 and all(bound.isfinite() for bound in torch.aminmax(tensor)):
            return
        pieces = (piece.float() if piece.itemsize == 1 else piece for piece in tensor.reshape(-1).split(_ITEMS))
        bad = sum(int(piece.numel() - piece.isfinite().sum()) for piece in pieces)
        if bad:
            where = f"{self.info(name).file}: tensor '{short(name)}'"
            found = f"{bad} of {tensor.numel()} values are NaN or Inf"
            raise CheckpointError(message(where, found, "finite weights", "repair or download the checkpoint again"))

    def info(self, name: str) -> TensorInfo:
        """What is stored under a name. Raises CheckpointError for an unknown one."""
        if name not in self._index.tensors:
            raise CheckpointError(message(str(self._index.root), f"no tensor '{short(name)}'"))
        return self._index.tensors[name]

    def _companion(self, name: str) -> TensorInfo | None:
        if self.info(name).dtype != torch.float8_e4m3fn:
            return None
        return self._index.tensors.get(name + SCALE_SUFFIX)

    def _dequantized(self, info: TensorInfo, stored: Tensor, companion: TensorInfo, first: int, last: int) -> Tensor:
        height, width = self._block
        if len(info.shape) < 2:
            raise _misfit(info, companion, "a matrix")
        *batch, rows, columns = info.shape
        expected = (*batch, -(-rows // height), -(-columns // width))
        if companion.shape != expected or not companion.dtype.is_floating_point:
            raise _misfit(info, companion, f"floats {list(expected)} for blocks of {height} x {width}")
        result = torch.empty(stored.shape, dtype=torch.bfloat16)
        if batch:
            scales = self._read_rows(companion, first, last).float()
            matrices = zip(stored.flatten(0, -3), scales.flatten(0, -3), result.flatten(0, -3), strict=True)
            for codes, scale, target in matrices:
                dequantize_blocks(codes, scale, (height, width), 0, target)
            return result
        scales = self._read_rows(companion, first // height, -(-last // height)).float()
        return dequantize_blocks(stored, scales, (height, width), first % height, result)

    def _read_rows(self, info: TensorInfo, first: int, last: int) -> Tensor:
        shape = (last - first, *info.shape[1:]) if info.shape else ()
        row_bytes = info.nbytes // info.shape[0] if info.nbytes and info.shape else info.nbytes
        size = (last - first) * row_bytes
        memory = torch.empty(size, dtype=torch.uint8)
        if size:
            self._read_into(info, info.offset + first * row_bytes, memory.numpy().data)
        return memory.view(info.dtype).reshape(shape)

    def _read_into(self, info: TensorInfo, offset: int, target: memoryview) -> None:
        where = f"{info.file}: tensor '{short(info.name)}'"
        done = 0
        try:
            with self._descriptor(info.file) as descriptor:
                while done < len(target):
                    count = os.preadv(descriptor, [target[done : done + _MAX_READ]], offset + done)
                    if not count:
                        found = f"the file ends {len(target) - done} bytes early"
                        raise CheckpointError(message(where, found, "", "download the checkpoint again"))
                    done += count
        except OSError as error:
            raise CheckpointError(message(where, f"cannot be read ({error.strerror})")) from None

    @contextmanager
    def _descriptor(self, path: Path) -> Iterator[int]:
        with self._lock:
            descriptor = self._descriptors.get(path)
            kept = descriptor is not None or len(self._descriptors) < _MAX_OPEN
            if descriptor is None:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                if kept:
                    self._descriptors[path] = descriptor
        try:
            yield descriptor
        finally:
            if not kept:
                os.close(descriptor)


def _rows(info: TensorInfo, start: int | None, stop: int | None) -> tuple[int, int]:
    if not info.shape:
        if start is not None or stop is not None:
            raise ValueError(f"tensor '{info.name}' is a scalar and has no rows")
        return 0, 1
    first = 0 if start is None else start
    last = info.shape[0] if stop is None else stop
    if not 0 <= first <= last <= info.shape[0]:
        raise ValueError(f"rows {first}:{last} of tensor '{info.name}' with {info.shape[0]} rows")
    return first, last


def _misfit(info: TensorInfo, companion: TensorInfo, allowed: str) -> CheckpointError:
    where = f"{companion.file}: tensor '{short(companion.name)}'"
    found = f"{companion.dtype} {list(companion.shape)} beside FP8 weights {list(info.shape)}"
    return CheckpointError(message(where, found, allowed, "check weight_block_size in config.json"))
