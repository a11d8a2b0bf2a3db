"""Several output directories side by side: sizes, quality, significance of differences, recipe differences."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import JsonValue

from moecompress.checkpoint.index import open_index
from moecompress.checkpoint.writer import atomic_write
from moecompress.errors import CheckpointError, OutputError, message
from moecompress.evalstore import WINDOWS, by_document, compare_rows, finite, read_rows
from moecompress.numerics.significance import Difference, estimate, samples
from moecompress.report.build import read_evaluation, read_report
from moecompress.report.schema import Evaluation, Metric, Report

Measure = Literal["perplexity", "KL", "task"]
CLEAR = 0.05  # two-sided probability below which a difference is called better or worse
ALL = "all"  # what evaluate.py calls the union of several texts
ABSENT = "absent"
SUFFIXES = (".html", ".md", ".json")
_SKIPPED = ("output.dir",)  # different by necessity


@dataclass(frozen=True)
class Run:
    """One directory. quality: (measure, text or task, metric) -> value with error. rows: the same -> per sample."""

    name: str
    directory: Path
    report: Report | None
    evaluation: Evaluation | None
    size: int
    quality: Mapping[tuple[Measure, str, str], Metric]
    rows: Mapping[tuple[Measure, str], Sequence[Mapping[str, Any]]]

    @property
    def recipe(self) -> str:
        """Its passes, in order; a directory without report.json is a source model."""
        return " → ".join(step.name for step in self.report.passes) if self.report else "not compressed by moecompress"


@dataclass(frozen=True)
class Verdict:
    """A paired difference, `run` minus `base`, in the metric's own units."""

    measure: Measure
    on: str
    metric: str
    run: str
    base: str
    difference: Difference
    verdict: Literal["better", "worse", "different", "no clear difference"]


@dataclass(frozen=True)
class Comparison:
    """runs: the first is the base. recipes: key -> one value per run, None = absent; only keys that differ."""

    runs: tuple[Run, ...]
    verdicts: tuple[Verdict, ...]
    recipes: Mapping[str, tuple[JsonValue, ...]]
    warnings: tuple[str, ...]


def write_comparison(directories: Sequence[Path], out: Path) -> Path:
    """Compare directories and write one self-contained file. Raises CheckpointError, OutputError."""
    from moecompress.report.compare_page import comparison_html, comparison_markdown

    if out.suffix not in SUFFIXES:
        raise OutputError(message(f"--out {out}", f"cannot write '{out.suffix}'", ", ".join(SUFFIXES)))
    if not out.parent.is_dir():
        raise OutputError(message(f"--out {out}", f"no directory '{out.parent}'"))
    found = compare(directories)
    render = {".html": comparison_html, ".md": comparison_markdown, ".json": comparison_json}[out.suffix]
    atomic_write(out, render(found))
    return out


def compare(directories: Sequence[Path]) -> Comparison:
    """Read all directories; every difference is taken against the first one."""
    if len(directories) < 2:
        raise CheckpointError(message("compare", f"{len(directories)} directory", "two or more"))
    names = short_names(directories)
    runs = tuple(read_run(path, name) for path, name in zip(directories, names, strict=True))
    base, others = runs[0], runs[1:]
    verdicts = tuple(verdict for run in others for verdict in _verdicts(run, base))
    recipes = recipe_differences([run.report.recipe if run.report else {} for run in runs])
    return Comparison(runs, verdicts, recipes, tuple(_warnings(runs)))


def read_run(path: Path, name: str) -> Run:
    """One directory: report.json, eval.json and per-sample results, as far as there are any."""
    folder = path / "moecompress"
    report = read_report(path) if (folder / "report.json").is_file() else None
    evaluation = read_evaluation(path)
    if report is None and evaluation is None:
        then = "name outputs of `moecompress run`, or run `moecompress eval` on the directory first"
        raise CheckpointError(message(str(path), "neither report.json nor eval.json in moecompress/", then=then))
    written = report.size.output_bytes if report else None
    size = open_index(path).total_bytes if written is None else written
    rows = _rows(path, evaluation) if evaluation else {}
    return Run(name, path, report, evaluation, size, _quality(evaluation, rows) if evaluation else {}, rows)


