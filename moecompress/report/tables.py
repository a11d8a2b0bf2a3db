"""Tables that the page, the markdown report and the model card share: headings and rows of plain text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import JsonValue

from moecompress.report.schema import AllocationInfo, Evaluation, LayerInfo, Report
from moecompress.report.text import NOT_MEASURED, data_size, difference, duration, number, percent, with_error

STATUS = {"tested": "tested", "by_rule": "by rule", "no": "no"}


@dataclass(frozen=True)
class Table:
    """Headings, rows of text, and how many columns from the left are names rather than numbers."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    names: int = 1


def quality_table(evaluation: Evaluation | None) -> Table | None:
    """What eval.json measured and how; None when there is no eval.json."""
    if evaluation is None:
        return None
    rows = [("perplexity", n, with_error(m.value, m.stderr)) for n, m in evaluation.perplexity.items()]
    rows += [("KL, nats per token", n, number(v)) for n, v in evaluation.kl.items()]
    rows += [("top-1 agreement", n, percent(v)) for n, v in evaluation.top1_agreement.items()]
    agreement = [v for v in evaluation.router_agreement if v is not None]
    if agreement:
        rows.append(("router agreement", "mean over layers", percent(sum(agreement) / len(agreement))))
    rows += [
        (task, metric, with_error(m.value, m.stderr))
        for task, found in evaluation.tasks.items()
        for metric, m in found.items()
    ]
    rows += [
        (task, f"{metric}, minus the reference's", difference(change.value, change.stderr, change.p))
        for task, found in evaluation.tasks_paired.items()
        for metric, change in found.items()
    ]
    how = (
        ("reference", evaluation.reference),
        ("reference of tasks", evaluation.tasks_reference),
        ("backend", evaluation.backend),
        ("samples", evaluation.samples),
    )
    rows += [("evaluated with", name, value) for name, value in how if value is not None]
    if evaluation.limit is not None:
        rows.append(("evaluated with", "limit", str(evaluation.limit)))
    return Table(("measure", "on", "value"), tuple(rows), names=2)


def pass_table(report: Report) -> Table:
    """One row per pass, in execution order."""
    rows = tuple(
        (p.name, p.paper or "", _parameters(p.parameters), duration(p.seconds), data_size(p.peak_rss_bytes))
        for p in report.passes
    )
    return Table(("pass", "paper", "parameters", "time", "peak memory"), rows, names=3)


def loadable_table(report: Report) -> Table:
    """Which programs load the output."""
    found = [(n, getattr(report.loadable, n)) for n in ("transformers", "vllm", "sglang")]
    rows = tuple((n, NOT_MEASURED, "") if x is None else (n, STATUS[x.status], x.reason) for n, x in found)
    return Table(("program", "loads it", "why"), rows, names=3)


def calibration_table(report: Report) -> Table:
    """One row per calibration set."""
    rows = tuple(
        (c.name, _parameters(c.origin), number(c.samples), number(c.length), _start(c.digest))
        for c in report.calibration
    )
    return Table(("set", "origin", "samples", "length", "sha256 of the tokens"), rows, names=2)


def environment_table(report: Report) -> Table:
    """Versions, seeds, hardware, backend and how often the run was resumed."""
    rows = [
        ("backend", report.backend or NOT_MEASURED),
        ("format", report.format or NOT_MEASURED),
        ("times resumed", number(report.resumed)),
        ("disk, planned", data_size(report.plan.disk_bytes)),
    ]
    rows += [(f"version: {name}", value) for name, value in report.versions.items()]
    rows += [(f"seed: {name}", str(value)) for name, value in report.seeds.items()]
    rows += [(f"hardware: {name}", _quantity(name, value)) for name, value in report.hardware.items()]
    return Table(("what", "value"), tuple(rows), names=2)


