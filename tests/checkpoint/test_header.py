"""The header parser against the safetensors library and against hostile files."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from moecompress.checkpoint.header import DTYPES, MAX_HEADER, read_header
from moecompress.errors import CheckpointError

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def file_bytes(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_agrees_with_the_library_on_every_dtype(tmp_path: Path) -> None:
    path = tmp_path / "all.safetensors"
    tensors = {
        f"t.{code}": torch.zeros(3, 2, dtype=torch.uint8).to(dtype)
        for code, dtype in DTYPES.items()
        if dtype.itemsize > 1 or code in ("U8", "I8", "BOOL")
    }
    tensors |= {f"t.{c}": torch.zeros(3, 2, dtype=torch.uint8).view(DTYPES[c]) for c in DTYPES if "F8" in c}
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 4)}
    save_file(tensors, path, metadata={"format": "pt"})
    found = read_header(path)
    content = path.read_bytes()
    assert set(found) == set(tensors) and set(DTYPES) <= {name[2:] for name in found}
    for name, tensor in tensors.items():
        info = found[name]
        assert (info.name, info.dtype, info.shape, info.file) == (name, tensor.dtype, tensor.shape, path)
        expected = bytes(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""
        assert content[info.offset : info.offset + info.nbytes] == expected
    offsets = [info.offset for info in found.values()]
    assert offsets == sorted(offsets)


HOSTILE = {
    "empty file": (b"", "has 0 bytes"),
    "only a length": ((5).to_bytes(8, "little"), "header should have 5"),
    "no header": (b"\0" * 9, "no header"),
    "length beyond the file": (b"\xff" * 8 + b"{}", "header should have 18446744073709551615"),
    "cut header": (file_bytes({"a": entry()}, b"\0" * 8)[:30], "whole safetensors file"),
    "cut data": (file_bytes({"a": entry()}, b"\0" * 7), "within the file's 7 bytes"),
    "trailing data": (file_bytes({"a": entry()}, b"\0" * 9), "tensors cover 8 bytes but the file holds 9"),
    "an array": (file_bytes(b"[]"), "no header"),
    "pickle": (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", "header should have"),
    "not json": (file_bytes(b"{a}"), "not valid JSON"),
    "not utf-8": (file_bytes(b'{"\xff": 1}'), "not valid JSON"),
    "NaN": (file_bytes(b'{"a": NaN}'), "NaN is not JSON"),
    "deep": (file_bytes(b'{"a":' * 90_000), "not valid JSON"),
    "long integer": (file_bytes(b'{"a":' + b"9" * 10_000 + b"}"), "not valid JSON"),
    "duplicate tensor": (
        file_bytes(b'{"a":' + json.dumps(entry()).encode() + b',"a":' + json.dumps(entry()).encode() + b"}"),
        "key 'a' appears twice",
    ),
    "duplicate key": (
        file_bytes(b'{"a":{"dtype":"F32","dtype":"F32","shape":[],"data_offsets":[0,4]}}', b"\0" * 4),
        "key 'dtype' appears twice",
    ),
    "metadata": (file_bytes({"__metadata__": {"format": 1}}), "__metadata__"),
    "metadata list": (file_bytes({"__metadata__": []}), "__metadata__"),
    "entry is a number": (file_bytes({"a": 1}), "tensor 'a': entry is 1"),
    "missing key": (file_bytes({"a": {"dtype": "F32"}}), "tensor 'a': entry is"),
    "extra key": (file_bytes({"a": entry() | {"x": 1}}, b"\0" * 8), "tensor 'a': entry is"),
    "unknown dtype": (file_bytes({"a": entry("F31")}, b"\0" * 8), "did you mean 'F32'"),
    "dtype is a list": (file_bytes({"a": entry() | {"dtype": []}}, b"\0" * 8), "dtype []"),
    "negative size": (file_bytes({"a": entry(shape=[-2])}, b"\0" * 8), "tensor 'a': shape [-2]"),
    "fractional size": (file_bytes({"a": entry(shape=[2.0])}, b"\0" * 8), "shape [2.0]"),
    "true as size": (file_bytes({"a": entry(shape=[True, 2])}, b"\0" * 8), "shape [True, 2]"),
    "huge size": (file_bytes({"a": entry(shape=[2**62, 4])}, b"\0" * 8), "shape"),
    "huge empty": (file_bytes({"a": entry(shape=[0, 2**62, 2**62], offsets=[0, 0])}), "shape"),
    "many dimensions": (file_bytes({"a": entry(shape=[1] * 100 + [2])}, b"\0" * 8), "shape"),
    "shape is text": (file_bytes({"a": entry(shape="2")}, b"\0" * 8), "shape '2'"),
    "size mismatch": (file_bytes({"a": entry(shape=[3])}, b"\0" * 8), "needs 12 bytes, data_offsets give 8"),
    "negative offset": (file_bytes({"a": entry(offsets=[-8, 0])}, b"\0" * 8), "data_offsets [-8, 0]"),
    "reversed": (file_bytes({"a": entry(offsets=[8, 0])}, b"\0" * 8), "ordered"),
    "beyond": (file_bytes({"a": entry(offsets=[2**40, 2**40 + 8])}, b"\0" * 8), "within the file's 8 bytes"),
    "three offsets": (file_bytes({"a": entry(offsets=[0, 4, 8])}, b"\0" * 8), "data_offsets [0, 4, 8]"),
    "overlap": (
        file_bytes({"a": entry(), "b": entry(offsets=[4, 12])}, b"\0" * 12),
        "tensor 'b': data_offsets [4, 12] overlaps",
    ),
    "twice the same": (file_bytes({"a": entry(), "b": entry()}, b"\0" * 8), "tensor 'b'"),
    "hole": (file_bytes({"a": entry(), "b": entry(offsets=[12, 20])}, b"\0" * 20), "tensor 'b': data_offs"),
    "hole in front": (file_bytes({"a": entry(offsets=[4, 12])}, b"\0" * 12), "leaves a hole"),
    "lone surrogate": (file_bytes(b'{"\\ud800": 1}'), "not valid Unicode"),
    "long name": (file_bytes({"x" * 100_000: 1}), "xxx..."),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_is_refused_with_its_name_and_the_reason(tmp_path: Path, case: str) -> None:
    content, reason = HOSTILE[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    text = str(caught.value)
    assert str(path) in text and reason in text
    assert len(text) < 2000 and text.isprintable()


def test_absent_directory_and_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening one for reading would wait for ever
    for path in (tmp_path / "none", tmp_path, tmp_path / "pipe"):
        with pytest.raises(CheckpointError, match=str(path)):
            read_header(path)


@pytest.mark.parametrize("length", [MAX_HEADER, MAX_HEADER + 1, 2**33])
def test_a_claimed_length_costs_no_memory(tmp_path: Path, length: int) -> None:
    path = tmp_path / "sparse.safetensors"
    with open(path, "wb") as file:
        file.write(length.to_bytes(8, "little"))
        file.truncate(2**34)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="no header"):
        read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def accepted_by_us_is_sound(path: Path) -> None:
    """Either CheckpointError, or the library reads the file too and sees the same tensors."""
    try:
        found = read_header(path)
    except CheckpointError as error:
        assert str(path) in str(error)
        return
    size = path.stat().st_size
    assert sum(info.nbytes for info in found.values()) <= size
    assert all(0 <= info.offset <= info.offset + info.nbytes <= size for info in found.values())
    try:
        with safe_open(path, "pt") as library:
            assert {n: tuple(library.get_slice(n).get_shape()) for n in library.keys()} == {
                name: info.shape for name, info in found.items()
            }
    except SafetensorError as error:  # it refuses nothing that we accept
        raise AssertionError(f"the library refuses: {error}") from error


@FUZZ
@given(data=st.data())
def test_corrupted_files(tmp_path: Path, data: st.DataObject) -> None:
    header = {"a": entry(), "b": entry("BF16", [3], [8, 14]), "__metadata__": {"format": "pt"}}
    content = bytearray(file_bytes(header, bytes(14)))
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["set", "cut", "insert", "digit"]))
        if kind == "set":
            content[position] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del content[position : position + data.draw(st.integers(1, 9))]
        elif kind == "insert":
            content[position:position] = data.draw(st.binary(min_size=1, max_size=9))
        else:
            digits = [i for i, byte in enumerate(content) if 48 <= byte <= 57]
            if digits:
                content[data.draw(st.sampled_from(digits))] = data.draw(st.integers(48, 57))
        if not content:
            break
    path = tmp_path / "fuzz.safetensors"
    path.write_bytes(content)
    accepted_by_us_is_sound(path)


SIZE = st.one_of(st.integers(-2, 5), st.sampled_from([2**31, 2**62, 2**63, 2**64, 10**30]))
JSON = st.recursive(
    st.none() | st.booleans() | SIZE | st.floats() | st.text(max_size=4) | st.sampled_from(["F32", "U8", "BF16"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "BF16", "F32"]) | JSON,
        "shape": st.lists(SIZE, max_size=3) | JSON,
        "data_offsets": st.tuples(SIZE, SIZE) | JSON,
    }
)


@FUZZ
@given(
    header=st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]) | st.text(max_size=3), ENTRY | JSON, max_size=3),
    size=st.integers(0, 24),
)
def test_invented_headers(tmp_path: Path, header: dict[str, Any], size: int) -> None:
    path = tmp_path / "fuzz.safetensors"
    path.write_bytes(file_bytes(header, bytes(size)))
    accepted_by_us_is_sound(path)
