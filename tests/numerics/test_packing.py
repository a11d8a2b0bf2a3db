"""Packing against a Python integer bit stream and against compressed-tensors."""

from __future__ import annotations

import golden
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moecompress.numerics import packing
from moecompress.numerics.packing import pack_codes, row_bytes, unpack_codes
from moecompress.types import BITS


def _random_codes(rows: int, columns: int, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)


@settings(max_examples=60, deadline=None)
@given(bits=st.sampled_from(BITS), rows=st.integers(1, 5), columns=st.integers(1, 100), seed=st.integers(0, 999))
def test_matches_integer_stream_and_round_trips(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = _random_codes(rows, columns, bits, seed)
    packed = pack_codes(codes, bits)
    assert packed.shape == (rows, row_bytes(columns, bits)) and packed.dtype == torch.uint8
    for row, stored in zip(codes.tolist(), packed, strict=True):
        assert bytes(stored.tolist()) == golden.stream(row, bits)
    assert torch.equal(unpack_codes(packed, bits, columns), codes)


@pytest.mark.parametrize("bits", BITS)
def test_row_chunks_do_not_change_the_bytes(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = _random_codes(7, 45, bits)
    whole = pack_codes(codes, bits)
    monkeypatch.setattr(packing, "_CHUNK", 90)  # two rows at a time, the last chunk ragged
    assert torch.equal(pack_codes(codes, bits), whole)
    assert torch.equal(unpack_codes(whole, bits, 45), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("columns", [32, 96, 70])
def test_equals_compressed_tensors_words(bits: int, columns: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = _random_codes(5, columns, bits)
    signed = (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    words = helpers.pack_to_int32(signed, bits)
    assert torch.equal(words.view(torch.uint8), pack_codes(codes, bits))


def test_padding_bits_are_ignored_when_unpacking() -> None:
    codes = _random_codes(3, 9, 3)
    packed = pack_codes(codes, 3)
    packed[:, -1] |= 0xF8  # 27 of 32 bits are used
    assert torch.equal(unpack_codes(packed, 3, 9), codes)


def test_non_contiguous_codes() -> None:
    codes = _random_codes(16, 6, 2).t()
    assert torch.equal(pack_codes(codes, 2), pack_codes(codes.contiguous(), 2))


def test_no_rows() -> None:
    assert pack_codes(torch.empty(0, 5, dtype=torch.uint8), 3).shape == (0, 4)
    assert unpack_codes(torch.empty(0, 4, dtype=torch.uint8), 3, 5).shape == (0, 5)


def test_wrong_inputs_say_what_is_allowed() -> None:
    with pytest.raises(ValueError, match=r"bits: 5; allowed: \(1, 2, 3, 4, 8\)"):
        row_bytes(8, 5)
    with pytest.raises(ValueError, match="columns: 0"):
        row_bytes(0, 4)
    with pytest.raises(ValueError, match="value 4 does not fit 2 bits"):
        pack_codes(torch.tensor([[0, 4]], dtype=torch.uint8), 2)
    with pytest.raises(ValueError, match=r"allowed: uint8 \[rows, columns\]"):
        pack_codes(torch.zeros(2, 2), 4)
    with pytest.raises(ValueError, match=r"allowed: uint8 \[rows, 4\]"):
        unpack_codes(torch.zeros(2, 8, dtype=torch.uint8), 4, 8)
