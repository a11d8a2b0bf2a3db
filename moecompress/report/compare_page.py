"""A comparison as Markdown and as one self-contained page."""

from __future__ import annotations

from markupsafe import Markup
from pydantic import JsonValue

from moecompress.report.compare import ALL, CLEAR, Comparison, Measure, Run, Verdict
from moecompress.report.html import TEMPLATES
from moecompress.report.markdown import inline, markdown_table
from moecompress.report.scatter import Point, scatter
from moecompress.report.schema import Metric
from moecompress.report.tables import Table, plain, token_bytes
from moecompress.report.text import NOT_MEASURED, data_size, difference, duration, number, probability, with_error

Key = tuple[Measure, str, str]


def comparison_html(found: Comparison) -> str:
    """The page as text; nothing is fetched, everything that comes from files is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    axis = quality_axis(found)
    return environment.get_template("compare.html.j2").render(
        runs=found.runs,
        warnings=found.warnings,
        main=main_table(found),
        axis=None if axis is None else axis_name(axis),
        plot=None if axis is None else size_quality(found, axis),
        missing=[] if axis is None else [run.name for run in found.runs if _value(run, axis) is None],
        differences=difference_table(found),
        recipes=recipe_table(found),
        base=found.runs[0].name,
        note=significance_note(found),
        not_measured=NOT_MEASURED,
    )


def comparison_markdown(found: Comparison) -> str:
    """The same tables; the plot is left to the page."""
    names = [inline(run.name) for run in found.runs]
    parts = [f"# Comparison of {', '.join(names)}"]
    parts += ["\n".join(f"- **warning**: {inline(text)}" for text in found.warnings)] if found.warnings else []
    parts.append(markdown_table(main_table(found)))
    parts.append(f"## Differences to {names[0]}\n\n{significance_note(found)}")
    parts.append(markdown_table(difference_table(found)))
    recipes = recipe_table(found)
    parts.append("## Recipe differences\n\n" + (markdown_table(recipes) if recipes.rows else "None."))
    return "\n\n".join(parts) + "\n"


def main_keys(found: Comparison) -> list[Key]:
    """Columns of quality: perplexity and KL over all texts (or on each, where there is one), every task's metrics."""
    keys = dict.fromkeys(key for run in found.runs for key in run.quality)
    whole = {measure for measure, on, _ in keys if on == ALL}
    return [key for key in keys if key[0] == "task" or key[1] == ALL or key[0] not in whole]


def main_table(found: Comparison) -> Table:
    """One row per run."""
    keys = main_keys(found)
    sizes = ("size", "bits per expert weight", "bits per weight", "expert bytes per token")
    head = ("", "run", "recipe", *sizes, "peak memory", "time")
    rows = tuple(
        (
            str(position),
            run.name,
            run.recipe,
            data_size(run.size),
            number(run.report.size.expert_bits_per_weight if run.report else None, 3),
            number(run.report.size.total_bits_per_weight if run.report else None, 3),
            data_size(token_bytes(run.report.layers)[1] if run.report else None),
            data_size(run.report.peak_rss_bytes if run.report else None),
            duration(run.report.seconds if run.report else None),
            *(_shown(run.quality.get(key)) for key in keys),
        )
        for position, run in enumerate(found.runs, start=1)
    )
    return Table((*head, *map(axis_name, keys)), rows, names=3)


def _shown(metric: Metric | None) -> str:
    return NOT_MEASURED if metric is None else with_error(metric.value, metric.stderr)


def axis_name(key: Key) -> str:
    """`KL (all)`, `piqa acc`."""
    measure, on, metric = key
    return f"{on} {metric}" if measure == "task" else f"{measure} ({on})"


def difference_table(found: Comparison) -> Table:
    """One row per run and measure: the paired difference to the base and whether it is clear."""
    rows = tuple(
        (
            v.run,
            axis_name((v.measure, v.on, v.metric)),
            difference(v.difference.value, v.difference.stderr, None),
            number(v.difference.z, 3) if v.difference.z is not None else "",
            _p(v),
            f"{v.difference.higher} : {v.difference.lower}",
            str(v.difference.count),
            v.verdict,
        )
        for v in found.verdicts
    )
    head = ("run", "measured", "difference", "z", "p", "higher : lower", "samples", "verdict")
    return Table(head, rows, names=2)


def _p(verdict: Verdict) -> str:
    test = {"sign": "sign test", "t": "t"}[verdict.difference.test]
    return "" if verdict.difference.p is None else f"{probability(verdict.difference.p)} ({test})"


def significance_note(found: Comparison) -> str:
    """How the differences were taken."""
    return (
        f"Each run minus {found.runs[0].name} on the same windows and documents, with the standard error of the paired "
        f"difference. Better and worse: p below {CLEAR:g} in the exact sign test where samples are right or wrong, in "
        f"a paired t-test elsewhere; {len(found.verdicts)} comparisons, not adjusted for their number."
    )


def recipe_table(found: Comparison) -> Table:
    """One row per recipe key that differs, one column per run."""
    rows = tuple((key, *map(_setting, values)) for key, values in found.recipes.items())
    return Table(("key", *(run.name for run in found.runs)), rows)


def _setting(value: JsonValue) -> str:
    return "none" if value is None else plain(value)


def quality_axis(found: Comparison) -> Key | None:
    """What the plot shows: KL, else perplexity, else a task, that at least two runs have; most runs first."""
    order = {"KL": 0, "perplexity": 1, "task": 2}
    counts = {key: sum(_value(run, key) is not None for run in found.runs) for key in main_keys(found)}
    usable = [key for key, count in counts.items() if count >= 2]
    return min(usable, key=lambda key: (-counts[key], order[key[0]]), default=None)


def _value(run: Run, key: Key) -> float | None:
    metric = run.quality.get(key)
    return None if metric is None else metric.value


def size_quality(found: Comparison, key: Key) -> Markup:
    """Size across, quality up, error bars of one standard error; points carry the numbers of the table."""
    sizes = ((2**30, "GiB"), (2**20, "MiB"), (1, "B"))
    unit, name = next((u, n) for u, n in sizes if found.runs[0].size >= u or u == 1)
    points = []
    for position, run in enumerate(found.runs, start=1):
        metric = run.quality.get(key)
        if metric is not None and metric.value is not None:
            title = f"{run.name}: {data_size(run.size)}, {axis_name(key)} {_shown(metric)}"
            colour = "s2" if position == 1 else "s1"
            points.append(Point(str(position), colour, title, run.size / unit, metric.value, metric.stderr))
    return scatter(points, f"{axis_name(key)} against size", lambda t: f"{t:g} {name}", lambda t: f"{t:.4g}")
