"""eval.json and the per-sample results beside it. What is measured later is added to what is already there."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moecompress.checkpoint.writer import atomic_write
from moecompress.errors import CheckpointError, message
from moecompress.numerics.significance import Difference, kind_of, paired
from moecompress.numerics.significance import samples as as_samples

FOLDER = "moecompress"  # inside an output directory
SAMPLES = "eval_samples"  # inside FOLDER: one file per task
WINDOWS = "eval_windows.jsonl"
_EMPTY: Mapping[str, Any] = {
    "perplexity": {},
    "kl": {},
    "top1_agreement": {},
    "router_agreement": [],
    "tasks": {},
    "samples": None,
    "backend": None,
    "versions": {},
    "limit": None,
    "reference": None,
}
_BY_TASK = ("tasks", "tasks_paired", "task_settings")  # one entry per task: measuring one keeps the others


def update_evaluation(path: Path, found: Mapping[str, Any], samples: str) -> dict[str, Any]:
    """Write `found` into `<path>/moecompress/eval.json`, keeping what else it has; returns the whole.

    samples: where this evaluation's per-sample results are; those of tasks keep the key `samples` once there are any.
    Numbers that are not finite become null. Raises CheckpointError when the file there is not JSON.
    """
    file = path / FOLDER / "eval.json"
    file.parent.mkdir(exist_ok=True)
    try:
        before = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise CheckpointError(message(str(file), f"is not JSON ({error})", then="remove it")) from None
    merged = {**_EMPTY, **before, **found}
    merged["samples"] = SAMPLES if merged["tasks"] else samples
    for name in _BY_TASK:
        old = {task: value for task, value in before.get(name, {}).items() if task not in found.get("tasks", {})}
        if old or name in merged:
            merged[name] = old | dict(found.get(name, {}))
    atomic_write(file, json.dumps(finite(merged), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return merged


def finite(value: Any) -> Any:
    """The same data with None for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_rows(path: Path, name: str, rows: Iterable[Mapping[str, Any]]) -> str:
    """Write rows as JSON lines to `<path>/moecompress/<name>` (made safe); returns the name inside that folder."""
    folder, _, leaf = name.rpartition("/")
    safe = re.sub(r"[^\w.,-]", "_", leaf)
    inside = f"{folder}/{safe}" if folder else safe
    file = path / FOLDER / inside
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(file, "".join(json.dumps(finite(row), ensure_ascii=False) + "\n" for row in rows))
    return inside


def read_rows(path: Path, name: str) -> list[dict[str, Any]]:
    """Rows of `<path>/moecompress/<name>`; none when there is no such file. Raises CheckpointError."""
    file = path / FOLDER / name
    if not file.is_file():
        return []
    try:
        rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    except ValueError as error:
        raise CheckpointError(message(str(file), f"is not JSON lines ({error})", then="evaluate again")) from None
    return [row for row in rows if isinstance(row, dict)]


def metric_name(metric: str, filter_name: str) -> str:
    """`acc`, or `exact_match,strict-match` where a filter of its own picked the answer."""
    return metric if filter_name == "none" else f"{metric},{filter_name}"


def by_document(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[tuple[str, int], Any]]:
    """Per metric: (hash of the document, how many equal ones came before) -> its value."""
    found: dict[str, dict[tuple[str, int], Any]] = {}
    for row in rows:
        for metric, value in row["metrics"].items():
            values = found.setdefault(metric_name(metric, row["filter"]), {})
            same = 0
            while (row["doc_hash"], same) in values:
                same += 1
            values[row["doc_hash"], same] = value
    return found


def compare_rows(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]], reported: Mapping[str, float | None]
) -> dict[str, Difference]:
    """Per metric, first minus second over the documents that both have.

    reported: the metrics' values on all of `first`, from which the kind of each is known; metrics that are no
    function of a mean over documents (F1, BLEU) are left out.
    """
    mine, theirs = by_document(first), by_document(second)
    found = {}
    for metric, values in mine.items():
        value, whole = reported.get(metric), as_samples(list(values.values()))
        kind = None if value is None or whole is None else kind_of(whole, value)
        shared = [key for key in values if key in theirs.get(metric, {})]
        a = as_samples([values[key] for key in shared])
        b = as_samples([theirs[metric][key] for key in shared]) if shared else None
        if kind is not None and a is not None and b is not None:
            found[metric] = paired(kind, a, b)
    return found


def as_json(found: Mapping[str, Difference]) -> dict[str, dict[str, Any]]:
    """Differences as eval.json holds them."""
    return {metric: asdict(difference) for metric, difference in found.items()}
