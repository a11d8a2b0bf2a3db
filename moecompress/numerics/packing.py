"""Codes to bytes and back: one dense little-endian bit stream per row.

Element i of a row occupies bits [i*b, (i+1)*b) of the row's stream, lowest bit first, and a row is padded with zero
bits to whole 32-bit words. For b = 2, 3, 4, 8 these are the int32 words of compressed-tensors (>= 0.18) seen as bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moecompress.types import BITS

_CHUNK = 1 << 20  # codes handled at a time, so that temporaries stay small beside the input and the output


def row_bytes(columns: int, bits: int) -> int:
    """Bytes of one packed row of `columns` codes: a multiple of 4. Raises ValueError for a width not in BITS or 0."""
    if bits not in (0, *BITS):
        raise ValueError(f"bits: {bits}; allowed: {BITS}")
    if columns < 1:
        raise ValueError(f"columns: {columns}; allowed: at least 1")
    return -(-columns * bits // 32) * 4


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 [rows, columns], values in [0, 2^bits - 1], to uint8 [rows, row_bytes(columns, bits)].

    Raises ValueError when the dtype, the rank or a value does not fit.
    """
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise ValueError(f"codes: {codes.dtype} {tuple(codes.shape)}; allowed: uint8 [rows, columns]")
    rows, columns = codes.shape
    packed = codes.new_zeros(rows, row_bytes(columns, bits))
    if rows and int(codes.max()) >> bits:
        raise ValueError(f"codes: value {int(codes.max())} does not fit {bits} bits")
    for part in _row_chunks(rows, columns):
        block = _pack_bytes(codes[part], bits)
        used = min(block.shape[1], packed.shape[1])
        packed[part, :used] = block[:, :used]
    return packed


def unpack_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of `pack_codes`: uint8 [rows, row_bytes(columns, bits)] to uint8 [rows, columns].

    Raises ValueError when the dtype or the shape does not fit; padding bits are not looked at.
    """
    width = row_bytes(columns, bits)
    if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[1] != width:
        raise ValueError(f"packed: {packed.dtype} {tuple(packed.shape)}; allowed: uint8 [rows, {width}]")
    codes = packed.new_empty(packed.shape[0], columns)
    for part in _row_chunks(packed.shape[0], columns):
        codes[part] = _unpack_bytes(packed[part], bits, columns)
    return codes


def _row_chunks(rows: int, columns: int) -> list[slice]:
    step = max(1, _CHUNK // columns)
    return [slice(start, start + step) for start in range(0, rows, step)]


def _pack_bytes(codes: Tensor, bits: int) -> Tensor:
    """[r, columns] codes to [r, whole bytes], columns padded with zeros to a whole number of bytes' codes."""
    if bits == 8:
        return codes
    per = 8 if bits == 3 else 8 // bits
    ragged = -codes.shape[1] % per
    if ragged:
        codes = torch.nn.functional.pad(codes, (0, ragged))
    units = codes.view(codes.shape[0], -1, per)
    if bits != 3:
        out = units[..., 0].clone()
        for i in range(1, per):
            out |= units[..., i] << (i * bits)
        return out
    word = units[..., 0].to(torch.int32)  # eight 3-bit codes are three bytes
    for i in range(1, 8):
        word |= units[..., i].to(torch.int32) << (3 * i)
    return torch.stack([(word >> shift & 255).to(torch.uint8) for shift in (0, 8, 16)], dim=-1).flatten(1)


def _unpack_bytes(packed: Tensor, bits: int, columns: int) -> Tensor:
    if bits == 8:
        return packed[:, :columns]
    if bits != 3:
        used = -(-columns * bits // 8)
        units = [packed[:, :used] >> (i * bits) & ((1 << bits) - 1) for i in range(8 // bits)]
        return torch.stack(units, dim=-1).flatten(1)[:, :columns]
    used = -(-columns // 8) * 3
    if packed.shape[1] < used:  # the last triple may lie partly beyond the padded row
        packed = torch.nn.functional.pad(packed, (0, used - packed.shape[1]))
    triples = packed[:, :used].reshape(packed.shape[0], -1, 3).to(torch.int32)
    word = triples[..., 0] | triples[..., 1] << 8 | triples[..., 2] << 16
    return torch.stack([(word >> 3 * i & 7).to(torch.uint8) for i in range(8)], dim=-1).flatten(1)[:, :columns]
