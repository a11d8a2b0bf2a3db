"""Comparisons: differences against scipy, directions, recipe differences, warnings, and the files that come out."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine import command
from pages import Checker
from safetensors.torch import load_file
from scipy import stats

from moecompress.errors import CheckpointError, OutputError
from moecompress.report.compare import ABSENT, compare, recipe_differences, short_names, write_comparison
from moecompress.report.compare_page import comparison_html, comparison_markdown, quality_axis
from moecompress.report.scatter import Point, scatter

WINDOWS = 16
HOSTILE = "<script>alert(1)</script>|`*"
Make = Callable[..., Path]


def rows(texts: list[str], seed: int, worse: float) -> list[dict[str, Any]]:
    """Windows of equal data; `worse` nats above a common base."""
    base, own = np.random.default_rng(0), np.random.default_rng(seed)
    found = []
    for text in texts:
        for index in range(WINDOWS):
            nll = 2 + base.random() + worse * (1 + own.random())
            kl = worse * (1 + own.random()) if worse else None
            row = {"text": f"data/{text}.txt", "index": index, "nll": nll, "kl": kl, "agree": None}
            found.append(row | {"digest": f"{text}{index}"})
    return found


def evaluation(windows: list[dict[str, Any]], answers: dict[str, list[float]], folder: Path) -> dict[str, Any]:
    """eval.json from per-sample results, by the definitions."""
    texts = sorted({row["text"] for row in windows})
    groups = {Path(text).stem: [row for row in windows if row["text"] == text] for text in texts}
    groups |= {"all": windows} if len(texts) > 1 else {}
    found: dict[str, Any] = {
        "perplexity": {},
        "kl": {},
        "tasks": {},
        "task_settings": {},
        "windows": "eval_windows.jsonl",
    }
    for name, group in groups.items():
        nll = [row["nll"] for row in group]
        value = math.exp(float(np.mean(nll)))
        found["perplexity"][name] = {"value": value, "stderr": value * float(stats.sem(nll))}
        if group[0]["kl"] is not None:
            found["kl"][name] = float(np.mean([row["kl"] for row in group]))
    for task, values in answers.items():
        found["tasks"][task] = {"acc": {"value": float(np.mean(values)), "stderr": float(stats.sem(values))}}
        better = None if task == "unknown" else task != "errors"
        found["task_settings"][task] = {"samples": f"eval_samples/{task}.jsonl", "higher_is_better": {"acc": better}}
        documents = [{"doc_hash": f"{task}{i}", "filter": "none", "metrics": {"acc": v}} for i, v in enumerate(values)]
        (folder / "eval_samples").mkdir(exist_ok=True)
        write_lines(folder / "eval_samples" / f"{task}.jsonl", documents)
    return found


def write_lines(path: Path, data: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in data))


@pytest.fixture
def make(tmp_path: Path, make_data: Callable[[int, int], dict[str, Any]]) -> Make:
    """A directory with a report and an evaluation."""

    def directory(
        name: str, bits: int, size: int, worse: float, texts: tuple[str, ...] = ("code", "math"), **answers: Any
    ) -> Path:
        folder = tmp_path / name / "moecompress"
        folder.mkdir(parents=True)
        report = make_data(2, 4)
        report["size"]["output_bytes"] = size
        report["recipe"]["passes"] = [{"quantize.rtn": {"bits": bits, "group_size": 32}}]
        report["recipe"]["output"]["dir"] = name
        report["passes"] = report["passes"][1:]
        (folder / "report.json").write_text(json.dumps(report))
        windows = rows(list(texts), bits, worse)
        write_lines(folder / "eval_windows.jsonl", windows)
        (folder / "eval.json").write_text(json.dumps(evaluation(windows, answers, folder)))
        return folder.parent

    return directory


RIGHT = [1.0] * 20 + [0.0] * 20
FEWER = [1.0] * 8 + [0.0] * 32


@pytest.fixture
def three(make: Make) -> list[Path]:
    return [
        make("w4", 4, 4 << 20, 0.01, piqa=RIGHT, errors=RIGHT, unknown=RIGHT),
        make("w3", 3, 3 << 20, 0.05, piqa=FEWER, errors=FEWER, unknown=FEWER),
        make("w2", 2, 2 << 20, 0.4, piqa=RIGHT[1:] + [1.0], errors=RIGHT),
    ]


def test_windows_are_paired_and_tested_like_scipy(three: list[Path]) -> None:
    found = compare(three)
    first, second = (rows(["code", "math"], bits, worse) for bits, worse in ((4, 0.01), (3, 0.05)))
    kl = next(v for v in found.verdicts if (v.run, v.measure, v.on) == ("w3", "KL", "all"))
    a, b = ([row["kl"] for row in side] for side in (second, first))
    expected = stats.ttest_rel(a, b)
    assert kl.difference.value == pytest.approx(np.mean(a) - np.mean(b))
    assert (kl.difference.z, kl.difference.p) == (pytest.approx(expected.statistic), pytest.approx(expected.pvalue))
    assert (kl.verdict, kl.difference.count, kl.base) == ("worse", 2 * WINDOWS, "w4")
    text = next(v for v in found.verdicts if (v.run, v.measure, v.on) == ("w2", "perplexity", "code"))
    a, b = (
        [row["nll"] for row in rows(["code", "math"], bits, worse)[:WINDOWS]] for bits, worse in ((2, 0.4), (4, 0.01))
    )
    assert text.difference.value == pytest.approx(math.exp(np.mean(a)) - math.exp(np.mean(b)))
    assert (text.verdict, text.difference.higher, text.difference.count) == ("worse", WINDOWS, WINDOWS)


def test_tasks_know_which_way_is_better(three: list[Path]) -> None:
    found = {(v.run, v.on): v for v in compare(three).verdicts if v.measure == "task"}
    assert found["w3", "piqa"].difference.test == "sign"
    assert found["w3", "piqa"].difference.p == pytest.approx(2 / 2**12)
    verdicts = {key: v.verdict for key, v in found.items()}
    assert verdicts == {
        ("w3", "piqa"): "worse",
        ("w3", "errors"): "better",
        ("w3", "unknown"): "different",
        ("w2", "piqa"): "no clear difference",
        ("w2", "errors"): "no clear difference",
    }


def test_recipes_differ_key_by_key(three: list[Path]) -> None:
    assert compare(three).recipes == {"passes[0].quantize.rtn.bits": (4, 3, 2)}
    first = {"model": "m", "passes": [{"a": {"x": [1, 2]}}, {"b": {}}], "seed": 0, "output": {"dir": "p"}}
    second = {"model": "m", "passes": [{"a": {"x": [1, 3]}}], "seed": 0, "output": {"dir": "q"}}
    assert recipe_differences([first, second]) == {"passes[0].a.x": ([1, 2], [1, 3]), "passes[1].b": ({}, ABSENT)}
    assert recipe_differences([first, first, first]) == {}


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["out/a", "out/b"], ["a", "b"]),
        (["x/out", "y/out"], ["x/out", "y/out"]),
        (["x/p/out", "y/p/out", "z"], None),
        (["a", "a"], None),
    ],
)
def test_names_are_short_and_different(paths: list[str], names: list[str] | None) -> None:
    found = short_names([Path(path) for path in paths])
    assert len(set(found)) == len(paths)
    assert names is None or found == names


def test_what_cannot_be_compared_is_told(make: Make) -> None:
    first, second = make("a", 4, 1 << 20, 0.01, piqa=RIGHT), make("b", 3, 1 << 20, 0.02, ("code",), piqa=RIGHT[:30])
    lines = (second / "moecompress" / "eval_windows.jsonl").read_text().replace('"code0"', '"other"')
    (second / "moecompress" / "eval_windows.jsonl").write_text(lines)
    report = json.loads((second / "moecompress" / "report.json").read_text())
    report["model"]["name"] = "another/model"
    (second / "moecompress" / "report.json").write_text(json.dumps(report))
    found = compare([first, second])
    assert found.warnings == (
        "the runs started from different models: another/model, example/Moe-7B-demo",
        f"perplexity on code: b and a saw different data; {WINDOWS - 1} samples are shared",
        "task on piqa: b and a saw different data; 30 samples are shared",
    )
    counts = {(v.measure, v.on): v.difference.count for v in found.verdicts}
    assert counts["perplexity", "code"] == WINDOWS - 1 and counts["task", "piqa"] == 30
    assert ("perplexity", "math") not in counts


def test_a_source_model_may_take_part(make: Make, bench_a: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "moecompress").mkdir(parents=True)
    for file in ("config.json", "model.safetensors"):
        (source / file).symlink_to(bench_a / file)
    windows = rows(["code", "math"], 0, 0.0)
    write_lines(source / "moecompress" / "eval_windows.jsonl", windows)
    (source / "moecompress" / "eval.json").write_text(json.dumps(evaluation(windows, {}, source / "moecompress")))
    found = compare([source, make("w4", 4, 1 << 20, 0.01)])
    stored = load_file(bench_a / "model.safetensors").values()
    assert found.runs[0].size == sum(tensor.nbytes for tensor in stored)
    assert quality_axis(found) == ("perplexity", "all", "perplexity")  # the source has no KL to itself
    assert {v.verdict for v in found.verdicts if v.measure == "perplexity"} == {"worse"}
    assert "not compressed by moecompress" in comparison_markdown(found)


def test_the_page_is_well_formed_and_self_contained(three: list[Path], tmp_path: Path) -> None:
    hostile = tmp_path / "<b>&w2"
    three[2].rename(hostile)
    report = json.loads((hostile / "moecompress" / "report.json").read_text())
    report["passes"][0]["name"] = HOSTILE
    (hostile / "moecompress" / "report.json").write_text(json.dumps(report))
    found = compare([*three[:2], hostile])
    page = comparison_html(found)
    checked = Checker(page)
    assert not re.search(r"https?://|url\(|@import", page) and checked.count("script") == 0
    assert HOSTILE in checked.text and "<b>&w2" in checked.text and page.count("<b>") == 0
    assert checked.count("tr") == 1 + 3 + 1 + len(found.verdicts) + 2
    assert sum(name == "title" for name, _ in checked.elements) == 1 + 3  # of the page and of three points
    assert page == comparison_html(found)
    assert HOSTILE not in comparison_markdown(found)


def test_values_that_are_missing_are_named(make: Make, three: list[Path], tmp_path: Path) -> None:
    silent = make("silent", 8, 5 << 20, 0.01)
    (silent / "moecompress" / "eval.json").unlink()
    found = compare([three[0], three[1], silent])
    checked = Checker(comparison_html(found))
    assert "not in the plot: silent" in checked.text and "silent was not evaluated" in checked.text
    assert "not measured" in checked.text
    nothing = compare([silent, silent])
    assert quality_axis(nothing) is None and "no measure that two of the runs have" in comparison_html(nothing)


def test_files_by_suffix(three: list[Path], tmp_path: Path) -> None:
    for suffix in ("html", "md", "json"):
        out = tmp_path / f"c.{suffix}"
        ended = command("compare", *three, "--out", out)
        assert (ended.code, ended.out) == (0, f"{out}\n"), ended.err
    data = json.loads((tmp_path / "c.json").read_text())
    assert [run["name"] for run in data["runs"]] == ["w4", "w3", "w2"] and data["base"] == "w4"
    assert data["recipes"] == {"passes[0].quantize.rtn.bits": [4, 3, 2]}
    kl = next(q for q in data["runs"][1]["quality"] if (q["measure"], q["on"]) == ("KL", "all"))
    assert kl["stderr"] == pytest.approx(stats.sem([row["kl"] for row in rows(["code", "math"], 3, 0.05)]))
    table = (tmp_path / "c.md").read_text()
    assert "| 2 | w3 | quantize.gptq | 3.00 MiB |" in table and "## Recipe differences" in table


def test_mistakes(three: list[Path], tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"\.html, \.md, \.json"):
        write_comparison(three, tmp_path / "c.pdf")
    with pytest.raises(OutputError, match="no directory"):
        write_comparison(three, tmp_path / "absent" / "c.md")
    with pytest.raises(CheckpointError, match="two or more"):
        compare(three[:1])
    with pytest.raises(CheckpointError, match="neither report.json nor eval.json"):
        compare([three[0], tmp_path])
    (three[1] / "moecompress" / "eval_windows.jsonl").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON lines"):
        compare(three)


def places(drawing: str) -> list[tuple[float, float]]:
    """Where the points are, in the order given."""
    found = re.findall(r'class="dot \w+" d="M([\d.]+) ([\d.]+)h', drawing)
    return [(float(x), float(y)) for x, y in found]


@pytest.mark.parametrize("values", [[1.0, 2.0, 3.0], [0.001, 0.02, 0.5], [70.0, 71.0, 72.0]])
def test_points_lie_where_their_values_are(values: list[float]) -> None:
    points = [Point(str(i), "s1", "", i + 1.0, v, 0.1 * v) for i, v in enumerate(values)]
    drawing = str(scatter(points, "quality", str, str))
    xs, ys = zip(*places(drawing), strict=True)
    assert list(xs) == sorted(xs) and list(ys) == sorted(ys, reverse=True)
    assert all(0 <= x <= 1000 for x in xs) and all(0 <= y <= 200 for y in ys)
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)
    bars = [(float(a), float(b)) for a, b in re.findall(r"M[\d.]+ ([\d.]+)V([\d.]+)", drawing)]
    inner = [bar for bar in bars if bar[0] != 200]
    assert len(inner) == 3 and all(low >= y >= high for (low, high), y in zip(inner, ys, strict=True))


def test_wide_ranges_are_logarithmic() -> None:
    drawing = str(
        scatter(
            [Point("1", "s1", "", 1, 0.001), Point("2", "s1", "", 2, 0.01), Point("3", "s1", "", 3, 0.1)], "q", str, str
        )
    )
    ys = [y for _, y in places(drawing)]
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.2)


def test_labels_on_one_place_are_one_and_a_single_point_is_drawn() -> None:
    same = [Point("1", "s1", "", 1.0, 1.0), Point("2", "s1", "", 1.0, 1.0), Point("3", "s2", "", 3.0, 2.0)]
    assert ">1, 2</span>" in str(scatter(same, "q", str, str))
    assert len(places(str(scatter([Point("1", "s1", "<", 1.0, 0.0)], "q", str, str)))) == 1