def short_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of every path, as many as make them different; numbered where paths are equal."""
    parts = [path.absolute().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]).lstrip("/") for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({number})" for number, name in enumerate(names, start=1)]


def _rows(path: Path, evaluation: Evaluation) -> dict[tuple[Measure, str], list[Mapping[str, Any]]]:
    """Windows as documents whose metrics are the log-likelihood (perplexity) and KL; tasks as they are."""
    found: dict[tuple[Measure, str], list[Mapping[str, Any]]] = {}
    for window in read_rows(path, evaluation.windows or WINDOWS):
        text = window["text"] if ":" in window["text"] else Path(window["text"]).stem
        key = f"{text}:{window.get('digest') or window['index']}"
        for name in (text, ALL):
            for measure, value in (("perplexity", -window["nll"]), ("KL", window["kl"])):
                if value is not None:
                    row = {"doc_hash": key, "filter": "none", "metrics": {measure: value}}
                    found.setdefault((measure, name), []).append(row)  # type: ignore[arg-type]
    for task, settings in evaluation.task_settings.items():
        if isinstance(settings.get("samples"), str):
            found["task", task] = list(read_rows(path, str(settings["samples"])))
    return found


def _quality(
    evaluation: Evaluation, rows: Mapping[tuple[Measure, str], Sequence[Mapping[str, Any]]]
) -> dict[tuple[Measure, str, str], Metric]:
    found: dict[tuple[Measure, str, str], Metric] = {}
    for text, metric in evaluation.perplexity.items():
        found["perplexity", text, "perplexity"] = metric
    for text, value in evaluation.kl.items():
        taken = samples([row["metrics"]["KL"] for row in rows.get(("KL", text), ())])
        found["KL", text, "KL"] = Metric(value=value, stderr=estimate("mean", taken)[1] if taken else None)
    for task, metrics in evaluation.tasks.items():
        for name, metric in metrics.items():
            found["task", task, name] = metric
    return found


def _verdicts(run: Run, base: Run) -> Iterator[Verdict]:
    for measure, on in dict.fromkeys((measure, on) for measure, on, _ in run.quality):
        here = {key[2]: metric.value for key, metric in run.quality.items() if key[:2] == (measure, on)}
        rows, others = run.rows.get((measure, on), ()), base.rows.get((measure, on), ())
        for metric, found in compare_rows(rows, others, here).items():
            higher = _higher_is_better(run, on, metric) if measure == "task" else False
            yield Verdict(measure, on, metric, run.name, base.name, found, _judge(found, higher))


def _judge(found: Difference, higher: bool | None) -> Literal["better", "worse", "different", "no clear difference"]:
    if found.p is None or found.p >= CLEAR or not found.value:
        return "no clear difference"
    if higher is None:
        return "different"
    return "better" if (found.value > 0) == higher else "worse"


def _higher_is_better(run: Run, task: str, metric: str) -> bool | None:
    known = run.evaluation.task_settings.get(task, {}).get("higher_is_better") if run.evaluation else None
    found = known.get(metric.partition(",")[0]) if isinstance(known, dict) else None
    return found if isinstance(found, bool) else None


def recipe_differences(recipes: Sequence[Mapping[str, JsonValue]]) -> dict[str, tuple[JsonValue, ...]]:
    """Keys like `passes[0].quantize.rtn.bits` that are not equal in all recipes, with every recipe's value."""
    flat = [dict(_flatten(recipe, "")) for recipe in recipes]
    keys = dict.fromkeys(key for recipe in flat for key in recipe)
    found = {key: tuple(recipe.get(key, ABSENT) for recipe in flat) for key in keys if key not in _SKIPPED}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}


def _flatten(value: Any, path: str) -> Iterator[tuple[str, JsonValue]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flatten(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value):
        for number, inner in enumerate(value):
            yield from _flatten(inner, f"{path}[{number}]")
    else:
        yield path, value


def _warnings(runs: Sequence[Run]) -> Iterator[str]:
    """What makes numbers of different runs hard to compare."""
    models = {run.report.model.name for run in runs if run.report}
    if len(models) > 1:
        yield f"the runs started from different models: {', '.join(sorted(models))}"
    references = {run.evaluation.reference for run in runs if run.evaluation and run.evaluation.kl}
    if len(references) > 1:
        yield f"KL was measured against different references: {', '.join(map(str, sorted(map(str, references))))}"
    base = runs[0]
    for run in runs[1:]:
        if run.evaluation is None or base.evaluation is None:
            yield f"{run.name if run.evaluation is None else base.name} was not evaluated"
            continue
        for (measure, on), rows in run.rows.items():
            mine, theirs = (
                {document for values in by_document(side).values() for document in values}
                for side in (rows, base.rows.get((measure, on), ()))
            )
            if theirs and mine != theirs and on != ALL and measure != "KL":
                shared = len(mine & theirs)
                yield f"{measure} on {on}: {run.name} and {base.name} saw different data; {shared} samples are shared"


def comparison_json(found: Comparison) -> str:
    """The comparison as data."""
    runs = [
        {
            "name": run.name,
            "directory": str(run.directory),
            "recipe": run.recipe,
            "model": run.report.model.name if run.report else None,
            "format": run.report.format if run.report else None,
            "bytes": run.size,
            "expert_bits_per_weight": run.report.size.expert_bits_per_weight if run.report else None,
            "total_bits_per_weight": run.report.size.total_bits_per_weight if run.report else None,
            "quality": [
                {"measure": measure, "on": on, "metric": metric, "value": m.value, "stderr": m.stderr}
                for (measure, on, metric), m in run.quality.items()
            ],
            "peak_rss_bytes": run.report.peak_rss_bytes if run.report else None,
            "seconds": run.report.seconds if run.report else None,
        }
        for run in found.runs
    ]
    data = {
        "schema": "moecompress.compare/1",
        "base": found.runs[0].name,
        "runs": runs,
        "differences": [asdict(verdict) for verdict in found.verdicts],
        "recipes": {key: list(values) for key, values in found.recipes.items()},
        "warnings": list(found.warnings),
    }
    return json.dumps(finite(data), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
