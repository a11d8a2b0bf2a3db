"""A checkpoint directory: which tensor lies in which file. Only headers are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

from moecompress.checkpoint.header import MAX_HEADER, TensorInfo, read_header, short, strict_json
from moecompress.errors import CheckpointError, message

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_AGAIN = "download the checkpoint again"
_CONVERT = "convert it to safetensors (load it in transformers, then save_pretrained)"


@dataclass(frozen=True)
class CheckpointIndex:
    """All tensors of a checkpoint in file order. files: the shards, in the order they are first named."""

    root: Path
    tensors: Mapping[str, TensorInfo]
    files: tuple[Path, ...]

    @property
    def total_bytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())


def open_index(root: Path) -> CheckpointIndex:
    """Read the headers of `model.safetensors`, of the shards its index names, or of a single `*.safetensors`.

    Raises CheckpointError when the directory, the index and the shards do not agree, or a file is unsound.
    """
    if not root.is_dir():
        raise CheckpointError(message(str(root), "not a directory", "a checkpoint directory"))
    if not (root / INDEX).exists():
        return _without_index(root)
    weight_map = _weight_map(root)
    if (root / SINGLE).exists() and SINGLE not in weight_map.values():
        found = f"has both {SINGLE} and {INDEX}, and the index does not name {SINGLE}"
        raise CheckpointError(message(str(root), found, "one of them", "remove the one that is stale"))
    shards = list(dict.fromkeys(weight_map.values()))
    absent = [shard for shard in shards if not (root / shard).is_file()]
    if absent:
        found = f"names {len(absent)} files that are not there: {_some(absent)}"
        raise CheckpointError(message(str(root / INDEX), found, "", _AGAIN))
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for name, info in read_header(root / shard).items():
            if name in tensors:
                found = f"tensor '{short(name)}' is in {tensors[name].file.name} and in {shard}"
                raise CheckpointError(message(str(root), found, "each tensor once", _AGAIN))
            tensors[name] = info
    _agree(root, weight_map, tensors)
    return CheckpointIndex(root, tensors, tuple(root / shard for shard in shards))


def _without_index(root: Path) -> CheckpointIndex:
    found = sorted(path for path in root.glob("*.safetensors") if not path.name.startswith("."))
    if root / SINGLE in found:
        found = [root / SINGLE]
    if len(found) == 1:
        return CheckpointIndex(root, read_header(found[0]), (found[0],))
    if found:
        names = _some([path.name for path in found])
        problem = f"{len(found)} safetensors files ({names}) and no {INDEX}"
        raise CheckpointError(message(str(root), problem, f"an index, {SINGLE} or a single file", _AGAIN))
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in root.glob(pattern))
    problem = f"no safetensors files, only {_some(pickled)}" if pickled else "no safetensors files"
    raise CheckpointError(message(str(root), problem, f"{SINGLE} or {INDEX}", _CONVERT if pickled else _AGAIN))


def _weight_map(root: Path) -> dict[str, str]:
    """tensor name -> shard name from the index file, with shard names that stay inside the directory."""
    where = root / INDEX
    try:
        if where.stat().st_size > MAX_HEADER:
            raise CheckpointError(message(str(where), "too large", f"at most {MAX_HEADER} bytes", _AGAIN))
        raw = where.read_bytes()
    except OSError as error:
        raise CheckpointError(message(str(where), f"cannot be read ({error.strerror})")) from None
    weight_map = strict_json(raw, str(where)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        found = f"weight_map is {short(repr(weight_map))}"
        raise CheckpointError(message(str(where), found, "tensor name -> file name", _AGAIN))
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _stays_inside(shard):
            found = f"tensor '{short(name)}' in file {short(repr(shard))}"
            raise CheckpointError(message(str(where), found, "a file inside the directory", _AGAIN))
        if not shard.endswith(".safetensors"):
            found = f"tensor '{short(name)}' in file {short(repr(shard))}"
            raise CheckpointError(message(str(where), found, "*.safetensors files", _CONVERT))
    return weight_map


def _stays_inside(shard: str) -> bool:
    # The text alone decides: the Hugging Face cache keeps its files as symlinks pointing out of the directory.
    path = PurePosixPath(shard)
    return shard.isprintable() and "\\" not in shard and not path.is_absolute() and ".." not in path.parts


def _agree(root: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> None:
    missing = [name for name in weight_map if name not in tensors]
    if missing:
        found = f"{len(missing)} tensors named by the index are in no shard: {_some(missing)}"
        raise CheckpointError(message(str(root), found, "", _AGAIN))
    extra = [name for name in tensors if name not in weight_map]
    if extra:
        found = f"{len(extra)} tensors of the shards are not named by the index: {_some(extra)}"
        raise CheckpointError(message(str(root), found, "", _AGAIN))
    for name, shard in weight_map.items():
        if tensors[name].file != root / shard:
            found = f"tensor '{short(name)}' is in {tensors[name].file.name}, the index says {shard}"
            raise CheckpointError(message(str(root), found, "", _AGAIN))


def _some(names: list[str]) -> str:
    text = ", ".join(short(name) for name in names[:5])
    return f"{text}, ..." if len(names) > 5 else text


def main_dtype(index: CheckpointIndex) -> torch.dtype:
    """The float dtype that holds most bytes; FP8 reads as bfloat16, and packed bytes do not count."""
    totals: dict[torch.dtype, int] = {}
    for info in index.tensors.values():
        dtype = torch.bfloat16 if info.dtype == torch.float8_e4m3fn else info.dtype
        if dtype.is_floating_point:
            totals[dtype] = totals.get(dtype, 0) + info.nbytes
    if not totals:
        raise CheckpointError(message(str(index.root), "no float tensor in the checkpoint"))
    return max(totals, key=lambda dtype: totals[dtype])
