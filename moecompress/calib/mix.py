"""Calibration source `mix`: rows of several sources in given shares, interleaved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from moecompress.calib.options import Options
from moecompress.calib.spec import CalibrationSource, Rows, SourceSpec
from moecompress.errors import CalibrationError, message


def part_specs(spec: CalibrationSource) -> tuple[SourceSpec, ...]:
    """The parts of a mixture as sources of their own, each with its rows; () for every other source."""
    if spec.source != "mix":
        return ()
    parts = spec.options.parts
    counts = apportion([part.share for part in parts], spec.samples)
    return tuple(_part(part, rows, spec.length, spec.seed) for part, rows in zip(parts, counts, strict=True))


def apportion(shares: Sequence[float], total: int) -> list[int]:
    """Whole numbers that add up to `total`, by largest remainder (the first of equals)."""
    exact = [total * share / sum(shares) for share in shares]
    counts = [int(value) for value in exact]
    order = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


def mixed(spec: CalibrationSource, where: str, make: Callable[[SourceSpec, str], Rows]) -> Rows:
    """The parts' rows, each part spread evenly over the set. Raises CalibrationError for a part without a row."""
    parts = part_specs(spec)
    made = []
    for number, part in enumerate(parts):
        at = f"{where}: part {number + 1} ({part.source})"
        if part.samples == 0:
            found = f"share {spec.options.parts[number].share:g} of {spec.samples} rows is none"
            raise CalibrationError(message(at, found, then="raise `samples:` or its `share:`"))
        made.append(make(part, at))
    sizes = [len(rows.ids) for rows in made]
    places = sorted(((row + 0.5) / size, number, row) for number, size in enumerate(sizes) for row in range(size))
    ids = torch.stack([made[number].ids[row] for _, number, row in places])
    selected = None
    if any(rows.selected is not None for rows in made):
        marks = [torch.ones_like(r.ids, dtype=torch.bool) if r.selected is None else r.selected for r in made]
        selected = torch.stack([marks[number][row] for _, number, row in places])
    told = [{"rows": len(rows.ids), **rows.origin} for rows in made]
    return Rows(ids, {"source": "mix", "seed": spec.seed, "parts": told}, selected)


def _part(part: Any, rows: int, length: int, seed: int) -> SourceSpec:
    keys = {key: value for key, value in dict(part).items() if key in SourceSpec.__dataclass_fields__}
    options = part if isinstance(part, Options) else None
    return SourceSpec(**{**keys, "samples": rows, "length": length, "seed": seed, "options": options})
