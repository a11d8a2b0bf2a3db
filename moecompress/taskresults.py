"""What lm-eval returns as values with standard errors, settings, and one small row per document."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moecompress.evalstore import by_document, metric_name
from moecompress.numerics.significance import estimate, kind_of, samples

Row = dict[str, Any]
Values = dict[str, dict[str, float | None]]


@dataclass(frozen=True)
class TaskResults:
    """tasks: task or group -> metric -> {value, stderr}. settings: how each task ran. rows: results per document.

    backend: who computed, of the models' packed weights.
    """

    tasks: Mapping[str, Values]
    settings: Mapping[str, Mapping[str, Any]]
    rows: Mapping[str, Sequence[Row]]
    backend: str = ""


def collect(raw: Mapping[str, Any], limit: int | None) -> TaskResults:
    """lm-eval's result dictionary as values with standard errors and one row per document and filter."""
    rows = {
        task: [
            {
                "doc_id": sample["doc_id"],
                "doc_hash": sample["doc_hash"],
                "filter": sample["filter"],
                "metrics": {name: _plain(sample[name]) for name in sample["metrics"]},
            }
            for sample in found
        ]
        for task, found in raw["samples"].items()
    }
    values: dict[str, Values] = {}
    for task, metrics in raw["results"].items():
        kept = ((name, value) for name, value in metrics.items() if "," in name and "_stderr," not in name)
        split = ((*name.split(",", 1), value) for name, value in kept)
        numbers = {metric_name(m, f): float(value) for m, f, value in split if isinstance(value, int | float)}
        values[task] = {name: {"value": value, "stderr": None} for name, value in numbers.items()}
        for name, per_document in by_document(rows.get(task, ())).items():
            taken = samples(list(per_document.values()))
            kind = None if taken is None or name not in numbers else kind_of(taken, numbers[name])
            if taken is not None and kind is not None:
                values[task][name]["stderr"] = estimate(kind, taken)[1]
    for group in raw.get("groups", {}):
        _group_errors(group, raw, values, frozenset())
    return TaskResults(values, {task: _settings(raw, task, limit) for task in rows}, rows)


def _group_errors(group: str, raw: Mapping[str, Any], values: dict[str, Values], above: frozenset[str]) -> None:
    """Standard errors of a group's means: its members are independent, weighted by size or equally."""
    members = raw["group_subtasks"].get(group, ())
    for inner in members:
        if inner in raw.get("groups", {}) and inner not in above:
            _group_errors(inner, raw, values, above | {group})
    for name, metric in values[group].items():
        found = [values[inner][name] for inner in members if name in values.get(inner, {})]
        sizes = [float(raw["results"][inner].get("sample_len") or 0) for inner in members if name in values[inner]]
        if any(row["value"] is None or row["stderr"] is None for row in found):
            continue
        for weights in (sizes, [1.0] * len(found)):
            whole = sum(weights) or math.nan
            mean = sum(w * (row["value"] or 0.0) for w, row in zip(weights, found, strict=True)) / whole
            if math.isclose(mean, metric["value"] or 0.0, rel_tol=1e-9, abs_tol=1e-12):
                parts = ((w * (row["stderr"] or 0.0)) ** 2 for w, row in zip(weights, found, strict=True))
                metric["stderr"] = math.sqrt(sum(parts)) / whole
                break


def _settings(raw: Mapping[str, Any], task: str, limit: int | None) -> dict[str, Any]:
    return {
        "limit": limit,
        "num_fewshot": raw["n-shot"].get(task),
        "documents": raw["n-samples"][task]["effective"],
        "version": raw["versions"].get(task),
        "higher_is_better": raw["higher_is_better"].get(task, {}),
    }


def _plain(value: Any) -> Any:
    """numpy's numbers and tuples as JSON has them; anything else as text."""
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    value = value.item() if hasattr(value, "item") and getattr(value, "size", 1) == 1 else value
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
