"""Operators on packed weights, `moecompress::moe_mlp` and `moecompress::packed_linear`, and who runs them.

A backend keeps the weights of a layer in a handle (a few tensors) that it made from native records. Backends are
asked in order of preference; each can run a layer or gives the reason why not, and the last one always can.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from moecompress.arguments import DTYPES, require_moe_mlp, require_packed_linear, sealed, unsealed
from moecompress.checkpoint.native import MatrixLayout, RecordLayout, decode, decode_linear, plan_record
from moecompress.errors import message
from moecompress.numerics.activation import rounded_as
from moecompress.numerics.grids import dequantize
from moecompress.types import PROJECTIONS, QuantizedTensor, Scheme, Weight
from moecompress_kernels.layer import Activation, Layer, Matrix, Record, Values, parse

__all__ = ["DTYPES", "Activation", "Layer", "sealed"]  # for who describes a layer and calls the operators

ORDER = ("cuda", "triton", "cpu")  # modules of moecompress_kernels by preference; torch comes after them
TORCH = "torch"
Dtypes = tuple[torch.dtype, ...]
_BITS_OF: dict[str, int] = {"none": 0, "int4": 4, "int8": 8}


class Backend(Protocol):
    """What a backend offers; kernels/README.md says more. Tensors of a handle are on the device of the weights."""

    DTYPES: Dtypes  # of inputs that it takes

    def unavailable(self) -> str | None:
        """Why it cannot run on this machine, or None. May build; never raises."""

    def describe(self) -> str:
        """Which one it is, for people."""

    def unfit(self, layer: Layer, device: torch.device) -> str | None:
        """Why it cannot run this layer with weights on `device`, or None."""

    def prepare(
        self, layer: Layer, records: Sequence[Tensor], slot_map: Tensor, biases: Sequence[Tensor]
    ) -> list[Tensor]:
        """The handle. records: uint8 [n_k, R_k]; slot_map: int32 [E, 2]; biases: gate_up's and down's [E, .]."""

    def record(self, layer: Layer, handle: Sequence[Tensor], expert: int) -> Tensor:
        """The record of one expert, uint8 [R], byte for byte as it went into `prepare`."""

    def moe_mlp(self, layer: Layer, handle: Sequence[Tensor], hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """As `moe_mlp` below, arguments checked and contiguous, ids maybe out of range."""

    def packed_linear(self, layer: Layer, handle: Sequence[Tensor], inputs: Tensor) -> Tensor:
        """inputs [n, in] -> [n, out], no bias."""


@dataclass(frozen=True)
class Choice:
    """The backend of a layer. refused: (backend, reason) of all that were preferred to it."""

    backend: str
    refused: tuple[tuple[str, str], ...] = ()


def choose(layer: Layer, device: torch.device, dtype: torch.dtype | None = None) -> Choice:
    """The first backend that can run this layer with weights on `device` and inputs of `dtype` (None: any it takes)."""
    refused: list[tuple[str, str]] = []
    for name in ORDER:
        reason = unavailable(name) or backend(name).unfit(layer, device) or untaken(name, dtype)
        if reason is None:
            return Choice(name, tuple(refused))
        refused.append((name, reason))
    return Choice(TORCH, tuple(refused))


def untaken(name: str, dtype: torch.dtype | None) -> str | None:
    """Why this backend cannot run inputs of `dtype`, or None."""
    found, *taken = (str(one).removeprefix("torch.") for one in (dtype, *backend(name).DTYPES))
    return None if dtype is None or found in taken else f"inputs are {found}; it takes {' and '.join(taken)}"


@cache
def unavailable(name: str) -> str | None:
    """Why this backend cannot run on this machine, or None; found out once per process."""
    try:
        return backend(name).unavailable()
    except ModuleNotFoundError as error:
        return f"not part of this installation ({error.name} is missing)"


def holds_dense() -> bool:
    """Whether the CPU backend is the better one for matrices without codes on this machine, too."""
    return bool(import_module("moecompress_kernels.cpu").dense_pays())


def backend(name: str) -> Backend:
    """A backend by name. Raises ValueError for a name that is not in ORDER and not `torch`."""
    if name == TORCH:
        return TorchReference()
    if name not in ORDER:
        raise ValueError(message("backend", name, ", ".join((*ORDER, TORCH))))
    return cast(Backend, import_module(f"moecompress_kernels.{name}"))


def describe_layer(
    layouts: Sequence[RecordLayout], experts: int, activation: Activation | None = None, bias: bool = False
) -> Layer:
    """The description of routed experts (with `activation`) or of a Linear (without) in these records."""
    names: tuple[str, ...] = PROJECTIONS if activation else ("weight",)
    records = tuple(Record(tuple(_matrix(k.matrix(name)) for name in names), k.row_bytes) for k in layouts)
    return Layer(experts, records, activation, bias)


def _matrix(layout: MatrixLayout) -> Matrix:
    rows, columns = layout.shape
    scheme, values = layout.scheme, "symmetric"
    if scheme.bits == 16:
        values = "raw"
    elif scheme.binary:
        values = "binary"
    elif scheme.zero != "none":
        values = scheme.zero
    offsets = [part.offset if part else -1 for part in (layout.codes, layout.scales, layout.zeros)]
    group, dtype = columns // scheme.groups(columns), str(layout.dtype).removeprefix("torch.")
    inputs = (_BITS_OF[scheme.activation], scheme.activation_clip)
    return Matrix(rows, columns, scheme.bits, group, cast(Values, values), dtype, *offsets, *inputs)


def moe_mlp(hidden: Tensor, ids: Tensor, weights: Tensor, handle: Sequence[Tensor], name: str, layer: str) -> Tensor:
    """Sum over slots of weight * down(activation(gate_up(hidden))), [T, H] in hidden's dtype.

    hidden: [T, H] float32, bfloat16 or float16. ids: integers [T, K] in 0..E; E skips the slot. weights: [T, K].
    handle, layer: what backend `name` prepared, sealed, and the text of the layer it is for. All tensors are on one
    device and none needs a gradient. Raises ValueError for anything else. A token with NaN or Inf gives NaN or Inf in
    its own row only.
    """
    return torch.ops.moecompress.moe_mlp(hidden, ids, weights, handle, name, layer)  # type: ignore[no-any-return]


def packed_linear(inputs: Tensor, handle: Sequence[Tensor], name: str, layer: str) -> Tensor:
    """inputs [..., in] -> [..., out] in inputs' dtype, by backend `name`; errors as in `moe_mlp`."""
    return torch.ops.moecompress.packed_linear(inputs, handle, name, layer)  # type: ignore[no-any-return]


