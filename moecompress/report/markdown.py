"""report.md: the same facts as the page, compact; experts as counts, not as rows."""

from __future__ import annotations

import re
from collections import Counter

from moecompress.report.schema import Evaluation, Report
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
from moecompress.report.text import NOT_MEASURED, against_plan, data_size, duration, number, smaller


def render_markdown(report: Report, evaluation: Evaluation | None) -> str:
    """The text of report.md."""
    quality = quality_table(evaluation)
    parts = [f"# {inline(report.model.name)}: compression report"]
    parts.append("\n".join(f"- **warning**: {inline(text)}" for text in report.warnings) or "No warnings.")
    parts.append(markdown_table(headline_table(report)))
    parts.append("## Quality\n\n" + (markdown_table(quality) if quality else f"{NOT_MEASURED}: there is no eval.json"))
    parts.append("## Size by component\n\n" + markdown_table(component_table(report)))
    parts.append("## Experts\n\n" + markdown_table(action_table(report)))
    notes = notes_table(report.layers)
    for title, table in (
        ("Passes", pass_table(report)),
        *([] if report.allocation is None else [("Budgets", budget_table(report.allocation))]),
        ("What loads it", loadable_table(report)),
        ("Layers", layer_table(report.layers)),
        *([("Notes on layers", notes)] if notes.rows else []),
        ("Calibration", calibration_table(report)),
        ("Versions, seeds, machine", environment_table(report)),
    ):
        parts.append(f"## {title}\n\n" + markdown_table(table))
    parts.append("## Recipe as resolved\n\n" + fenced(recipe_text(report.recipe), "yaml"))
    return "\n\n".join(parts) + "\n"


def headline_table(report: Report) -> Table:
    """Size, bits, memory and time; planned beside measured where there is a plan."""
    size, plan = report.size, report.plan
    ratio = smaller(size.source_bytes, size.output_bytes)
    touched = token_bytes(report.layers)
    used = token_experts(report.layers) if touched[1] is not None else ""
    rows = (
        ("size before", data_size(size.source_bytes), ""),
        ("size after", data_size(size.output_bytes), ratio or ""),
        ("bits per routed-expert weight", number(size.expert_bits_per_weight, 3), ""),
        ("bits per weight, whole model", number(size.total_bits_per_weight, 3), ""),
        *(
            [("expert bytes per decoded token", data_size(touched[1]), f"{data_size(touched[0])} before; {used}")]
            if touched[1] is not None
            else []
        ),
        (
            "peak memory",
            data_size(report.peak_rss_bytes),
            against_plan(report.peak_rss_bytes, plan.peak_bytes, data_size(plan.peak_bytes)),
        ),
        (
            "time",
            duration(report.seconds),
            against_plan(report.seconds, plan.seconds, duration(plan.seconds)),
        ),
    )
    return Table(("what", "value", ""), rows)


def component_table(report: Report) -> Table:
    """Bytes of each component before and after."""
    rows = tuple(
        (n.replace("_", " "), data_size(s.source_bytes), data_size(s.output_bytes))
        for n, s in report.size.components.items()
    )
    return Table(("component", "before", "after"), rows)


def action_table(report: Report) -> Table:
    """How many experts were treated how, and how many have a coverage problem."""
    experts = [e for layer in report.layers for e in layer.experts]
    count = Counter(re.sub(r"\d+", "n", e.action) for e in experts)  # "merged into 3" and "... 5" are one kind
    rows = [(action, str(n)) for action, n in sorted(count.items())]
    rows += [("coverage problem", str(sum(e.uncovered for e in experts)))] if experts else []
    return Table(("experts", "count"), tuple(rows))


def markdown_table(table: Table) -> str:
    """A pipe table with number columns to the right, or "not measured" when it has no rows."""
    if not table.rows:
        return NOT_MEASURED
    rule = [":--" if i < table.names else "--:" for i in range(len(table.head))]
    lines = [table.head, rule, *table.rows]
    return "\n".join("| " + " | ".join(inline(text) for text in line) + " |" for line in lines)


def inline(text: str) -> str:
    """`text` on one line with everything that Markdown or HTML would read as markup escaped."""
    flat = " ".join(text.split())
    return re.sub(r"([\\`*\[\]|~])", r"\\\1", flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
