"""The Triton backend: for CUDA devices where the compiled library is not. It reads native records as they are.

Triton comes with PyTorch's CUDA builds and compiles at the first call of each kind (its own cache); it needs no nvcc.
Nothing here waits for the device, so calls can be captured in graphs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moecompress_kernels.layer import Activation, Layer, Matrix

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_KINDS = {"symmetric": 0, "binary": 1, "int": 2, "float": 3}
_LEAST = 80  # compute capability * 10
_CHUNK = 2048  # tokens of one call: bounds the workspace
_CHANNELS = 32
_COLUMNS = 64  # at most, of one step of a product


def unavailable() -> str | None:
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    return _trouble(torch.cuda.current_device())


def describe() -> str:
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    import triton

    return f"{torch.cuda.get_device_name()}, Triton {triton.__version__}, compiled at the first call"


def unfit(layer: Layer, device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"the weights are on {device.type}"
    return _trouble(torch.cuda.current_device() if device.index is None else device.index) or misfit(layer)


def misfit(layer: Layer) -> str | None:
    """What the kernel does not do of this layer, or None."""
    if reason := layer.uneven():
        return reason
    matrices = [m for record in layer.records for m in record.matrices]
    for of_experts in zip(*(record.matrices for record in layer.records), strict=True):
        if len({(m.rounding, m.clip) for m in of_experts}) > 1:
            return "inputs rounded in several ways among its experts"
    if len({m.dtype for m in matrices}) > 1:
        return "scales of several types among its experts"
    for matrix in matrices:
        if matrix.bits == 16:
            return "a matrix without codes (16 bits) among them"
        if matrix.group != matrix.columns and matrix.group % 16:
            return f"groups of {matrix.group} columns, not a multiple of 16"
    return None


def prepare(layer: Layer, records: Sequence[Tensor], slot_map: Tensor, biases: Sequence[Tensor]) -> list[Tensor]:
    """Handle: [blob uint8: the records one after the other, tables int64 [matrices, E, 6], slot map, biases...].

    A table has for each expert: where its codes, scales and zero points begin in the blob, bits, group, kind of values.
    """
    blob = records[0].reshape(-1) if len(records) == 1 else torch.cat([rows.reshape(-1) for rows in records])
    starts = [0]
    for rows in records:
        starts.append(starts[-1] + rows.numel())
    tables = [
        [
            [starts[k] + row * layer.records[k].row_bytes + at for at in (m.codes, m.scales, max(m.zeros, 0))]
            + [m.bits, m.group, _KINDS[m.values]]
            for k, row in slot_map.tolist()
            for m in [layer.records[k].matrices[number]]
        ]
        for number in range(len(layer.records[0].matrices))
    ]
    table = torch.tensor(tables, dtype=torch.int64).to(blob.device)
    return [blob.contiguous(), table, slot_map.to(blob.device), *(bias.contiguous() for bias in biases)]


def record(layer: Layer, handle: Sequence[Tensor], expert: int) -> Tensor:
    k = int(handle[2][expert, 0])
    start = int(handle[1][0, expert, 0]) - layer.records[k].matrices[0].codes
    return handle[0][start : start + layer.records[k].row_bytes]


def moe_mlp(layer: Layer, handle: Sequence[Tensor], hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Ids outside 0..E-1 skip their slot: telling them apart would mean waiting for the device."""
    out = torch.zeros_like(hidden)
    if ids.shape[1] == 0:
        return out
    for start in range(0, hidden.shape[0], _CHUNK):
        part = slice(start, start + _CHUNK)
        out[part] = _run_moe(layer, handle, hidden[part], ids[part], weights[part])
    return out


