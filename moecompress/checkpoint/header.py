"""The header of one safetensors file: read, checked against the file, never trusted.

A file is 8 bytes little-endian header length, that many bytes of JSON (padded with spaces), then the tensors
without holes. `Any` appears where JSON enters; everything that leaves is checked.
"""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moecompress.errors import CheckpointError, message, suggest

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
MAX_HEADER = 100_000_000  # the limit of the safetensors library
_MAX_COUNT = 2**63 - 1  # torch's index type
_MAX_DIMS = 64
_AGAIN = "download or copy the file again"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies. `offset` is absolute in `file`; `nbytes` = product(shape) * dtype.itemsize."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one file in file order.

    Raises CheckpointError, naming the file and where possible the tensor, for anything that is not a sound
    safetensors file. Allocates no more than the header's size (at most 100 MB, and only if the file has it).
    """
    raw, data_start, data_size = _header_bytes(path)
    header = strict_json(raw, str(path))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise CheckpointError(message(str(path), "__metadata__ is not a map of strings", "", _AGAIN))
    spans = [(*_span(path, name, entry, data_size), name) for name, entry in header.items()]
    spans.sort(key=lambda span: span[:2])
    end = 0
    for start, stop, _, _, name in spans:
        if start != end:
            problem = "overlaps the tensor before it" if start < end else "leaves a hole before it"
            found = f"data_offsets [{start}, {stop}] {problem}, which ends at {end}"
            raise _bad(path, name, found, "tensors back to back")
        end = stop
    if end != data_size:
        found = f"tensors cover {end} bytes but the file holds {data_size} after its header"
        raise CheckpointError(message(str(path), found, "equal sizes", _AGAIN))
    return {
        name: TensorInfo(name, dtype, shape, path, data_start + start, stop - start)
        for start, stop, dtype, shape, name in spans
    }


def strict_json(raw: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises CheckpointError naming `where` for bad UTF-8 or JSON, duplicate keys, NaN and Infinity, deep nesting.
    """
    try:
        parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        found = f"not valid JSON ({short(str(error))})"
        raise CheckpointError(message(where, found, "one JSON object", _AGAIN)) from None
    if not isinstance(parsed, dict):
        found = f"JSON holds a {type(parsed).__name__}"
        raise CheckpointError(message(where, found, "one JSON object", _AGAIN))
    return parsed


def short(text: str) -> str:
    """Text from a file, made fit for an error message: printable and at most 200 characters."""
    text = text[:400]
    printable = text if text.isprintable() else ascii(text)[1:-1]
    return printable if len(printable) <= 200 else printable[:197] + "..."


def is_count(value: object) -> bool:
    """A JSON integer usable as a size or offset (JSON true is not one)."""
    return type(value) is int and 0 <= value <= _MAX_COUNT


def _header_bytes(path: Path) -> tuple[bytes, int, int]:
    """(JSON bytes, absolute start of the data, size of the data)."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(message(str(path), "not a regular file", "a safetensors file"))
        size = status.st_size
        with open(path, "rb") as file:
            prefix = file.read(9)
            length = int.from_bytes(prefix[:8], "little")
            if len(prefix) < 9 or length > size - 8:
                found = f"the file has {size} bytes but its header should have {length}"
                raise CheckpointError(message(str(path), found, "a whole safetensors file", _AGAIN))
            if length > MAX_HEADER or prefix[8:] != b"{":
                found = f"the first bytes are no header (length {length}, starts with {prefix[8:]!r})"
                allowed = f"JSON of at most {MAX_HEADER} bytes"
                raise CheckpointError(message(str(path), found, allowed, _AGAIN))
            raw = prefix[8:] + file.read(length - 1) if length else b""
    except OSError as error:
        raise CheckpointError(message(str(path), f"cannot be read ({error.strerror})")) from None
    return raw, 8 + length, size - 8 - length


def _span(path: Path, name: str, entry: object, data_size: int) -> tuple[int, int, torch.dtype, tuple[int, ...]]:
    """(start, stop, dtype, shape) of one header entry, offsets relative to the data."""
    if not _is_text(name):
        raise _bad(path, name, "the name is not valid Unicode", "text")
    keys = ("dtype", "shape", "data_offsets")
    if not isinstance(entry, dict) or set(entry) != set(keys):
        raise _bad(path, name, f"entry is {short(repr(entry))}", f"an object with {', '.join(keys)}")
    code, shape, offsets = (entry[key] for key in keys)
    if not isinstance(code, str) or code not in DTYPES:
        raise _bad(path, name, f"dtype {short(repr(code))}" + suggest(short(str(code)), DTYPES))
    if not isinstance(shape, list) or not all(is_count(size) for size in shape) or _count(shape) < 0:
        raise _bad(path, name, f"shape {short(repr(shape))}", "a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_count(offset) for offset in offsets):
        raise _bad(path, name, f"data_offsets {short(repr(offsets))}", "[start, stop]")
    start, stop = offsets
    if not start <= stop <= data_size:
        raise _bad(path, name, f"data_offsets {offsets}", f"ordered and within the file's {data_size} bytes")
    dtype = DTYPES[code]
    needed = (0 if 0 in shape else _count(shape)) * dtype.itemsize
    if needed != stop - start:
        raise _bad(path, name, f"{code} {shape} needs {needed} bytes, data_offsets give {stop - start}", "equal")
    return start, stop, dtype, tuple(shape)


def _count(shape: list[int]) -> int:
    """Product of the sizes above zero, or -1 when torch could not hold such a shape."""
    if len(shape) > _MAX_DIMS:
        return -1
    count = 1
    for size in shape:
        count *= max(size, 1)
        if count > _MAX_COUNT:
            return -1
    return count


def _is_text(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _bad(path: Path, name: str, found: str, allowed: str = "") -> CheckpointError:
    return CheckpointError(message(f"{path}: tensor '{short(name)}'", found, allowed, _AGAIN))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        repeated, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"key '{short(repeated)}' appears twice")
    return result


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")
