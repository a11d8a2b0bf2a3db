"""The Plan: resolved work as data, with its text and JSON forms. `plan.py` makes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moecompress.estimate import Estimate
from moecompress.passes.base import Pass
from moecompress.progress import duration
from moecompress.recipe import Recipe
from moecompress.stream.inventory import Owner
from moecompress.stream.model import StreamModel
from moecompress.types import ModelFacts, Scheme
from moecompress.writing import Format


@dataclass(frozen=True)
class Sweep:
    """One pass over all layers. steps: passes decided or applied, by position; barrier: decides at its end."""

    steps: tuple[int, ...]
    barrier: int | None = None


@dataclass(frozen=True)
class Plan:
    """The resolved work. actions: checkpoint tensor -> what happens to it. problems: empty when it can run."""

    recipe: Recipe = field(repr=False)
    root: Path
    passes: tuple[Pass, ...] = field(repr=False)  # the recipe's, fitted to the memory limit
    sweeps: tuple[Sweep, ...]
    output: Format
    schemes: Mapping[int, Mapping[str, Scheme]] = field(repr=False)
    owners: Mapping[str, Owner] = field(repr=False)
    actions: Mapping[str, str] = field(repr=False)
    estimate: Estimate
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    model: StreamModel = field(repr=False)
    stages: tuple[ModelFacts, ...] = field(repr=False)  # what every pass sees: fewer experts after a prune.*
    config: Mapping[str, Any] = field(repr=False)  # config.json of the output, without quantization
    dropped: frozenset[str] = field(repr=False)  # checkpoint tensors outside the layers that are left out

    def render(self) -> str:
        """The plan as text for a terminal."""
        return _render(self)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON-able data; `tensors` maps every checkpoint tensor to its action."""
        return _to_json(self)


def _to_json(plan: Plan) -> dict[str, Any]:
    """Everything the plan knows; `tensors` maps each checkpoint tensor to what happens to it."""
    cost = plan.estimate
    return {
        "schema": "moecompress.plan/1",
        "model": plan.recipe.model,
        "model_type": plan.model.facts.model_type,
        "format": plan.output,
        "sweeps": [
            {"passes": [plan.recipe.passes[p].name for p in sweep.steps], "barrier": _barrier(plan, sweep.barrier)}
            for sweep in plan.sweeps
        ],
        "problems": list(plan.problems),
        "warnings": list(plan.warnings),
        "size": {
            "source_bytes": plan.model.facts.source_bytes,
            "output_bytes": cost.output_bytes,
            "expert_bits_per_weight": cost.expert_bits_per_weight,
            "total_bits_per_weight": cost.total_bits_per_weight,
            "components": {
                role: {"source_bytes": a, "output_bytes": b} for role, (a, b) in cost.component_bytes.items()
            },
        },
        "plan": {"peak_bytes": cost.peak_bytes, "disk_bytes": cost.disk_bytes, "seconds": cost.seconds},
        "peak_parts": dict(cost.parts),
        "tensors": dict(plan.actions),
    }


def _render(plan: Plan) -> str:
    """The plan for a terminal: problems first, then work, sizes, memory, disk, time."""
    cost, facts = plan.estimate, plan.model.facts
    lines = []
    if plan.problems:
        lines += [f"{len(plan.problems)} problem(s):", *(f"  {problem}" for problem in plan.problems), ""]
    sites = facts.moe_layers
    first = sites[0].site
    assert first is not None
    lines += [
        f"model     {plan.recipe.model} ({facts.architecture}), {len(facts.layers)} layers, {len(sites)} with experts: "
        f"{first.num_experts} experts, top-{first.top_k}, {first.hidden} x {first.width}",
        f"output    {plan.recipe.out} ({plan.output})",
    ]
    for number, sweep in enumerate(plan.sweeps, start=1):
        names = " > ".join(plan.recipe.passes[p].name for p in sweep.steps) or "collect"
        barrier = _barrier(plan, sweep.barrier)
        lines.append(f"sweep {number}   {names}" + (f" > {barrier} decides" if barrier else ""))
    lines += [f"warning   {warning}" for warning in plan.warnings]
    lines += ["", f"{'component':<18}{'source':>12}{'output':>12}"]
    lines += [f"{role:<18}{_size(a):>12}{_size(b):>12}" for role, (a, b) in cost.component_bytes.items()]
    lines += [f"{'total':<18}{_size(facts.source_bytes):>12}{_size(cost.output_bytes):>12}"]
    bits = cost.expert_bits_per_weight
    lines += [f"bits per weight: experts {bits:.3f}, all {cost.total_bits_per_weight:.3f}" if bits else ""]
    lines += ["", "tensors"]
    lines += [f"  {count:>7}  {action}" for action, count in sorted(Counter(plan.actions.values()).items())]
    lines += ["", f"peak memory about {_size(cost.peak_bytes)}"]
    lines += [f"  {_size(size):>12}  {part}" for part, size in cost.parts.items()]
    lines += [
        f"disk        about {_size(cost.disk_bytes)} while it runs",
        f"time        about {duration(cost.seconds)}",
    ]
    return "\n".join(lines)


def _barrier(plan: Plan, position: int | None) -> str | None:
    return None if position is None else plan.recipe.passes[position].name


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"
