"""Files are readable by the library, streamed, hashed, atomic."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from moecompress.checkpoint import writer
from moecompress.checkpoint.header import read_header
from moecompress.checkpoint.index import INDEX, open_index
from moecompress.checkpoint.reader import TensorReader
from moecompress.checkpoint.writer import (
    Entry,
    atomic_write,
    copy_entry,
    tensor_entry,
    write_index,
    write_shard,
)
from moecompress.errors import OutputError, Stopped


def raw(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


def sample() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "z.codes": torch.randint(0, 256, (8, 64), generator=generator, dtype=torch.uint8),
        "guard": torch.zeros(1, dtype=torch.uint8),
        "a.scales": torch.randn(8, 8, generator=generator).to(torch.bfloat16),
        "odd": torch.randn(3, 5, generator=generator).to(torch.float16),
        "transposed": torch.randn(16, 8, generator=generator).T,
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "fp8": torch.randn(64, generator=generator).to(torch.float8_e4m3fn),
        "flags": torch.tensor([True, False]),
    }


def test_the_library_reads_it_back(tmp_path: Path) -> None:
    path = tmp_path / "m-1.safetensors"
    tensors = sample()
    record = write_shard(path, [tensor_entry(name, tensor) for name, tensor in tensors.items()])
    loaded = load_file(path)
    assert sorted(loaded) == sorted(tensors)
    with safe_open(path, "pt") as library:
        assert library.metadata() == {"format": "pt"}
        for name, tensor in tensors.items():
            for found in (loaded[name], library.get_tensor(name)):
                assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
                assert raw(found) == raw(tensor)
            expected = {"sha256": hashlib.sha256(raw(tensor)).hexdigest(), "nbytes": len(raw(tensor))}
            assert record.tensors[name] == expected
    assert record.file == path.name and record.bytes == path.stat().st_size
    assert os.listdir(tmp_path) == [path.name]


def test_order_is_kept_and_everything_is_aligned(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write_shard(path, [tensor_entry(name, tensor) for name, tensor in sample().items()])
    found = read_header(path)
    whole = [name for name in found if found[name].nbytes % 64 == 0 and found[name].nbytes]
    assert whole == ["z.codes", "a.scales", "transposed", "fp8"]  # as given, not by dtype or name
    assert found["z.codes"].offset % 4096 == 0
    assert all(found[name].offset % 64 == 0 for name in whole)
    assert all(info.offset % info.dtype.itemsize == 0 for info in found.values())


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.int64]),
            st.lists(st.integers(0, 9), max_size=3),
        ),
        max_size=6,
    )
)
def test_any_mixture_is_a_sound_file(
    tmp_path_factory: pytest.TempPathFactory, cases: list[tuple[torch.dtype, list[int]]]
) -> None:
    path = tmp_path_factory.mktemp("any") / "m.safetensors"
    tensors = {f"t{n}": (torch.rand(shape) * 99).to(dtype) for n, (dtype, shape) in enumerate(cases)}
    write_shard(path, [tensor_entry(name, tensor) for name, tensor in tensors.items()])
    loaded = load_file(path)
    assert {n: (t.dtype, t.shape, raw(t)) for n, t in loaded.items()} == {
        n: (t.dtype, t.shape, raw(t)) for n, t in tensors.items()
    }
    assert all(info.offset % info.dtype.itemsize == 0 for info in read_header(path).values())


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 24])
def test_pieces_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(writer, "_CHUNK", chunk)
    tensors = {"plain": torch.arange(60).reshape(3, 20), "turned": torch.arange(60).reshape(3, 20).T}
    write_shard(tmp_path / "m.safetensors", [tensor_entry(name, tensor) for name, tensor in tensors.items()])
    loaded = load_file(tmp_path / "m.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_contiguous_tensor_is_written_without_a_copy() -> None:
    tensor = torch.arange(1000, dtype=torch.float32)[100:]
    (piece,) = tensor_entry("t", tensor).data()
    tensor[0] = -1.0
    assert memoryview(piece).cast("B")[:4].tobytes() == raw(torch.tensor([-1.0]))


def test_one_tensor_at_a_time(tmp_path: Path) -> None:
    alive: list[int] = []

    def entry(number: int) -> Entry:
        def produce() -> Iterator[bytes]:
            alive.append(number)
            assert alive == [number]
            yield bytes([number]) * 32
            yield bytes([number]) * 32
            alive.remove(number)

        return Entry(f"t{number}", torch.uint8, (64,), produce)

    entries = [entry(number) for number in range(3)]
    assert not alive
    write_shard(tmp_path / "m.safetensors", entries)
    assert load_file(tmp_path / "m.safetensors")["t2"].tolist() == [2] * 64


def test_copies_are_byte_for_byte(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    codes = torch.arange(256, dtype=torch.uint8).reshape(16, 16).view(torch.float8_e4m3fn)  # NaN codes too
    tensors = {
        "w": codes,
        "w_scale_inv": torch.ones(1, 1),
        "n": torch.tensor([float("nan"), -0.0]),
        "s": torch.tensor(1),
    }
    save_file(tensors, source / "model.safetensors")
    with TensorReader(open_index(source)) as reader:
        record = write_shard(target / "model.safetensors", [copy_entry(reader, name) for name in tensors])
    write_index(target, [record])
    before, after = open_index(source).tensors, open_index(target).tensors
    for name in tensors:
        assert (before[name].dtype, before[name].shape) == (after[name].dtype, after[name].shape)
        data = [i.file.read_bytes()[i.offset : i.offset + i.nbytes] for i in (before[name], after[name])]
        assert data[0] == data[1] == raw(tensors[name])
        assert record.tensors[name]["sha256"] == hashlib.sha256(data[0]).hexdigest()


def test_equal_input_gives_equal_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shard(tmp_path / name, [tensor_entry(n, t) for n, t in sample().items()])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_index(tmp_path: Path) -> None:
    records = [
        write_shard(
            tmp_path / "m-2.safetensors", [tensor_entry("b", torch.zeros(5)), tensor_entry("z", torch.ones(1))]
        ),
        write_shard(tmp_path / "m-1.safetensors", [tensor_entry("a", torch.zeros(2, dtype=torch.bfloat16))]),
    ]
    write_index(tmp_path, records)
    content = json.loads((tmp_path / INDEX).read_text())
    assert content["metadata"] == {"total_size": 5 * 4 + 4 + 2 * 2}
    assert list(content["weight_map"].items()) == [
        ("a", "m-1.safetensors"),
        ("b", "m-2.safetensors"),
        ("z", "m-2.safetensors"),
    ]
    assert open_index(tmp_path).total_bytes == content["metadata"]["total_size"]
    with pytest.raises(ValueError, match="two shards"):
        write_index(tmp_path, [records[0], records[0]])


def full_disk_after(monkeypatch: pytest.MonkeyPatch, allowed: int, code: int = errno.ENOSPC) -> None:
    """os.write takes `allowed` bytes more, also in part, then fails as a full disk does."""
    real, left = os.write, allowed

    def write(descriptor: int, content: memoryview) -> int:
        nonlocal left
        if not left:
            raise OSError(code, os.strerror(code))
        count = real(descriptor, content[:left])
        left -= count
        return count

    monkeypatch.setattr(writer.os, "write", write)


@pytest.mark.parametrize("allowed", [0, 100, 4096, 4096 + 300])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_stops_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: int, code: int
) -> None:
    full_disk_after(monkeypatch, allowed, code)
    with pytest.raises(Stopped, match="m.safetensors.*--resume") as caught:
        write_shard(tmp_path / "m.safetensors", [tensor_entry(n, t) for n, t in sample().items()])
    assert caught.value.exit_code == 75
    assert os.listdir(tmp_path) == []


def test_full_disk_at_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer.os, "fsync", fsync)
    with pytest.raises(Stopped):
        atomic_write(tmp_path / "run.json", "{}")
    assert os.listdir(tmp_path) == []


def test_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atomic_write(tmp_path / "run.json", "old")
    full_disk_after(monkeypatch, 2)
    with pytest.raises(Stopped):
        atomic_write(tmp_path / "run.json", "newer")
    assert (tmp_path / "run.json").read_text() == "old" and os.listdir(tmp_path) == ["run.json"]


def test_partial_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(writer.os, "write", lambda descriptor, content: real(descriptor, content[:11]))
    tensor = torch.arange(100)
    write_shard(tmp_path / "m.safetensors", [tensor_entry("t", tensor)])
    assert torch.equal(load_file(tmp_path / "m.safetensors")["t"], tensor)


def test_any_interruption_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> Iterator[bytes]:
        yield bytes(32)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "m.safetensors", [Entry("t", torch.uint8, (64,), interrupted)])
    assert os.listdir(tmp_path) == []


def test_unwritable_place(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="none/m.safetensors: cannot be written"):
        write_shard(tmp_path / "none" / "m.safetensors", [])
    (tmp_path / "taken").mkdir()
    with pytest.raises(OutputError, match="taken"):
        atomic_write(tmp_path / "taken", "x")
    assert os.listdir(tmp_path) == ["taken"]


def test_leftover_of_a_killed_run_is_reused(tmp_path: Path) -> None:
    (tmp_path / ".run.json.tmp").write_text("a longer text from before")
    atomic_write(tmp_path / "run.json", "ä")
    assert (tmp_path / "run.json").read_bytes() == "ä".encode() and os.listdir(tmp_path) == ["run.json"]


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([tensor_entry("t", torch.zeros(1)), tensor_entry("t", torch.zeros(1))], "'t' is used twice"),
        ([tensor_entry("__metadata__", torch.zeros(1))], "reserved"),
        ([Entry("t", torch.uint8, (3,), lambda: [b"12"])], "'t' gave 2 bytes instead of 3"),
        ([Entry("t", torch.uint8, (3,), lambda: [b"12", b"34"])], "'t' gave 4 bytes instead of 3"),
        ([tensor_entry("t", torch.zeros(1, dtype=torch.complex128))], "safetensors has no torch.complex128"),
    ],
)
def test_wrong_entries(tmp_path: Path, entries: list[Entry], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        write_shard(tmp_path / "m.safetensors", entries)
    assert os.listdir(tmp_path) == []