def routed_slots(ids: Tensor, num_experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(expert, token rows, slots) for every expert that is hit, ascending; rows ascending; sentinel ids skipped.

    ids: int64 [T, K]. Raises ValueError for ids outside [0, E].
    """
    flat = ids.reshape(-1)
    if flat.numel() and not (0 <= int(flat.min()) and int(flat.max()) <= num_experts):
        raise ValueError(message("expert ids", f"[{int(flat.min())}, {int(flat.max())}]", f"0..{num_experts}"))
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=num_experts + 1).tolist()
    start = 0
    for expert in range(num_experts):
        if counts[expert]:
            at = order[start : start + counts[expert]]
            yield expert, at // ids.shape[1], at % ids.shape[1]
        start += counts[expert]


def materialise(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The matrix in `dtype`: dequantized, or cast (no copy when it already has that dtype)."""
    return dequantize(weight, dtype) if isinstance(weight, QuantizedTensor) else weight.to(dtype)


def activate(activation: Activation, projected: Tensor) -> Tensor:
    """[n, 2I] (or [n, I] without a gate) -> [n, I], in the dtype of `projected`."""
    gate, up = projected, None
    if activation.gated:
        parts = (projected[..., ::2], projected[..., 1::2]) if activation.interleaved else projected.chunk(2, -1)
        gate, up = parts
    if activation.limit is not None:
        gate = gate.clamp(max=activation.limit)
        up = None if up is None else up.clamp(-activation.limit, activation.limit)
    functions = {
        "silu": lambda x: x * torch.sigmoid(activation.alpha * x),
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "relu": F.relu,
        "relu2": lambda x: F.relu(x).square(),
    }
    gate = functions[activation.function](gate)
    return gate if up is None else gate * (up + activation.shift)


class TorchReference:
    """The operators in plain PyTorch, one expert expanded at a time. Handle: slot map, records, biases."""

    DTYPES = DTYPES

    def unavailable(self) -> str | None:
        return None

    def describe(self) -> str:
        return "runs wherever PyTorch runs"

    def unfit(self, layer: Layer, device: torch.device) -> str | None:
        return None

    def prepare(
        self, layer: Layer, records: Sequence[Tensor], slot_map: Tensor, biases: Sequence[Tensor]
    ) -> list[Tensor]:
        return [slot_map, *records, *biases]

    def record(self, layer: Layer, handle: Sequence[Tensor], expert: int) -> Tensor:
        k, row = handle[0][expert].tolist()
        return handle[1 + k][row]

    def moe_mlp(self, layer: Layer, handle: Sequence[Tensor], hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        assert layer.activation is not None
        layouts = [_layout(record, PROJECTIONS) for record in layer.records]
        up_bias, down_bias = handle[-2:] if layer.bias else (None, None)
        out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        for expert, rows, slots in routed_slots(ids, layer.experts):
            k = int(handle[0][expert, 0])
            matrices = decode(layouts[k], self.record(layer, handle, expert))
            x = hidden[rows].float()
            x = _linear(x, matrices.gate_up, None if up_bias is None else up_bias[expert])
            x = activate(layer.activation, x).to(hidden.dtype).float()
            x = _linear(x, matrices.down, None if down_bias is None else down_bias[expert])
            out.index_add_(0, rows, x * weights[rows, slots, None].float())
        return out.to(hidden.dtype)

    def packed_linear(self, layer: Layer, handle: Sequence[Tensor], inputs: Tensor) -> Tensor:
        weight = decode_linear(_layout(layer.records[0], ("weight",)), handle[1][0])
        return _linear(inputs.float(), weight, None).to(inputs.dtype)


def _linear(inputs: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """A float32 product with the matrix as it is stored, its inputs rounded as its scheme says."""
    inputs = rounded_as(weight.scheme, inputs) if isinstance(weight, QuantizedTensor) else inputs
    return F.linear(inputs, materialise(weight, torch.float32), None if bias is None else bias.float())


@cache
def _layout(record: Record, names: tuple[str, ...]) -> RecordLayout:
    words = {bits: word for word, bits in _BITS_OF.items()}
    rows = []
    for name, m in zip(names, record.matrices, strict=True):
        zero = m.values if m.values in ("int", "float") else "none"
        group = -1 if m.group == m.columns else m.group
        inputs = (m.values == "binary", words[m.rounding], m.clip)
        scheme = Scheme(m.bits, group, zero == "none", zero, *inputs)  # type: ignore[arg-type]
        rows.append((name, (m.rows, m.columns), scheme, getattr(torch, m.dtype)))
    return plan_record(rows)


def _run_moe_mlp(
    hidden: Tensor, ids: Tensor, weights: Tensor, handle: Sequence[Tensor], name: str, layer: str
) -> Tensor:
    described = parse(layer)
    require_moe_mlp(hidden, ids, weights, handle, described)
    run, held = backend(name).moe_mlp, unsealed(name, described, handle)
    return run(described, held, hidden.contiguous(), ids.long().contiguous(), weights.float().contiguous())


def _run_packed_linear(inputs: Tensor, handle: Sequence[Tensor], name: str, layer: str) -> Tensor:
    described = parse(layer)
    require_packed_linear(inputs, handle, described)
    flat = inputs.reshape(-1, described.columns).contiguous()
    run, held = backend(name).packed_linear, unsealed(name, described, handle)
    return run(described, held, flat).view(*inputs.shape[:-1], described.rows)


_library = torch.library.Library("moecompress", "DEF")
_library.define("moe_mlp(Tensor hidden, Tensor ids, Tensor weights, Tensor[] handle, str backend, str layer) -> Tensor")
_library.define("packed_linear(Tensor inputs, Tensor[] handle, str backend, str layer) -> Tensor")
_library.impl("moe_mlp", _run_moe_mlp, "CompositeExplicitAutograd")
_library.impl("packed_linear", _run_packed_linear, "CompositeExplicitAutograd")


@torch.library.register_fake("moecompress::moe_mlp", lib=_library)
def _fake_moe_mlp(
    hidden: Tensor, ids: Tensor, weights: Tensor, handle: Sequence[Tensor], name: str, layer: str
) -> Tensor:
    require_moe_mlp(hidden, ids, weights, handle, parse(layer))
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


@torch.library.register_fake("moecompress::packed_linear", lib=_library)
def _fake_packed_linear(inputs: Tensor, handle: Sequence[Tensor], name: str, layer: str) -> Tensor:
    described = parse(layer)
    require_packed_linear(inputs, handle, described)
    return inputs.new_empty(*inputs.shape[:-1], described.rows)
