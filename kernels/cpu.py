"""The CPU backend: the compiled library through ctypes, and the tables that it reads (csrc/mc_cpu.h)."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moecompress_kernels.build import BuildError, cached_cpu, sources_hash
from moecompress_kernels.cpu_table import kind_of, make_table, padded_bias
from moecompress_kernels.layer import Layer

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
DTYPES = tuple(_DTYPES)
_MOST_SUMMED = 65536  # columns: 255 * 128 times as much is below 2^31
_ERRORS = {1: "an expert id is not in 0..{experts}", 2: "out of memory", 3: "an argument the library does not take"}


def unavailable() -> str | None:
    return _loaded()[1]


def describe() -> str:
    library, reason, how = _loaded()
    if library is None:
        return str(reason)
    number, name = isas()[-1]
    integers = library.mc_int8(number).decode()
    return f"{name}, int8 inputs by {integers}, {library.mc_threads(1 << 20)} threads at most, {how}"


def isas() -> list[tuple[int, str]]:
    """(number, name) of the instruction sets that are compiled in and that this machine has, the best one last."""
    library, found = _loaded()[0], []
    usable = ctypes.c_int(0)
    number = 0
    while library is not None and (name := library.mc_isa(number, ctypes.byref(usable))) is not None:
        if usable.value:
            found.append((number, name.decode()))
        number += 1
    return found


def dense_pays() -> bool:
    """Whether matrices without codes are worth holding: there are bf16 dot products, and no AMX, which PyTorch uses."""
    return isas()[-1][1] == "AVX-512 BF16"


def unfit(layer: Layer, device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"the weights are on {device.type}"
    first = [(m.rows, m.columns) for m in layer.records[0].matrices]
    if any([(m.rows, m.columns) for m in record.matrices] != first for record in layer.records):
        return "experts have different sizes"
    if layer.activation is not None and first[0][1] != first[1][0]:
        return f"experts read {first[0][1]} values and write {first[1][0]}"
    if layer.activation is not None and first[0][0] != first[1][1] * (2 if layer.activation.gated else 1):
        return f"gate_up gives {first[0][0]} values and down reads {first[1][1]}"
    matrices = [m for record in layer.records for m in record.matrices if m.rounding and m.values != "raw"]
    if any(m.group > _MOST_SUMMED for m in matrices):
        return f"rounded inputs are summed in 32 bits, groups have more than {_MOST_SUMMED} columns"
    return None


def prepare(layer: Layer, records: Sequence[Tensor], slot_map: Tensor, biases: Sequence[Tensor]) -> list[Tensor]:
    """Handle: [blob uint8, table int64]."""
    slots = slot_map.tolist()
    table, size, bias_at = make_table(layer, slots)
    blob = torch.empty(size, dtype=torch.uint8)
    prefer_huge_pages(blob)
    first = [slots.index(slot) == number for number, slot in enumerate(slots)]  # experts may share a record
    sources = [records[k][row].data_ptr() if new else None for (k, row), new in zip(slots, first, strict=True)]
    rows = (ctypes.c_void_p * layer.experts)(*sources)
    _check(layer, _library().mc_pack(table.data_ptr(), rows, blob.data_ptr(), torch.get_num_threads()))
    for number, (at, bias) in enumerate(zip(bias_at, biases, strict=True)):
        padded = padded_bias(bias.float(), layer, first=number == 0)
        blob[at : at + padded.numel() * 4] = padded.flatten().view(torch.uint8)
    return [blob, table]


def record(layer: Layer, handle: Sequence[Tensor], expert: int) -> Tensor:
    blob, table = handle
    k = kind_of(table, expert)
    row = torch.zeros(layer.records[k].row_bytes, dtype=torch.uint8)
    _check(layer, _library().mc_unpack(table.data_ptr(), blob.data_ptr(), expert, row.data_ptr()))
    return row


def moe_mlp(
    layer: Layer, handle: Sequence[Tensor], hidden: Tensor, ids: Tensor, weights: Tensor, isa: int | None = None
) -> Tensor:
    """isa: number of an instruction set; default the best."""
    blob, table = handle[0], handle[1]
    out = torch.empty_like(hidden)
    code = _library().mc_moe_mlp(
        table.data_ptr(),
        blob.data_ptr(),
        hidden.data_ptr(),
        _DTYPES[hidden.dtype],
        ids.data_ptr(),
        weights.data_ptr(),
        *ids.shape,
        out.data_ptr(),
        torch.get_num_threads(),
        _best() if isa is None else isa,
    )
    _check(layer, code)
    return out


def packed_linear(layer: Layer, handle: Sequence[Tensor], inputs: Tensor, isa: int | None = None) -> Tensor:
    blob, table = handle[0], handle[1]
    out = inputs.new_empty(inputs.shape[0], layer.rows)
    code = _library().mc_linear(
        table.data_ptr(),
        blob.data_ptr(),
        inputs.data_ptr(),
        _DTYPES[inputs.dtype],
        inputs.shape[0],
        out.data_ptr(),
        torch.get_num_threads(),
        _best() if isa is None else isa,
    )
    _check(layer, code)
    return out


def read_seconds(memory: Tensor) -> float:
    """How long PyTorch's number of threads take to read `memory` once: the ceiling that benchmarks compare with."""
    began = time.perf_counter()
    _library().mc_read(memory.data_ptr(), memory.nbytes // 64 * 64, torch.get_num_threads())
    return time.perf_counter() - began


def _check(layer: Layer, code: int) -> None:
    if code == 2:
        raise MemoryError("CPU kernels: out of memory")
    if code:
        raise ValueError(f"CPU kernels: {_ERRORS[code].format(experts=layer.experts)}")


def prefer_huge_pages(blob: Tensor) -> None:
    """Ask for large pages: streaming through gigabytes otherwise misses the translation cache at every 4 KB."""
    page = 1 << 21
    start = -(-blob.data_ptr() // page) * page
    length = (blob.data_ptr() + blob.numel() - start) // page * page
    if length > 0:
        madvise = getattr(ctypes.CDLL(None), "madvise", None)
        if madvise is not None:
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), 14)


