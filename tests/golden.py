"""Packed bytes from the definitions of the formats alone, in plain integers: nothing of the product packs here.

`vectors` is what `scripts/make_golden.py` writes to `golden.json`.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

KEPT = Path(__file__).with_name("golden.json")
WIDTHS = (1, 2, 3, 4, 8)
GPTQ_WIDTHS = (2, 3, 4, 8)
ROWS, COLUMNS, RAGGED = 32, 128, 44  # of the vectors; RAGGED columns end inside a word for some widths
SCALE = 0x3D80  # 1/16 in bfloat16


def codes(bits: int, rows: int = ROWS, columns: int = COLUMNS) -> list[list[int]]:
    """Codes in which every value occurs and neighbours differ."""
    return [[(7919 * (columns * row + column) >> 3) % (1 << bits) for column in range(columns)] for row in range(rows)]


def stream(row: list[int], bits: int) -> bytes:
    """A row as one big integer: code i shifted left by i * bits; little-endian, whole 32-bit words."""
    total = sum(code << (i * bits) for i, code in enumerate(row))
    return total.to_bytes((len(row) * bits + 31) // 32 * 4, "little")


def gptq_words(column: list[int], bits: int) -> list[int]:
    """The int32 words of 32 n codes of one output, field by field as AutoGPTQ packs them, seen as unsigned."""
    found = []
    for at in range(0, len(column), 32):
        c = column[at : at + 32]
        if bits != 3:
            per = 32 // bits
            found += [sum(c[i + j] << (bits * j) for j in range(per)) for i in range(0, 32, per)]
            continue
        found += [
            sum(c[j] << (3 * j) for j in range(10)) | (c[10] & 3) << 30,
            c[10] >> 2 | sum(c[11 + j] << (3 * j + 1) for j in range(10)) | (c[21] & 1) << 31,
            c[21] >> 1 | sum(c[22 + j] << (3 * j + 2) for j in range(10)),
        ]
    return found


def record(bits: int) -> bytes:
    """A native record of one matrix with a whole zero point per row: codes, scales, zeros, each padded to 64 bytes."""
    parts = [
        b"".join(stream(row, bits) for row in codes(bits)),
        struct.pack("<H", SCALE) * ROWS,
        bytes(zero(bits, row) for row in range(ROWS)),
    ]
    return b"".join(part + bytes(-len(part) % 64) for part in parts)


def zero(bits: int, row: int) -> int:
    return row % (1 << bits)


def cuda_bits(bits: int, row: int, column: int) -> list[tuple[int, int]]:
    """(byte, bit) in a tile of each bit of the code at (row, column), from the definition of the mma's A operand.

    m16n8k16: lane 4r + q has in register j rows r + 8 (j odd), columns 2q, 2q + 1 (+ 8 for j >= 2). Columns of a block
    of 32 are dealt so that lane q of a row has 8q .. 8q + 7 in two steps.
    """
    block, within = divmod(column, 32)
    q, inside = divmod(within, 8)
    step, high, half = inside // 4, inside // 2 % 2, inside % 2
    lane, register = 4 * (row % 8) + q, 2 * high + row // 8
    pair = (2 * block + step) * 4 + register
    if bits != 3:
        per = 16 // bits
        spots = [(pair // per, pair % per * bits + i + 16 * half) for i in range(bits)]
    elif pair % 16 == 15:
        spots = [(pair // 16 * 3 + i, 15 + 16 * half) for i in range(3)]
    else:
        spots = [(pair // 16 * 3 + pair % 16 // 5, pair % 16 % 5 * 3 + i + 16 * half) for i in range(3)]
    planes = [4] * (bits // 2) + [2] * (bits % 2)  # words of a lane that lie together
    found = []
    for word, bit in spots:
        plane = word // 4
        start = sum(planes[:plane]) * 4 * 32 + lane * planes[plane] * 4 + word % 4 * 4
        found.append((start + bit // 8, bit % 8))
    return found


def cuda_tiles(bits: int) -> bytes:
    """The device layout of the record's matrix: two tiles of 16 x 128, each with its scales and zero points."""
    found = b""
    for first in range(0, ROWS, 16):
        packed = bytearray(256 * bits)
        for row in range(16):
            for column, code in enumerate(codes(bits)[first + row]):
                for i, (byte, bit) in enumerate(cuda_bits(bits, row, column)):
                    packed[byte] |= (code >> i & 1) << bit
        neighbours = [first + at // 2 + at % 2 * 8 for at in range(16)]  # the two rows of a lane lie together
        found += bytes(packed) + struct.pack("<H", SCALE) * 16 + bytes(zero(bits, row) for row in neighbours)
    return found


def vectors() -> dict[str, dict[str, object]]:
    """Everything of `golden.json`; what is long as its SHA-256."""
    short = {bits: [stream(row, bits).hex() for row in codes(bits, 2, RAGGED)] for bits in WIDTHS}
    words = {bits: [gptq_words(row, bits) for row in codes(bits, 2, 32)] for bits in GPTQ_WIDTHS}
    found: dict[str, dict[int, object]] = {
        "stream": dict(short),
        "gptq": dict(words),
        "record": {bits: hashlib.sha256(record(bits)).hexdigest() for bits in WIDTHS},
        "cuda_tiles": {bits: hashlib.sha256(cuda_tiles(bits)).hexdigest() for bits in WIDTHS},
    }
    return {kind: {str(bits): value for bits, value in of.items()} for kind, of in found.items()}


def kept() -> dict[str, dict[str, object]]:
    return json.loads(KEPT.read_text())  # type: ignore[no-any-return]
