"""report.html: one self-contained page (style, script and drawings inside; nothing is fetched)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from moecompress.report.maps import bit_maps, error_map, token_map
from moecompress.report.scatter import Point, scatter
from moecompress.report.schema import AllocationInfo, Evaluation, ExpertInfo, LayerInfo, Report
from moecompress.report.svg import Line, Segment, line_chart, stacked_bar
from moecompress.report.tables import (
    Table,
    budget_table,
    calibration_table,
    environment_table,
    layer_table,
    loadable_table,
    notes_table,
    pass_table,
    quality_table,
    recipe_text,
    token_bytes,
    token_experts,
)
from moecompress.report.text import (
    NOT_MEASURED,
    against_plan,
    data_size,
    duration,
    number,
    percent,
    smaller,
    with_error,
)

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Tile:
    """A headline number: label, value, and a smaller line under it."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Chart:
    """A drawing with heading and legend (colour class, name); `drawing` is None when not measured."""

    title: str
    note: str
    drawing: Markup | None
    legend: tuple[tuple[str, str], ...] = ()


def render_html(report: Report, evaluation: Evaluation | None) -> str:
    """The page as text. Everything that comes from the report is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(_context(report, evaluation))


def _context(report: Report, evaluation: Evaluation | None) -> dict[str, Any]:
    return {
        "report": report,
        "tiles": tiles(report, evaluation),
        "quality": quality_table(evaluation),
        "bars": _bars(report),
        "components": _components(report),
        "charts": [*_charts(report.layers, evaluation), *_budget_chart(report.allocation)],
        "maps": [
            drawn
            for drawn in (token_map(report.layers), *bit_maps(report.layers), error_map(report.layers))
            if drawn is not None
        ],
        "tables": _tables(report),
        "layers": layer_table(report.layers),
        "experts": [(layer, _expert_rows(layer.experts)) for layer in report.layers if layer.experts],
        "recipe": recipe_text(report.recipe),
        "not_measured": NOT_MEASURED,
    }


def tiles(report: Report, evaluation: Evaluation | None) -> list[Tile]:
    """The headline numbers."""
    size, plan = report.size, report.plan
    perplexity = evaluation.perplexity if evaluation else {}
    kl = evaluation.kl if evaluation else {}
    first, metric = next(iter(perplexity.items()), ("", None))
    kl_name, kl_value = next(iter(kl.items()), ("", None))
    more = f" (+{len(perplexity) - 1} more below)" if len(perplexity) > 1 else ""
    touched = token_bytes(report.layers)
    return [
        Tile(
            "Size",
            _before_after(size.source_bytes, size.output_bytes),
            smaller(size.source_bytes, size.output_bytes) or "",
        ),
        Tile(
            "Bits per routed-expert weight",
            number(size.expert_bits_per_weight, 3),
            f"whole model: {number(size.total_bits_per_weight, 3)}",
        ),
        *(
            [Tile("Expert bytes per decoded token", _before_after(*touched), token_experts(report.layers))]
            if touched[1] is not None
            else []
        ),
        Tile("Perplexity", with_error(metric.value, metric.stderr) if metric else NOT_MEASURED, first + more),
        Tile("KL to the reference", number(kl_value), f"nats per token, {kl_name}" if kl_name else ""),
        Tile(
            "Peak memory",
            data_size(report.peak_rss_bytes),
            against_plan(report.peak_rss_bytes, plan.peak_bytes, data_size(plan.peak_bytes)),
        ),
        Tile(
            "Time",
            duration(report.seconds),
            against_plan(report.seconds, plan.seconds, duration(plan.seconds)),
        ),
    ]


def _before_after(before: int | None, after: int | None) -> str:
    if before is None and after is None:
        return NOT_MEASURED
    return " → ".join(data_size(n).replace(" ", "\u00a0") for n in (before, after))  # a line breaks at the arrow only


def _bars(report: Report) -> list[tuple[str, str, Markup]]:
    """(before | after, bytes, bar), both on the scale of the larger one."""
    parts = report.size.components
    before = {name: size.source_bytes for name, size in parts.items()}
    after = {name: size.output_bytes for name, size in parts.items()}
    full = max(sum(before.values()), sum(after.values()))
    if not full:
        return []
    return [
        (
            label,
            data_size(sum(sizes.values())),
            stacked_bar(
                [Segment(f"k-{n}", f"{_words(n)}: {data_size(b)}", b / full) for n, b in sizes.items() if b],
                f"size by component, {label}",
            ),
        )
        for label, sizes in (("before", before), ("after", after))
    ]


def _components(report: Report) -> list[tuple[str, str, str, str, str]]:
    """(colour class, component, before, after, ratio)."""
    return [
        (
            f"k-{name}",
            _words(name),
            data_size(size.source_bytes),
            data_size(size.output_bytes),
            f"{size.source_bytes / size.output_bytes:.2f}x" if size.output_bytes else "",
        )
        for name, size in report.size.components.items()
        if size.source_bytes or size.output_bytes
    ]


def _words(name: str) -> str:
    return name.replace("_", " ")


def _charts(layers: Sequence[LayerInfo], evaluation: Evaluation | None) -> list[Chart]:
    labels = [str(layer.layer) for layer in layers]
    errors = Line("s1", "output error", [layer.output_error for layer in layers])
    agreement = [Line("s1", "calibration tokens", [layer.router.topk_agreement for layer in layers])]
    held = evaluation.router_agreement if evaluation else ()
    if held and len(held) == len(layers):
        agreement.append(Line("s2", "evaluation tokens", held))
    used = [
        Line("s1", "source", [layer.use.experts_before if layer.use else None for layer in layers]),
        Line("s2", "output", [layer.use.experts if layer.use else None for layer in layers]),
    ]
    return [
        Chart(
            "Output error per layer",
            "Relative error of the layer's output against the original.",
            line_chart([errors], labels, "{:.4g}".format) if _known([errors]) else None,
        ),
        Chart(
            "Router agreement per layer",
            "Share of the experts chosen by the original router that are still chosen.",
            line_chart(agreement, labels, percent, fraction=True) if _known(agreement) else None,
            tuple((line.colour, line.name) for line in agreement) if len(agreement) > 1 else (),
        ),
        Chart(
            "Experts used per token and layer",
            "Mean over calibration tokens; the others of a token's experts leave the dispatch.",
            line_chart(used, labels, "{:.3g}".format) if _known(used) else None,
            tuple((line.colour, line.name) for line in used),
        ),
    ]


def _budget_chart(allocation: AllocationInfo | None) -> list[Chart]:
    """Predicted cost against stored bits, with this run's budget in the other colour."""
    if allocation is None:
        return []
    shown = "predicted KL" if allocation.predicted_kl is not None else "predicted cost"
    points = []
    for row in (*allocation.curve, allocation):
        cost = row.predicted_kl if row.predicted_kl is not None else row.predicted_cost
        if cost is not None and row.stored_bits_per_weight is not None:
            own = row is allocation
            title = f"{row.budget}: {row.stored_bits_per_weight:.3f} stored bits per weight, {shown} {number(cost)}"
            points.append(
                Point("this run" if own else "", "s2" if own else "s1", title, row.stored_bits_per_weight, cost)
            )
    drawing = scatter(points, f"{shown} against stored bits per weight", "{:g} bpw".format, "{:.4g}".format)
    note = f"{shown[0].upper()}{shown[1:]} of other budgets, from the same statistics, against stored bits per weight."
    return [Chart(f"Budget curve of {allocation.name}", note, drawing if points else None)]