@cache
def _best() -> int:
    return isas()[-1][0]


def _library() -> Any:
    library, reason, _ = _loaded()
    if library is None:
        raise RuntimeError(reason)
    return library


@cache
def _loaded() -> tuple[Any, str | None, str]:
    """(library, why there is none, how it came about)."""
    for path in _installed():
        library = _open(path)
        if library is not None and library.mc_sources() == sources_hash().encode():
            return library, None, "built at installation"
    try:
        path, how = cached_cpu()
    except BuildError as error:
        return None, str(error), ""
    library = _open(path)
    return library, None if library is not None else f"{path} cannot be loaded; delete it", how


def _installed() -> Iterator[Path]:
    yield from sorted(Path(__file__).resolve().parent.glob("_cpu*.so"))


def _gomp_parallel() -> int | None:
    """Where PyTorch's own OpenMP runtime starts parallel work, or None when it has another one."""
    try:
        runtime = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(runtime.GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


def _open(path: Path) -> Any:
    """The library with its functions declared, or None for a file that is none of ours."""
    pointer, wide = ctypes.c_void_p, ctypes.c_int64
    arguments = {
        "mc_sources": [],
        "mc_isa": [ctypes.c_int, ctypes.POINTER(ctypes.c_int)],
        "mc_int8": [ctypes.c_int],
        "mc_threads": [ctypes.c_int],
        "mc_use_openmp": [pointer],
        "mc_read": [pointer, wide, ctypes.c_int],
        "mc_pack": [pointer, pointer, pointer, ctypes.c_int],
        "mc_unpack": [pointer, pointer, wide, pointer],
        "mc_moe_mlp": [
            pointer,
            pointer,
            pointer,
            wide,
            pointer,
            pointer,
            wide,
            wide,
            pointer,
            ctypes.c_int,
            ctypes.c_int,
        ],
        "mc_linear": [pointer, pointer, pointer, wide, wide, pointer, ctypes.c_int, ctypes.c_int],
    }
    try:
        library = ctypes.CDLL(str(path))
        for name, types in arguments.items():
            getattr(library, name).argtypes = types
    except (OSError, AttributeError):
        return None
    library.mc_use_openmp(_gomp_parallel())
    library.mc_sources.restype = library.mc_isa.restype = library.mc_int8.restype = ctypes.c_char_p
    library.mc_read.restype = ctypes.c_uint64
    return library
