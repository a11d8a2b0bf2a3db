"""The CUDA backend: the compiled library through ctypes. Layout: cuda_table.py; compilation: cuda_build.py."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from moecompress_kernels import cuda_table as table
from moecompress_kernels.cuda_build import BuildError, architecture_of, cached_cuda
from moecompress_kernels.layer import Layer

DTYPES = {torch.bfloat16: 2, torch.float16: 3}  # of inputs; how the library calls them
_BIAS_KINDS = {**DTYPES, torch.float32: 4}
DECODE_TOKENS = 16  # up to here the decode pair, which reads each chosen expert once per eight tokens
_DECODE_SLOTS = 32
_CHUNK = 8192  # tokens of one prefill: bounds the workspace
_LEAST = 80  # compute capability * 10
PREFILL = "MOECOMPRESS_CUDA_PREFILL"  # environment: the instruction of prefill's products
PREFILLS = ("mma", "wgmma")
_WGMMA = 90  # the one compute capability (* 10) that has wgmma
_WGMMA_BLOCK = 64  # tokens of the smallest block that it multiplies


@dataclass(frozen=True)
class Device:
    """A device and the library that runs on it. room: bytes of shared memory a block may have."""

    library: Any
    kind: str  # device type of its tensors
    capability: int
    room: int
    how: str


def unavailable() -> str | None:
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    found = _device(torch.cuda.current_device())
    return found if isinstance(found, str) else None


def describe() -> str:
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    found = _device(torch.cuda.current_device())
    if isinstance(found, str):
        return found
    try:
        prefill = "prefill with {} ({})".format(*prefill_of(found))
    except ValueError as error:
        prefill = str(error)
    return f"{torch.cuda.get_device_name()}, {found.how}, {prefill}"


def prefill_of(device: Device) -> tuple[str, str]:
    """What multiplies blocks of 64 and more tokens on this device, and why: one of PREFILLS.

    Raises ValueError for anything else in the environment.
    """
    asked = os.environ.get(PREFILL, "")
    if asked and asked not in PREFILLS:
        raise ValueError(f"{PREFILL} is {asked!r}; allowed: {' and '.join(PREFILLS)}. Unset, it means {PREFILLS[0]}")
    if asked == "mma":
        return "mma", f"{PREFILL} asks for it"
    if device.capability != _WGMMA:
        have = f"{device.capability // 10}.{device.capability % 10}"
        wish = f", for which {PREFILL} asks," if asked else ""
        return "mma", f"wgmma{wish} needs compute capability 9.0, this device has {have}"
    if not asked:
        return "mma", f"wgmma has not been measured on a device; {PREFILL}=wgmma chooses it"
    return "wgmma", f"{PREFILL} asks for it; mma for blocks of fewer than {_WGMMA_BLOCK} tokens"


def unfit(layer: Layer, device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"the weights are on {device.type}"
    found = _device(_index(device))
    return found if isinstance(found, str) else _unfit(layer, found)


def _unfit(layer: Layer, device: Device) -> str | None:
    if reason := table.misfit(layer):
        return reason
    strides = table.plan(layer).strides
    up = strides[0] if len(strides) == 2 else 0
    library = device.library
    needed = max(library.mc_cuda_decode_room(up, strides[-1]), library.mc_cuda_prefill_room(max(strides)))
    if needed > device.room:
        return f"needs {needed} bytes of shared memory, the device has {device.room}"
    return None


def prepare(layer: Layer, records: Sequence[Tensor], slot_map: Tensor, biases: Sequence[Tensor]) -> list[Tensor]:
    """Handle: [blob uint8, descriptors int32 [E, matrices, 8], slot map, biases...], on the records' device."""
    prefill_of(_of(records[0]))  # what it cannot mean is said before there is work
    plan, slots = table.plan(layer), slot_map.tolist()
    largest = [
        [_largest_scales(rows, m) for m in record.matrices] for rows, record in zip(records, layer.records, strict=True)
    ]
    starts: dict[tuple[int, int, int], int] = {}  # experts that share a record share its tiles
    words, end = [], 0
    for k, row in slots:
        for number, matrix in enumerate(layer.records[k].matrices):
            tiles, key = plan.tiles[k][number], (k, row, number)
            end = end + tiles.bytes if starts.setdefault(key, end) == end else end
            words.append(table.descriptor(matrix, tiles, starts[key], largest[k][number][row]))
    where = records[0].device
    blob = torch.empty(end, dtype=torch.uint8, device=where)
    shape = (layer.experts, len(layer.records[0].matrices), table.WORDS)
    descriptors = torch.tensor(words, dtype=torch.int32).view(shape).to(where)
    handle = [blob, descriptors, slot_map.to(where).contiguous(), *(bias.contiguous() for bias in biases)]
    for k, rows in enumerate(records):
        _repack(layer, handle, k, "mc_cuda_pack", rows.contiguous(), handle[2].data_ptr())
    return handle


