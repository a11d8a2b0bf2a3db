"""Golden vectors of every packing: the product packs to them, and takes them apart again."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import golden
import pytest
import torch
from torch import Tensor

from moecompress import ops
from moecompress.checkpoint.gptq import gptq_entries
from moecompress.checkpoint.native import decode_linear, encode_linear, linear_layout
from moecompress.checkpoint.portable import packed_entries
from moecompress.numerics.packing import pack_codes, unpack_codes
from moecompress.types import QuantizedTensor, Scheme
from moecompress_kernels import cuda

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_golden.py"
widths = pytest.mark.parametrize("bits", golden.WIDTHS)


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8)


def matrix(bits: int) -> QuantizedTensor:
    """The matrix of the records and tiles."""
    scales = torch.tensor([[golden.SCALE]] * golden.ROWS, dtype=torch.int16).view(torch.bfloat16)
    zeros = tensor([[golden.zero(bits, row)] for row in range(golden.ROWS)])
    return QuantizedTensor(tensor(golden.codes(bits)), scales, zeros, Scheme(bits, -1, False, "int"))


def read(entry: Any) -> bytes:
    return b"".join(bytes(memoryview(piece).cast("B")) for piece in entry.data())


def sha(data: bytes | Tensor) -> str:
    return hashlib.sha256(bytes(data.tolist()) if isinstance(data, Tensor) else data).hexdigest()


def test_the_script_writes_what_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "golden.json"
    done = subprocess.run([sys.executable, "-P", str(SCRIPT), "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert out.read_text() == golden.KEPT.read_text(), "a packing changed; if on purpose, run scripts/make_golden.py"


@pytest.mark.parametrize(
    ("bits", "codes", "wanted"),
    [
        (1, [1, 0, 0, 0, 0, 1, 0, 1], "a1000000"),
        (2, [0, 1, 2, 3], "e4000000"),
        (3, [0, 1, 2, 3, 4, 5, 6, 7], "88c6fa00"),
        (4, [0, 1, 2, 3, 4, 5, 6, 7], "10325476"),
        (8, [1, 2, 3, 255], "010203ff"),
    ],
)
def test_bytes_by_hand(bits: int, codes: list[int], wanted: str) -> None:
    assert golden.stream(codes, bits).hex() == wanted
    assert bytes(pack_codes(tensor([codes]), bits)[0].tolist()).hex() == wanted


def test_three_bit_words_by_hand() -> None:
    """GPTQ's 3-bit words: only code 10 set to 7, then only code 21."""
    for at, words in ((10, [0xC0000000, 1, 0]), (21, [0, 0x80000000, 3])):
        assert golden.gptq_words([7 * (i == at) for i in range(32)], 3) == words


@widths
def test_streams(bits: int) -> None:
    codes = tensor(golden.codes(bits, 2, golden.RAGGED))
    stored = golden.kept()["stream"][str(bits)]
    packed = pack_codes(codes, bits)
    assert [bytes(row.tolist()).hex() for row in packed] == stored
    assert torch.equal(unpack_codes(packed, bits, golden.RAGGED), codes)


@pytest.mark.parametrize("bits", golden.GPTQ_WIDTHS)
def test_words_of_other_formats(bits: int) -> None:
    """GPTQ's columns of words; compressed-tensors has the same words in rows."""
    codes = tensor(golden.codes(bits, 2, 32))
    padded = torch.cat([codes, codes.new_zeros(30, 32)])  # GPTQ packs 32 outputs at least
    weight = QuantizedTensor(padded, torch.ones(32, 1, dtype=torch.float16), None, Scheme(bits, -1))
    stored = golden.kept()["gptq"][str(bits)]
    qweight = torch.frombuffer(bytearray(read(gptq_entries("m", weight)[0])), dtype=torch.int32).view(-1, 32)
    assert [[int(word) & 0xFFFFFFFF for word in row] for row in qweight.T[:2]] == stored
    entry = next(one for one in packed_entries("m", weight) if one.name.endswith("weight_packed"))
    packed = torch.frombuffer(bytearray(read(entry)), dtype=torch.int32).view(32, -1)
    assert torch.equal(packed, qweight.T)


@widths
def test_records(bits: int) -> None:
    weight = matrix(bits)
    assert len(weight.codes.unique()) == 1 << bits
    layout = linear_layout(weight)
    record = encode_linear(layout, weight)
    assert sha(record) == golden.kept()["record"][str(bits)]
    found = decode_linear(layout, tensor(list(golden.record(bits))))
    assert isinstance(found, QuantizedTensor) and found.zeros is not None and weight.zeros is not None
    assert torch.equal(found.codes, weight.codes) and torch.equal(found.zeros, weight.zeros)


@widths
def test_tiles(bits: int, on_shim: cuda.Device) -> None:
    """The device layout, made by the repacking kernel on the CPU; and back to the record."""
    weight = matrix(bits)
    layout = linear_layout(weight)
    layer, record = ops.describe_layer([layout], 1), encode_linear(layout, weight)
    handle = cuda.prepare(layer, [record[None]], torch.zeros(1, 2, dtype=torch.int32), [])
    assert sha(handle[0]) == golden.kept()["cuda_tiles"][str(bits)]
    assert torch.equal(cuda.record(layer, handle, 0), record)