def layer_table(layers: Sequence[LayerInfo]) -> Table:
    """One row per MoE layer."""
    rows = tuple(
        (
            str(layer.layer),
            number(layer.experts_before),
            number(layer.experts_after),
            mean_bits(layer),
            number(layer.output_error),
            percent(layer.router.topk_agreement),
            number(layer.router.kl),
            number(layer.router.load_cv),
            str(sum(e.uncovered for e in layer.experts)) if layer.experts else NOT_MEASURED,
            number(layer.use.experts if layer.use else None, 3),
            data_size(round(layer.use.bytes) if layer.use else None),
        )
        for layer in layers
    )
    head = ("layer", "experts before", "experts after", "mean bits", "output error", "router top-k agreement")
    return Table((*head, "router KL", "load CV", "coverage problems", "experts per token", "bytes per token"), rows)


def notes_table(layers: Sequence[LayerInfo]) -> Table:
    """Experts kept whatever their score, and what passes say of their work; a row per layer that has either."""
    rows = []
    for layer in layers:
        safe = ", ".join(f"{e.id} ({e.protected})" for e in layer.experts if e.protected)
        if safe or layer.notes:
            rows.append((str(layer.layer), safe, _parameters({name: _short(v) for name, v in layer.notes.items()})))
    return Table(("layer", "protected experts", "notes"), tuple(rows), names=3)


def token_bytes(layers: Sequence[LayerInfo]) -> tuple[int | None, int | None]:
    """Bytes of routed experts that decoding one token reads, in the source and in the output; None = not measured."""
    found = [layer.use for layer in layers if layer.use is not None]
    if not found:
        return None, None
    return round(sum(use.bytes_before for use in found)), round(sum(use.bytes for use in found))


def token_experts(layers: Sequence[LayerInfo]) -> str:
    """`3.1 of 4.0 experts per token and layer (77.5 %)`; empty when not measured."""
    found = [layer.use for layer in layers if layer.use is not None]
    before, after = (sum(values) for values in zip(*((use.experts_before, use.experts) for use in found), strict=True))
    share = percent(after / before) if before else ""
    return f"{after / len(found):.2f} of {before / len(found):.2f} experts per token and layer ({share})"


def budget_table(allocation: AllocationInfo) -> Table:
    """What other budgets would have given, and this one."""
    rows = tuple(
        (
            row.budget,
            number(row.mean_bits, 3),
            number(row.stored_bits_per_weight, 3),
            number(row.predicted_kl if row.predicted_kl is not None else row.predicted_cost),
            row.problem or ("this run" if row is allocation else ""),
        )
        for row in (*allocation.curve, allocation)
    )
    cost = "predicted KL" if allocation.predicted_kl is not None else "predicted cost"
    return Table(("budget", "mean bits", "stored bits per weight", cost, ""), rows)


def mean_bits(layer: LayerInfo) -> str:
    """Mean code width over the stored projections of a layer, whatever their sizes."""
    found = [b for e in layer.experts for b in (e.bits.gate_up, e.bits.down) if b is not None]
    return number(sum(found) / len(found), 3) if found else NOT_MEASURED


def recipe_text(recipe: Mapping[str, JsonValue]) -> str:
    """The resolved recipe as YAML, keys in the recipe's own order."""
    import yaml

    return yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True, width=100)


def _short(value: JsonValue) -> JsonValue:
    return number(value) if isinstance(value, float) else value


def _start(digest: str | None) -> str:
    """The first 16 digits; the whole is in report.json."""
    return NOT_MEASURED if digest is None else digest[:16] + ("..." if len(digest) > 16 else "")


def _parameters(values: Mapping[str, JsonValue]) -> str:
    return ", ".join(f"{name}: {plain(value)}" for name, value in values.items())


def _quantity(name: str, value: JsonValue) -> str:
    return data_size(value) if name.endswith("_bytes") and isinstance(value, int) else plain(value)


def plain(value: JsonValue) -> str:
    """Text as it is, other values as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