def _run_moe(layer: Layer, handle: Sequence[Tensor], hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    tokens, slots = ids.shape
    cut = sort(ids.reshape(-1), layer.experts) if tokens > 1 and ids.numel() > layer.experts else one_each(ids)
    bias = [*handle[3:], None, None]
    middle = _product(layer, handle, 0, hidden, cut, hidden.dtype, bias[0], slots)
    each = _product(layer, handle, 1, middle, cut, torch.float32, bias[1], weights=weights)
    return each.view(tokens, slots, -1).sum(1).to(hidden.dtype)


def packed_linear(layer: Layer, handle: Sequence[Tensor], inputs: Tensor) -> Tensor:
    tokens = inputs.shape[0]
    if tokens == 0:
        return inputs.new_empty(0, layer.rows)
    block = 1 if tokens == 1 else 16 if tokens <= 32 else 64
    return _product(layer, handle, 0, inputs, Cut(None, None, block, -(-tokens // block), tokens), inputs.dtype)


class Cut(NamedTuple):
    """How slots are cut into blocks; blocks, order: as the kernel takes them."""

    blocks: Tensor | None
    order: Tensor | None
    tokens: int
    number: int
    slots: int


def one_each(ids: Tensor) -> Cut:
    """A block for every slot: few slots rarely share experts, and sorting costs more launches than the product."""
    return Cut(ids, None, 1, ids.numel(), ids.numel())


def sort(ids: Tensor, experts: int) -> Cut:
    """Slots by expert, in blocks; those without an expert at the end. ids: int64 [slots]."""
    count = ids.numel()
    block = 16 if count <= 32 * experts else 64
    found, order = torch.sort(torch.where((ids >= 0) & (ids < experts), ids, experts), stable=True)
    ends = torch.searchsorted(found, torch.arange(experts + 1, device=ids.device), right=True)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    blocks = (ends - starts + block - 1) // block
    last = blocks.cumsum(0)
    number = torch.arange(count // block + min(experts + 1, count), device=ids.device)  # a bound that needs no ids
    owner = torch.searchsorted(last, number, right=True).clamp(max=experts)
    first = starts[owner] + (number - (last - blocks)[owner]) * block
    return Cut(torch.stack([owner, first, ends[owner]], 1), order, block, len(number), count)


def _product(
    layer: Layer,
    handle: Sequence[Tensor],
    matrix: int,
    inputs: Tensor,
    cut: Cut,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    per_row: int = 1,
    weights: Tensor | None = None,
) -> Tensor:
    """A matrix of every slot's expert times the slot's inputs, in `dtype` [slots, .]; the first of two, activated."""
    from moecompress_kernels import triton_kernels as device

    facts, steps = _facts(layer, matrix), None
    if facts.rounding:
        inputs, steps = rounded(inputs, facts.rounding, facts.clip)
    # Triton's interpreter multiplies bfloat16 wrongly and rounds to it wrongly; float32 holds the same values.
    plain = device.INTERPRETED and torch.bfloat16 in (inputs.dtype, dtype)
    multiply = torch.float32 if plain else inputs.dtype
    out = inputs.new_empty(cut.slots, facts.width, dtype=torch.float32 if plain else dtype)
    act = facts.activation
    grid = (-(-facts.width // _CHANNELS), cut.number)
    with torch.cuda.device(inputs.device) if inputs.is_cuda else nullcontext():
        device.product[grid](
            *(inputs, steps, out, handle[0], handle[1][matrix], cut.blocks, cut.order, weights, bias),
            *(cut.slots, per_row, facts.columns, facts.width, layer.experts),
            *(act.alpha, math.inf if act.limit is None else act.limit, act.shift),
            MULTIPLY=_word(multiply),
            SCALES=_word(facts.scales),
            OFFSETS=facts.offsets,
            STRADDLE=facts.straddle,
            FUNCTION=facts.function,
            GATED=act.gated,
            INTERLEAVED=act.interleaved,
            TOKENS=cut.tokens,
            CHANNELS=_CHANNELS,
            COLUMNS=facts.step,
        )
    return out.to(dtype)


class Facts(NamedTuple):
    """What the kernel is compiled for, and how its inputs are rounded.

    width: of the result. step: columns that share a scale in every expert.
    """

    columns: int
    width: int
    scales: torch.dtype
    offsets: bool
    straddle: bool
    function: str
    activation: Activation
    step: int
    rounding: int
    clip: float


@lru_cache(maxsize=1024)
def _facts(layer: Layer, number: int) -> Facts:
    matrices: list[Matrix] = [record.matrices[number] for record in layer.records]
    one = matrices[0]
    act = layer.activation if layer.activation and number == 0 else None
    steps = [math.gcd(m.group, _COLUMNS) for m in matrices if m.group != m.columns]
    return Facts(
        one.columns,
        one.rows // 2 if act and act.gated else one.rows,
        getattr(torch, one.dtype),
        any(m.values != "symmetric" for m in matrices),
        any(m.bits == 3 for m in matrices),
        act.function if act else "none",
        act or Activation("relu", gated=False),
        min(steps, default=_COLUMNS),
        one.rounding,
        one.clip,
    )


def rounded(inputs: Tensor, bits: int, clip: float) -> tuple[Tensor, Tensor]:
    """(codes as float16 [n, c], which holds them exactly; steps float32 [n]), as `layer.Matrix` says; NaN stays NaN."""
    most = 2 ** (bits - 1) - 1
    values = inputs.float()
    steps = values.abs().amax(-1, keepdim=True) * (clip / most)
    steps = torch.where(steps == 0, 1.0, steps)
    return torch.round(values / steps).clamp_(-most - 1, most).half(), steps[:, 0].contiguous()


def _word(dtype: torch.dtype) -> Any:
    import triton.language

    return getattr(triton.language, str(dtype).removeprefix("torch."))


@lru_cache(maxsize=64)
def _trouble(index: int) -> str | None:
    """Why Triton cannot run on a device, or None. It needs a C compiler to make its launcher."""
    try:
        import triton
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    if torch.version.hip:
        return "PyTorch is built for ROCm, on which this path was never tried"
    major, minor = torch.cuda.get_device_capability(index)
    if 10 * major + minor < _LEAST:
        return f"compute capability {major}.{minor}; needed: 8.0"
    try:
        with torch.cuda.device(index):
            triton.runtime.driver.active.get_current_target()
    except Exception as error:  # whatever its driver meets: the reason is for people
        return f"Triton {triton.__version__} finds no way to the device: {str(error).splitlines()[0][:200]}"
    return None
