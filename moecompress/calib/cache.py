"""Token ids on disk: one safetensors file and one JSON file per key, written atomically."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from moecompress.checkpoint.writer import atomic_write

FORMAT = 2  # part of every key: raise it when packing or a generator changes

_log = logging.getLogger(__name__)


def digest_of(ids: Tensor) -> str:
    """sha256 over the ids as little-endian int64, then the shape as little-endian int64."""
    digest = hashlib.sha256(ids.to(torch.int64).contiguous().numpy().astype("<i8").tobytes())
    for size in ids.shape:
        digest.update(size.to_bytes(8, "little"))
    return digest.hexdigest()


def cache_key(parts: Mapping[str, Any]) -> str:
    """A file name for everything that decides the ids."""
    return hashlib.sha256(json.dumps([FORMAT, dict(parts)], sort_keys=True).encode()).hexdigest()[:32]


def cache_read(root: Path, key: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The tensors of an entry and its facts; None when absent, or damaged (which is logged)."""
    entry, note = root / f"{key}.safetensors", root / f"{key}.json"
    if not (entry.is_file() and note.is_file()):
        return None
    try:
        tensors = load(entry.read_bytes())
        stored = json.loads(note.read_text(encoding="utf-8"))
        if _digests(tensors) == stored["digests"]:
            return tensors, stored["packing"]
        reason = "its hash does not match"
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        reason = str(error)
    _log.warning("calibration cache entry %s is damaged (%s) and is made again", entry, reason)
    return None


def cache_write(
    root: Path, key: str, tensors: Mapping[str, Tensor], parts: Mapping[str, Any], packing: Mapping[str, Any]
) -> None:
    """Store whole-number tensors and what they were made from; the JSON comes last and makes the entry valid."""
    root.mkdir(parents=True, exist_ok=True)
    atomic_write(root / f"{key}.safetensors", save({name: value.contiguous() for name, value in tensors.items()}))
    note = {"digests": _digests(tensors), "made_from": dict(parts), "packing": dict(packing)}
    atomic_write(root / f"{key}.json", json.dumps(note, indent=1, sort_keys=True) + "\n")


def _digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: digest_of(value) for name, value in sorted(tensors.items())}
