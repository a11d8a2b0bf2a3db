"""A directory whose index and shards agree is opened; every disagreement is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moecompress.checkpoint.index import INDEX, SINGLE, open_index
from moecompress.errors import CheckpointError


def make(root: Path, shards: dict[str, list[str]], weight_map: dict[str, object] | None = None) -> Path:
    for shard, names in shards.items():
        (root / shard).parent.mkdir(parents=True, exist_ok=True)
        save_file({name: torch.arange(3.0) for name in names}, root / shard)
    if weight_map is None:
        weight_map = {name: shard for shard, names in shards.items() for name in names}
    (root / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return root


def test_shards_with_index(tmp_path: Path) -> None:
    make(tmp_path, {"m-1.safetensors": ["a", "b"], "sub/m-2.safetensors": ["c"]})
    save_file({"other": torch.zeros(1)}, tmp_path / "consolidated.safetensors")  # not named: not ours
    index = open_index(tmp_path)
    assert list(index.tensors) == ["a", "b", "c"]
    assert index.files == (tmp_path / "m-1.safetensors", tmp_path / "sub/m-2.safetensors")
    assert index.tensors["c"].file == index.files[1]
    assert index.total_bytes == 3 * 3 * 4


@pytest.mark.parametrize("name", [SINGLE, "layer.safetensors"])
def test_single_file(tmp_path: Path, name: str) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / name)
    assert open_index(tmp_path).files == (tmp_path / name,)


def test_model_safetensors_goes_before_others(tmp_path: Path) -> None:
    for name in (SINGLE, "extra.safetensors"):
        save_file({name: torch.zeros(2)}, tmp_path / name)
    assert list(open_index(tmp_path).tensors) == [SINGLE]


def test_links_out_of_the_directory_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    make(blobs, {"m-1.safetensors": ["a"]})
    snapshot.mkdir()
    for name in ("m-1.safetensors", INDEX):
        (snapshot / name).symlink_to(Path("../blobs") / name)
    assert list(open_index(snapshot).tensors) == ["a"]
    (blobs / "m-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match="m-1.safetensors"):
        open_index(snapshot)


def refused(root: Path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_index(root)
    assert all(part in str(caught.value) for part in (str(root), *parts)), str(caught.value)


def test_nothing_there(tmp_path: Path) -> None:
    refused(tmp_path / "none", "not a directory")
    refused(tmp_path, "no safetensors files", SINGLE)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    refused(tmp_path, "pytorch_model.bin", "convert")


def test_several_files_without_index(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({name: torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    refused(tmp_path, "2 safetensors files (a.safetensors, b.safetensors)", INDEX)


def test_absent_shard(tmp_path: Path) -> None:
    make(tmp_path, {"m-1.safetensors": ["a"], "m-2.safetensors": ["b"]})
    (tmp_path / "m-2.safetensors").unlink()
    refused(tmp_path, "1 files that are not there: m-2.safetensors")


@pytest.mark.parametrize(
    "shard",
    [
        "../m-1.safetensors",
        "/etc/m.safetensors",
        "x/../../m.safetensors",
        "..\\m.safetensors",
        "a\0.safetensors",
        "",
        3,
    ],
)
def test_shard_outside_the_directory(tmp_path: Path, shard: object) -> None:
    refused(make(tmp_path / "c", {"m-1.safetensors": ["a"]}, {"a": shard}), "tensor 'a'", "file")


def test_index_of_pickles(tmp_path: Path) -> None:
    refused(make(tmp_path, {"m-1.safetensors": ["a"]}, {"a": "pytorch_model.bin"}), "convert")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": 3}', '{"weight_map": {}}', "{}"])
def test_broken_index(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    refused(tmp_path, INDEX)


def test_same_key_twice_in_index(tmp_path: Path) -> None:
    make(tmp_path, {"m-1.safetensors": ["a"]})
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "m-1.safetensors", "a": "m-2.safetensors"}}')
    refused(tmp_path, "'a' appears twice")


def test_tensor_in_index_but_in_no_shard(tmp_path: Path) -> None:
    make(tmp_path, {"m-1.safetensors": ["a"]}, {"a": "m-1.safetensors", "ghost": "m-1.safetensors"})
    refused(tmp_path, "ghost", "in no shard")


def test_tensor_in_shard_but_not_in_index(tmp_path: Path) -> None:
    make(tmp_path, {"m-1.safetensors": ["a", "stray"]}, {"a": "m-1.safetensors"})
    refused(tmp_path, "stray", "not named")


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    make(tmp_path, {"m-1.safetensors": ["a", "c"], "m-2.safetensors": ["a", "b"]})
    refused(tmp_path, "'a'", "m-1.safetensors", "m-2.safetensors", "once")


def test_tensor_in_another_shard(tmp_path: Path) -> None:
    files = {"m-1.safetensors": ["a"], "m-2.safetensors": ["b"]}
    make(tmp_path, files, {"b": "m-1.safetensors", "a": "m-2.safetensors"})
    refused(tmp_path, "'b' is in m-2.safetensors, the index says m-1.safetensors")


def test_single_file_and_foreign_index(tmp_path: Path) -> None:
    make(tmp_path, {"m-1.safetensors": ["a"]})
    save_file({"a": torch.zeros(3)}, tmp_path / SINGLE)
    refused(tmp_path, "has both")
    (tmp_path / "m-1.safetensors").unlink()
    assert open_index(make(tmp_path, {SINGLE: ["a"]})).files == (tmp_path / SINGLE,)


def test_truncated_shard(tmp_path: Path) -> None:
    make(tmp_path, {"m-1.safetensors": ["a"]})
    path = tmp_path / "m-1.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refused(tmp_path, "m-1.safetensors", "tensor 'a'")
