"""Random packed layers for kernel tests, and what they must compute, in float64 from the definition of their codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moecompress import ops
from moecompress.checkpoint.native import encode, encode_linear, linear_layout, record_layout
from moecompress.types import ExpertWeights, QuantizedTensor, Scheme, Weight

SILU = ops.Activation("silu")
MIXED = [  # (gate_up, down) of experts: every width, kind of zero point and of group
    (Scheme(4, 32), Scheme(4, 96)),
    (Scheme(3, 64), Scheme(3, 32)),
    (Scheme(2, 128), Scheme(8, -1)),
    (Scheme(1, -1, binary=True), Scheme(4, 32, False, "int")),
    (Scheme(8, 32), Scheme(3, 32, False, "float")),
    (Scheme(4, 128), Scheme(1, 32, False, "int")),
]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weight(rows: int, columns: int, scheme: Scheme, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Weight:
    """Random codes, scales of both signs, zero points anywhere in the codes; about 1 / sqrt(columns) in size."""
    g = generator(seed)
    if scheme.bits == 16:
        return (torch.randn(rows, columns, generator=g) / columns**0.5).to(dtype)
    codes = torch.randint(0, 1 << scheme.bits, (rows, columns), generator=g, dtype=torch.uint8)
    grid = (rows, scheme.groups(columns))
    scales = (torch.rand(grid, generator=g) + 0.5) * (torch.randint(0, 2, grid, generator=g) * 2 - 1)
    scales = (scales / columns**0.5 / (1 << scheme.bits) * 3).to(dtype)
    zeros = None
    if scheme.zero == "int":
        zeros = torch.randint(0, 1 << scheme.bits, grid, generator=g, dtype=torch.uint8)
    elif scheme.zero == "float":
        zeros = (torch.rand(grid, generator=g) * ((1 << scheme.bits) - 1)).to(dtype)
    return QuantizedTensor(codes, scales, zeros, scheme)


def values(matrix: Weight) -> Tensor:
    """float64, from the words of QuantizedTensor's documentation."""
    if isinstance(matrix, Tensor):
        return matrix.double()
    rows, columns = matrix.shape
    size = columns // matrix.scales.shape[1]
    scales = matrix.scales.double().repeat_interleave(size, 1)
    codes = matrix.codes.double()
    if matrix.scheme.binary:
        return (2 * codes - 1) * scales
    if matrix.zeros is None:
        return (codes - 2 ** (matrix.scheme.bits - 1)) * scales
    return (codes - matrix.zeros.double().repeat_interleave(size, 1)) * scales


@dataclass(frozen=True)
class Packed:
    """Experts as a backend takes them."""

    layer: ops.Layer
    records: list[Tensor]
    slot_map: Tensor
    biases: list[Tensor]
    weights: list[ExpertWeights]


def experts(
    schemes: Sequence[tuple[Scheme, Scheme]],
    hidden: int = 64,
    width: int = 48,
    activation: ops.Activation = SILU,
    dtype: torch.dtype = torch.bfloat16,
    bias: bool = False,
    seed: int = 0,
) -> Packed:
    """One expert per pair of schemes (gate_up, down), in records whose order is not that of the experts."""
    rows = 2 * width if activation.gated else width
    made = []
    for number, (up, down) in enumerate(schemes):
        at = 100 * seed + 10 * number
        biases = torch.randn(rows + hidden, generator=generator(at + 2)).split([rows, hidden]) if bias else (None, None)
        matrices = weight(rows, hidden, up, dtype, at), weight(hidden, width, down, dtype, at + 1)
        made.append(ExpertWeights(*matrices, *biases))
    layouts = [record_layout(expert) for expert in made]
    kinds = list(dict.fromkeys(layouts))[::-1]
    records = [torch.zeros(layouts.count(kind), kind.row_bytes, dtype=torch.uint8) for kind in kinds]
    filled = [0] * len(kinds)
    slot_map = torch.zeros(len(made), 2, dtype=torch.int32)
    for number in reversed(range(len(made))):
        k = kinds.index(layouts[number])
        records[k][filled[k]] = encode(layouts[number], made[number])
        slot_map[number] = torch.tensor([k, filled[k]])
        filled[k] += 1
    stacks = [torch.stack([getattr(e, f"{name}_bias") for e in made]) for name in ("gate_up", "down")] if bias else []
    return Packed(ops.describe_layer(kinds, len(made), activation, bias), records, slot_map, stacks, made)


def linear(matrix: Weight) -> Packed:
    layout = linear_layout(matrix)
    records, slots = [encode_linear(layout, matrix)[None]], torch.zeros(1, 2, dtype=torch.int32)
    return Packed(ops.describe_layer([layout], 1), records, slots, [], [])


def handle_of(packed: Packed, backend: ops.Backend, device: str) -> list[Tensor]:
    """What the backend makes of it, with everything on a device."""
    records, biases = ([one.to(device) for one in part] for part in (packed.records, packed.biases))
    return backend.prepare(packed.layer, records, packed.slot_map.to(device), biases)


def sealed_handle(packed: Packed, backend: str, device: str = "cpu") -> list[Tensor]:
    """The same as the operators take it."""
    return ops.sealed(backend, packed.layer, handle_of(packed, ops.backend(backend), device))


def oracle(packed: Packed, hidden: Tensor, ids: Tensor, gates: Tensor, middle: torch.dtype = torch.float64) -> Tensor:
    """The sum over slots in float64, one token and slot at a time. Ids that are no expert's skip their slot.

    Nothing is rounded on the way but what goes into `down`, to `middle`.
    """
    assert packed.layer.activation is not None
    out = torch.zeros(hidden.shape, dtype=torch.float64)
    dense = [(values(e.gate_up), values(e.down)) for e in packed.weights]
    for token in range(len(hidden)):
        for slot, expert in enumerate(ids[token].tolist()):
            if not 0 <= expert < len(dense):
                continue
            up, down = dense[expert]
            inner = up @ hidden[token].double()
            if packed.biases:
                inner = inner + packed.biases[0][expert].double()
            inner = down @ ops.activate(packed.layer.activation, inner).to(middle).double()
            if packed.biases:
                inner = inner + packed.biases[1][expert].double()
            out[token] += gates[token, slot].double() * inner
    return out


def routing(tokens: int, count: int, per_token: int, hidden: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """hidden, ids (some of them the sentinel) and gates for `count` experts."""
    g = generator(seed)
    ids = torch.rand(tokens, count + 1, generator=g).argsort(-1)[:, :per_token]
    x = torch.randn(tokens, hidden, generator=g).to(dtype)
    return [x, ids.contiguous(), torch.rand(tokens, per_token, generator=g)]


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative Frobenius error; NaN never passes a comparison with it."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))
