"""Numbers as text, markdown tables and the model card."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from moecompress.report.card import model_card
from moecompress.report.html import render_html
from moecompress.report.markdown import fenced, inline, markdown_table, render_markdown
from moecompress.report.schema import Evaluation, ModelInfo, Report
from moecompress.report.tables import Table
from moecompress.report.text import against_plan, data_size, duration, number, percent, smaller, with_error

Make = Callable[[int, int], Report]


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (data_size(None), "not measured"),
        (data_size(0), "0 B"),
        (data_size(1023), "1023 B"),
        (data_size(1024), "1.00 KiB"),
        (data_size(1536 * 2**20), "1.50 GiB"),
        (data_size(1023 * 2**30), "1023 GiB"),
        (data_size(2**40 - 1), "1.00 TiB"),
        (duration(None), "not measured"),
        (duration(4.25), "4.2 s"),
        (duration(59.96), "1 min 00 s"),
        (duration(192), "3 min 12 s"),
        (duration(3599.6), "1 h 00 min"),
        (duration(7500), "2 h 05 min"),
        (number(None), "not measured"),
        (number(0.0), "0"),
        (number(123456), "123456"),
        (number(123456.7), "123457"),
        (number(0.01), "0.01000"),
        (number(2.0, 3), "2.00"),
        (percent(None), "not measured"),
        (percent(0.9876), "98.8 %"),
        (with_error(None, 0.1), "not measured"),
        (with_error(8.25, None), "8.250"),
        (with_error(8.25, 0.05), "8.250 ± 0.050"),
        (smaller(10, 4), "2.50x smaller"),
        (smaller(4, 10), "2.50x larger"),
        (smaller(4, 4), "unchanged"),
        (smaller(None, 4), None),
        (smaller(4, 0), None),
        (against_plan(5, 10, "10 s"), "50 % of the planned 10 s"),
        (against_plan(None, 10, "10 s"), "planned: 10 s"),
        (against_plan(5, None, ""), ""),
    ],
)
def test_numbers(shown: str | None, expected: str | None) -> None:
    assert shown == expected


@given(st.text(max_size=40))
@settings(max_examples=80, deadline=None)
def test_inline_stays_in_its_cell(text: str) -> None:
    shown = inline(text)
    assert len(shown.splitlines()) <= 1
    assert "<" not in shown and ">" not in shown
    row = markdown_table(Table(("a", "b"), ((text, text),))).splitlines()[-1]
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) == 3  # unescaped pipes: the borders only


@given(st.text(alphabet="`a\n", max_size=20))
@settings(max_examples=60, deadline=None)
def test_fence_cannot_be_closed_from_inside(text: str) -> None:
    first, *body, last = fenced(text, "yaml").split("\n")
    assert first == last + "yaml" and set(last) == {"`"}
    assert last not in "\n".join(body)


def test_markdown_has_every_section(make_report: Make, make_evaluation: Callable[[int], Evaluation]) -> None:
    text = render_markdown(make_report(2, 8), make_evaluation(2))
    for title in (
        "Quality",
        "Size by component",
        "Experts",
        "Passes",
        "What loads it",
        "Layers",
        "Calibration",
    ):
        assert f"\n## {title}\n" in text
    assert text.index("**warning**") < text.index("size before") < text.index("## Quality")
    assert "arXiv:2210.17323" in text and "| perplexity | heldout.txt | 8.432 ± 0.051 |" in text


def test_protected_experts_and_notes_of_passes_are_listed(make_data: Callable[[int, int], dict[str, Any]]) -> None:
    data = make_data(3, 4)
    assert "Notes on layers" not in render_markdown(Report.model_validate(data), None)
    data["layers"][1]["experts"][2]["protected"] = "super expert"
    data["layers"][2]["notes"] = {"transferred_fraction": 0.123456, "plain_pruning": False}
    report = Report.model_validate(data)
    for page in (render_markdown(report, None), re.sub("<[^>]+>", "|", render_html(report, None))):
        at = page.index("Notes on layers")
        assert at < page.index("2 (super expert)") < page.index("transferred_fraction: 0.1235, plain_pruning: false")
    assert "| 1 | 2 (super expert) |  |" in render_markdown(report, None)


def test_quality_says_how_it_was_measured(make_report: Make) -> None:
    found = Evaluation(router_agreement=(0.5, None, 1.0), backend="cpu-avx2", limit=200, reference="some/model")
    text = render_markdown(make_report(1, 2), found)
    assert "| router agreement | mean over layers | 75.0 % |" in text
    for name, value in (("reference", "some/model"), ("backend", "cpu-avx2"), ("limit", "200")):
        assert f"| evaluated with | {name} | {value} |" in text


def test_markdown_is_honest_about_nulls() -> None:
    text = render_markdown(Report(model=ModelInfo(name="m", source="directory"), recipe={"model": "m"}), None)
    assert text.count("not measured") >= 12 and not re.search(r"\b(None|nan|null)\b", text)


def test_markdown_stays_compact(make_report: Make) -> None:
    assert len(render_markdown(make_report(61, 256), None)) < 20_000


def front_of(card: str) -> dict[str, Any]:
    found = re.match(r"---\n(.*?)\n---\n", card, re.S)  # a line of its own, not indented: as the hub reads it
    assert found
    return dict(yaml.safe_load(found[1]))


def test_card_front_matter(make_report: Make) -> None:
    front = front_of(model_card(make_report(1, 8), None, licence="apache-2.0"))
    assert front == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "base_model": "example/Moe-7B-demo",
        "base_model_relation": "quantized",
        "tags": ["moecompress", "mixture-of-experts", "prune", "quantize"],
    }


def test_card_does_not_claim_what_it_cannot_know(make_data: Callable[[int, int], Any]) -> None:
    data = make_data(1, 2)
    data["model"]["source"] = "directory"
    front = front_of(model_card(Report.model_validate(data), None))
    assert not {"base_model", "base_model_relation", "license"} & set(front)


def test_pruned_only_is_not_called_quantized(make_data: Callable[[int, int], Any]) -> None:
    data = make_data(1, 2)
    data["passes"] = data["passes"][:1]
    for expert in data["layers"][0]["experts"]:
        expert["bits"] = {"gate_up": 16, "down": 16}
    assert front_of(model_card(Report.model_validate(data), None))["base_model_relation"] == "finetune"


@pytest.mark.parametrize(("written", "imported"), [("native", True), (None, True), ("portable", False)])
def test_card_code_runs_as_python(make_data: Callable[[int, int], Any], written: str | None, imported: bool) -> None:
    data = {**make_data(1, 2), "format": written}
    block = re.search(r"```python\n(.*?)```", model_card(Report.model_validate(data), None), re.S)
    assert block
    compile(block[1], "card", "exec")
    assert ("import moecompress" in block[1]) == imported
    assert "AutoModelForCausalLM.from_pretrained" in block[1]


def test_card_numbers_warnings_and_recipe(make_report: Make, make_evaluation: Callable[[int], Evaluation]) -> None:
    report = make_report(1, 8)
    with_numbers, without = model_card(report, make_evaluation(1)), model_card(report, None)
    assert "8.432 ± 0.051" in with_numbers and "8.432" not in without
    assert "## Quality\n\nnot measured\n" in without
    assert report.warnings[0] in without
    recipe = re.search(r"```yaml\n(.*?)```", without, re.S)
    assert recipe and yaml.safe_load(recipe[1]) == report.recipe


def test_hostile_name_cannot_leave_front_matter_or_fence(make_data: Callable[[int, int], Any]) -> None:
    data = make_data(1, 2)
    name = "a/b\n---\nlicense: mit\n```\n<script>alert(1)</script>"
    data["model"]["name"] = name
    data["recipe"]["model"] = name
    card = model_card(Report.model_validate(data), None)
    assert front_of(card)["base_model"] == name and "license" not in front_of(card)
    outside = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", card.split("\n---\n", 1)[1], flags=re.S | re.M)
    assert "<script>" not in outside