def record(layer: Layer, handle: Sequence[Tensor], expert: int) -> Tensor:
    k = int(handle[2][expert, 0])
    row = torch.zeros(1, layer.records[k].row_bytes, dtype=torch.uint8, device=handle[0].device)
    only = torch.tensor([[k, 0]], dtype=torch.int32, device=row.device)
    # The library looks up entry `expert` of the slot map.
    _repack(layer, handle, k, "mc_cuda_unpack", row, only.data_ptr() - 8 * expert, expert)
    return row[0]


def moe_mlp(layer: Layer, handle: Sequence[Tensor], hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Ids outside 0..E-1 skip their slot: telling them apart would mean waiting for the device."""
    _require_dtype(hidden)
    out = torch.empty_like(hidden)
    for start in range(0, hidden.shape[0], _CHUNK):
        part = slice(start, start + _CHUNK)
        _run_moe(layer, handle, _aligned(hidden[part]), ids[part], weights[part], out[part])
    return out


def packed_linear(layer: Layer, handle: Sequence[Tensor], inputs: Tensor) -> Tensor:
    _require_dtype(inputs)
    out = inputs.new_empty(inputs.shape[0], layer.rows)
    if inputs.shape[0] == 0:
        return out
    device, inputs, tokens = _of(inputs), _aligned(inputs), inputs.shape[0]
    args = table.LinearArgs(inputs.data_ptr(), out.data_ptr())
    args.stream, args.tokens, args.dtype = _stream(inputs), tokens, DTYPES[inputs.dtype]
    args.block = 64 if tokens <= 64 else 128
    args.matrix = _matrix(layer, handle, 0, _constants(layer)[1][0])
    name = "mc_cuda_linear_decode" if tokens <= DECODE_TOKENS else "mc_cuda_linear_prefill"
    if tokens > DECODE_TOKENS and _by_warp_groups(device, args.block):
        name, dealt = "mc_cuda_linear_wgmma", inputs.new_empty(tokens, table.whole_blocks(inputs.shape[1]))
        args.dealt = dealt.data_ptr()
    with _guard(inputs):
        _check(device, getattr(device.library, name)(ctypes.byref(args), device.room))
    return out


def _run_moe(layer: Layer, handle: Sequence[Tensor], hidden: Tensor, ids: Tensor, weights: Tensor, out: Tensor) -> None:
    device, (tokens, slots) = _of(hidden), ids.shape
    if slots == 0:
        out.zero_()
        return
    args = table.MoeArgs(hidden.data_ptr(), ids.data_ptr(), weights.data_ptr())
    args.out, args.stream = out.data_ptr(), _stream(hidden)
    args.tokens, args.slots, args.dtype = tokens, slots, DTYPES[hidden.dtype]
    args.activation, (up, down) = _constants(layer)
    args.up, args.down = _matrix(layer, handle, 0, up), _matrix(layer, handle, 1, down)
    with _guard(hidden):
        if tokens <= DECODE_TOKENS and slots <= _DECODE_SLOTS:
            middle = hidden.new_empty(tokens * slots, down.columns)
            args.middle = middle.data_ptr()
            _check(device, device.library.mc_cuda_decode(ctypes.byref(args), device.room, device.capability >= 90))
        else:
            _run_prefill(device, args, hidden)


def _run_prefill(device: Device, args: table.MoeArgs, hidden: Tensor) -> None:
    """With the workspace that is missing in `args`."""
    count, library = args.tokens * args.slots, device.library
    args.block = block_of(count / args.up.experts)
    run, width, partial = library.mc_cuda_prefill, args.down.columns, count * args.down.rows
    if _by_warp_groups(device, args.block):
        run, width = library.mc_cuda_wgmma, table.whole_blocks(width)
        partial = max(partial, args.tokens * table.whole_blocks(args.up.columns))
    order = hidden.new_empty(library.mc_cuda_sort_words(ctypes.byref(args)), dtype=torch.int32)
    workspace = hidden.new_empty(count * width + partial)
    args.sorted, args.middle = order.data_ptr(), workspace.data_ptr()
    args.partial = args.middle + workspace.element_size() * count * width
    _check(device, run(ctypes.byref(args), device.room))


def _by_warp_groups(device: Device, block: int) -> bool:
    return block >= _WGMMA_BLOCK and prefill_of(device)[0] == "wgmma"


def block_of(tokens_per_expert: float) -> int:
    """Tokens of one block of prefill: 16, 64 or 128."""
    return 16 if tokens_per_expert <= 16 else 64 if tokens_per_expert <= 96 else 128


def _matrix(layer: Layer, handle: Sequence[Tensor], number: int, constants: table.MatrixArgs) -> table.MatrixArgs:
    args = table.MatrixArgs.from_buffer_copy(constants)
    args.blob, args.table = handle[0].data_ptr(), handle[1].data_ptr()
    if layer.bias:
        bias = handle[3 + number]
        args.bias, args.bias_dtype = bias.data_ptr(), _BIAS_KINDS[bias.dtype]
    return args


@lru_cache(maxsize=1024)
def _constants(layer: Layer) -> tuple[table.ActivationArgs, tuple[table.MatrixArgs, ...]]:
    """What does not change from call to call."""
    matrices = tuple(table.matrix_args(layer, number) for number in range(len(layer.records[0].matrices)))
    return table.plan(layer).activation, matrices


def _repack(
    layer: Layer, handle: Sequence[Tensor], kind: int, name: str, rows: Tensor, slot_map: int, only: int | None = None
) -> None:
    device = _of(rows)
    for number in range(len(layer.records[kind].matrices)):
        args = table.repack_args(layer, kind, number)
        args.blob, args.table = handle[0].data_ptr(), handle[1].data_ptr()
        args.records, args.slot_map, args.stream = rows.data_ptr(), slot_map, _stream(rows)
        if only is not None:
            args.first, args.experts = only, 1
        with _guard(rows):
            _check(device, getattr(device.library, name)(ctypes.byref(args)))


def _largest_scales(rows: Tensor, matrix: Any) -> list[float]:
    dtype = getattr(torch, matrix.dtype)
    part = rows[:, matrix.scales : matrix.scales + matrix.rows * matrix.groups * dtype.itemsize]
    if not rows.shape[0]:
        return []
    return part.contiguous().view(dtype).float().abs().amax(1).tolist()


def _require_dtype(inputs: Tensor) -> None:
    if inputs.dtype not in DTYPES:
        raise ValueError(f"CUDA kernels: inputs are {inputs.dtype}; allowed: bfloat16 and float16. Load in one of them")


def _aligned(inputs: Tensor) -> Tensor:
    return inputs if inputs.data_ptr() % 16 == 0 else inputs.clone()


def _check(device: Device, code: int) -> None:
    if code:
        reason = device.library.mc_cuda_error(code).decode() if code > 0 else "an argument the library does not take"
        raise RuntimeError(f"CUDA kernels: {reason} ({code})")


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _of(tensor: Tensor) -> Device:
    found = _device(_index(tensor.device))
    if isinstance(found, str):
        raise RuntimeError(f"CUDA kernels: {found}")
    return found


def _stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream


def _guard(tensor: Tensor) -> Any:
    """Makes the tensor's device current, where it is not."""
    index = _index(tensor.device)
    return nullcontext() if index == torch.cuda.current_device() else torch.cuda.device(index)


@lru_cache(maxsize=64)
def _device(index: int) -> Device | str:
    """A device's number to what runs on it, or the reason why nothing does. Compiles at first use."""
    major, minor = torch.cuda.get_device_capability(index)
    if 10 * major + minor < _LEAST:
        return f"compute capability {major}.{minor}; needed: 8.0"
    try:
        path, how = cached_cuda(architecture_of((major, minor)))
        library = load(path)
    except (BuildError, OSError) as error:
        return str(error)
    facts = (ctypes.c_int * 3)()
    with torch.cuda.device(index):
        code = library.mc_cuda_device(facts)
    if code:
        return f"the library has no code for the device: {library.mc_cuda_error(code).decode()} ({code})"
    return Device(library, "cuda", facts[0], facts[2], how)


def load(path: Any) -> Any:
    """The library at `path` with its types declared. Raises BuildError when it is of another version."""
    library = ctypes.CDLL(str(path))
    library.mc_cuda_sort_words.restype = ctypes.c_longlong
    if hasattr(library, "mc_cuda_error"):
        library.mc_cuda_error.restype = ctypes.c_char_p
    if library.mc_cuda_abi() != table.ABI:
        raise BuildError(f"{path} has interface {library.mc_cuda_abi()}; needed: {table.ABI}")
    return library