def _known(lines: Sequence[Line]) -> bool:
    return any(value is not None for line in lines for value in line.values)


def _tables(report: Report) -> list[tuple[str, Table]]:
    budgets = [] if report.allocation is None else [("Budgets", budget_table(report.allocation))]
    notes = notes_table(report.layers)
    return [
        ("Passes", pass_table(report)),
        *budgets,
        *([("Notes on layers", notes)] if notes.rows else []),
        ("What loads it", loadable_table(report)),
        ("Calibration", calibration_table(report)),
        ("Versions, seeds, machine", environment_table(report)),
    ]


def _expert_rows(experts: Sequence[ExpertInfo]) -> list[tuple[str, tuple[str, ...]]]:
    """(row class, cells): id, tokens, importance, bits gate_up, bits down, error, action, fallback."""

    def bits(expert: ExpertInfo, value: int | None) -> str:
        return "removed" if expert.removed else number(value)

    return [
        (
            "bad" if e.uncovered else "gone" if e.removed else "",
            (
                str(e.id),
                number(e.tokens),
                number(e.importance),
                bits(e, e.bits.gate_up),
                bits(e, e.bits.down),
                "" if e.removed and e.error is None else number(e.error),
                e.action,
                e.fallback or "",
            ),
        )
        for e in experts
    ]
