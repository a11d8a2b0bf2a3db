"""What a run depends on. A stopped run may only be continued by one with the same fingerprint."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from moecompress.calib.mix import part_specs
from moecompress.checkpoint.header import MAX_HEADER
from moecompress.recipe import Recipe, recipe_data

PACKAGES = ("moecompress", "torch", "transformers", "tokenizers", "safetensors", "datasets", "numpy", "scipy")
MAX_HASHED = 64 << 20  # larger files that are not safetensors count by size and time only
_ABSENT = "absent"


def fingerprint(recipe: Recipe, source: Path) -> dict[str, Any]:
    """JSON-able: the resolved recipe, the files of `source` and of the calibration, versions, torch threads.

    source: the local directory of the model's checkpoint.
    """
    sources = [one for spec in recipe.calibration.values() for one in part_specs(spec) or (spec,)]
    texts = [Path(file) for one in sources for file in one.files or ()]
    return {
        "recipe": recipe_data(recipe),
        "source": {path.name: file_facts(path) for path in sorted(source.iterdir()) if path.is_file()},
        "calibration": {str(path): file_facts(path) for path in texts if path.is_file()},
        "versions": versions(),
        "threads": torch.get_num_threads(),
    }


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Installed versions of Python and of the packages that can change a result; "absent" where there is none."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = _ABSENT
    return found


def file_facts(path: Path) -> dict[str, Any]:
    """Size in bytes, mtime_ns and sha256: of a safetensors file's header, of other files up to 64 MiB as a whole."""
    status = path.stat()
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            head = file.read(8)
            head += file.read(min(int.from_bytes(head, "little"), MAX_HEADER))
            digest = hashlib.sha256(head).hexdigest()
        elif status.st_size <= MAX_HASHED:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        else:
            digest = ""
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": digest}


def differences(before: Any, now: Any, path: str = "") -> list[str]:
    """One line for every value that is not the same: `versions.torch: 2.12 before, 2.13 now`."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = [*before, *(key for key in now if key not in before)]
        inner = ((before.get(k, _ABSENT), now.get(k, _ABSENT), f"{path}.{k}" if path else str(k)) for k in keys)
        return [line for old, new, place in inner for line in differences(old, new, place)]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        rows = enumerate(zip(before, now, strict=True))
        return [line for i, (old, new) in rows for line in differences(old, new, f"{path}[{i}]")]
    same = before == now and type(before) is type(now)  # 1 is not true
    return [] if same else [f"{path}: {before} before, {now} now"]
