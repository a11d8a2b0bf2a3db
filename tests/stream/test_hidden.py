"""The hidden-state store: what was written is read, in any pieces; a full disk stops the run; cut files are noticed."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import engine
import families
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moecompress.errors import Stopped
from moecompress.stream.hidden import HiddenStore
from moecompress.stream.model import open_model
from moecompress.stream.streams import batches_of


@settings(max_examples=25)
@given(
    rows=st.integers(1, 9),
    tail=st.sampled_from([(), (3,), (5, 4), (2, 3, 4)]),
    cuts=st.lists(st.integers(0, 9), max_size=4),
    seed=st.integers(0, 99),
)
def test_what_is_written_in_pieces_is_read_in_any_other(
    tmp_path_factory: pytest.TempPathFactory, rows: int, tail: tuple[int, ...], cuts: list[int], seed: int
) -> None:
    values = torch.randn(rows, *tail, generator=torch.Generator().manual_seed(seed))
    store = HiddenStore(tmp_path_factory.mktemp("store") / "x", values.shape)
    store.create()
    assert os.path.getsize(store.path) == store.nbytes == values.numel() * 4
    edges = sorted({0, rows, *(cut for cut in cuts if cut < rows)})
    for start, stop in reversed(list(zip(edges, edges[1:], strict=False))):
        store.write(start, values[start:stop])
    for start in range(rows):
        for stop in range(start + 1, rows + 1):
            assert torch.equal(store.read(start, stop), values[start:stop])
    store.remove()
    store.remove()
    assert not store.path.exists()


def test_other_dtypes_are_stored_as_float32(tmp_path: Path) -> None:
    store = HiddenStore(tmp_path / "deep" / "x", (2, 3))
    store.create()
    values = torch.randn(3, 2).T.to(torch.bfloat16)
    store.write(0, values)
    assert torch.equal(store.read(0, 2), values.float())


def test_creating_again_empties_the_file(tmp_path: Path) -> None:
    store = HiddenStore(tmp_path / "x", (2, 3))
    for _ in range(2):
        store.create()
        assert torch.equal(store.read(0, 2), torch.zeros(2, 3))
        store.write(0, torch.ones(2, 3))


@pytest.mark.parametrize(("start", "shape"), [(0, (2, 4)), (2, (2, 3)), (0, (4, 3)), (0, (2, 3, 1))])
def test_rows_that_do_not_fit_are_refused(start: int, shape: tuple[int, ...], tmp_path: Path) -> None:
    store = HiddenStore(tmp_path / "x", (3, 3))
    store.create()
    with pytest.raises(ValueError, match=r"inside \(3, 3\)"):
        store.write(start, torch.zeros(shape))


def test_a_file_cut_short_is_noticed(tmp_path: Path) -> None:
    store = HiddenStore(tmp_path / "x", (3, 4))
    store.create()
    os.truncate(store.path, 40)
    with pytest.raises(OSError, match="shorter than 48 bytes"):
        store.read(2, 3)


def full(*_: Any) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = HiddenStore(tmp_path / "x", (3, 4))
    store.create()
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(Stopped, match="No space left") as caught:
        store.write(0, torch.zeros(1, 4))
    assert caught.value.exit_code == 75
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(Stopped, match="cannot reserve 48 bytes"):
        store.create()


def test_short_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, values, write = HiddenStore(tmp_path / "x", (3, 4)), torch.randn(3, 4), os.pwrite
    store.create()
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: write(descriptor, bytes(data)[:7], offset))
    store.write(0, values)
    assert torch.equal(store.read(0, 3), values)


@pytest.mark.parametrize("limit", [1, 5, 10, 12, 35, 1000])
def test_batches_hold_every_sequence_once_and_in_order(limit: int) -> None:
    ids = torch.arange(35).reshape(7, 5)
    batches = batches_of(ids, limit)
    assert torch.equal(torch.cat([batch.ids for batch in batches]), ids)
    assert [row for batch in batches for row in batch.rows] == list(range(7))
    assert all(batch.ids.numel() <= max(limit, 5) for batch in batches)


def test_two_generations_per_stream(tmp_path: Path) -> None:
    """A layer writes beside what it reads, so that a killed run finds its input."""
    model = open_model(families.save_tiny("mixtral", tmp_path / "model"))
    run = engine.token_run(model, engine.random_ids(3, 8), tmp_path, streams=("original", "compressed"))
    before = run.store("original", 0).read(0, 3)
    engine.through_layers(model, run, 1)
    assert torch.equal(run.store("original", 0).read(0, 3), before)
    assert not torch.equal(run.store("original", 1).read(0, 3), before)
    assert torch.equal(run.store("compressed", 0).read(0, 3), before)
    assert run.store("original", 2).path == run.store("original", 0).path
    assert len({run.store(stream, layer).path for stream in ("original", "compressed") for layer in (0, 1)}) == 4  # type: ignore[arg-type]
