"""Writes safetensors files and other output files: streamed, atomic, hashed on the way.

`safetensors.save_file` sorts by dtype and name, which scatters an expert over the whole file, and wants all
tensors at once. Here the caller gives the order and one tensor at a time is resident.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from moecompress.checkpoint.header import DTYPES
from moecompress.checkpoint.index import INDEX
from moecompress.checkpoint.reader import TensorReader
from moecompress.errors import OutputError, Stopped, message

Buffer = bytes | bytearray | memoryview
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_PAGE = 4096
_ALIGNMENT = 64
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Entry:
    """One tensor to be written. data: yields its bytes in order; a piece is used up before the next is made."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    data: Callable[[], Iterable[Buffer]]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class ShardRecord:
    """What was written. tensors: name -> sha256 (hex) and nbytes; bytes: size of the whole file."""

    file: str
    tensors: Mapping[str, Mapping[str, str | int]]
    bytes: int


def tensor_entry(name: str, tensor: Tensor) -> Entry:
    """An entry with the tensor's values; no full copy is made, even of one that is strided or on a device."""
    return Entry(name, tensor.dtype, tuple(tensor.shape), lambda: _tensor_bytes(tensor))


def copy_entry(reader: TensorReader, name: str) -> Entry:
    """An entry with the stored bytes of a source tensor, byte for byte (FP8 stays FP8)."""
    info = reader.info(name)
    return Entry(info.name, info.dtype, info.shape, lambda: reader.chunks(info.name))


def write_shard(path: Path, entries: Sequence[Entry]) -> ShardRecord:
    """Write one safetensors file in the given order; it appears under `path` complete or not at all.

    Tensor data start at a multiple of 4096. Entries whose size is not a multiple of 64 bytes go behind all
    others, wide dtypes first, so that every tensor is aligned without padding, which the format forbids.
    Raises Stopped when the disk is full, OutputError when the file cannot be written for another reason,
    ValueError for a repeated name, a dtype that safetensors lacks, or data that do not have the entry's size.
    """
    ordered = _aligned_order(entries)
    header = _header(ordered)
    tensors: dict[str, Mapping[str, str | int]] = {}
    with _replacing(path) as descriptor, ThreadPoolExecutor(1) as hasher:
        _write_all(descriptor, header)
        for entry in ordered:
            digest = hashlib.sha256()
            size = 0
            for piece in entry.data():
                view = memoryview(piece).cast("B")
                size += len(view)
                hashed = hasher.submit(digest.update, view)  # hashing and writing both release the GIL
                try:
                    _write_all(descriptor, view)
                finally:
                    hashed.result()
            if size != entry.nbytes:
                raise ValueError(f"tensor '{entry.name}' gave {size} bytes instead of {entry.nbytes}")
            tensors[entry.name] = {"sha256": digest.hexdigest(), "nbytes": size}
    return ShardRecord(path.name, tensors, len(header) + sum(entry.nbytes for entry in ordered))


def write_index(root: Path, records: Iterable[ShardRecord]) -> None:
    """Write `model.safetensors.index.json` for these shards. Raises ValueError for a tensor in two shards."""
    weight_map: dict[str, str] = {}
    total = 0
    for record in records:
        repeated = sorted(weight_map.keys() & record.tensors.keys())
        if repeated:
            raise ValueError(f"tensors in two shards: {repeated[:5]}")
        weight_map.update(dict.fromkeys(record.tensors, record.file))
        total += sum(int(facts["nbytes"]) for facts in record.tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    atomic_write(root / INDEX, json.dumps(index, indent=2, ensure_ascii=False) + "\n")


def atomic_write(path: Path, content: bytes | str) -> None:
    """Write a small file (text as UTF-8) whole or not at all. Raises Stopped for a full disk, else OutputError."""
    with _replacing(path) as descriptor:
        _write_all(descriptor, content.encode() if isinstance(content, str) else content)


@contextmanager
def _replacing(path: Path) -> Iterator[int]:
    """Descriptor of a temporary file beside `path`, synced and renamed at the end, removed on any error."""
    # A fixed name: a killed run leaves at most one such file, and the next run reuses it.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        try:
            with open(temporary, "wb", buffering=0) as file:
                yield file.fileno()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_directory(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            found = f"no space left on the disk ({error.strerror})"
            then = "free some space and run again with --resume"
            raise Stopped(message(str(path), found, "", then)) from error
        raise OutputError(message(str(path), f"cannot be written ({error.strerror})")) from error


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, content: Buffer) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _aligned_order(entries: Sequence[Entry]) -> list[Entry]:
    ragged = [entry for entry in entries if entry.nbytes % _ALIGNMENT]
    ragged.sort(key=lambda entry: -entry.dtype.itemsize)
    return [entry for entry in entries if entry.nbytes % _ALIGNMENT == 0] + ragged


def _header(entries: Sequence[Entry]) -> bytes:
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        if entry.name in fields:
            raise ValueError(f"tensor name '{entry.name}' is used twice or reserved")
        if entry.dtype not in _CODES:
            raise ValueError(f"tensor '{entry.name}': safetensors has no {entry.dtype}")
        span = [offset, offset + entry.nbytes]
        fields[entry.name] = {"dtype": _CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": span}
        offset += entry.nbytes
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(len(text) + 8) % _PAGE)
    return len(text).to_bytes(8, "little") + text


def _tensor_bytes(tensor: Tensor) -> Iterator[memoryview]:
    tensor = tensor.detach()
    if not tensor.numel():
        return
    if tensor.is_contiguous():
        flat = tensor.reshape(-1)
        pieces = flat.split(max(1, _CHUNK // flat.element_size()))
    else:
        rows = max(1, _CHUNK * tensor.shape[0] // (tensor.numel() * tensor.element_size()))
        pieces = tensor.split(rows)
    for piece in pieces:
        yield memoryview(piece.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
