"""report.html: well formed, self-contained, hostile names are text, honest about what was not measured."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from pages import Checker

from moecompress.report.html import render_html, tiles
from moecompress.report.maps import bit_maps
from moecompress.report.markdown import render_markdown
from moecompress.report.schema import Evaluation, Metric, ModelInfo, Report

Make = Callable[[int, int], Report]
HOSTILE = "</title><script>alert(1)</script><img src=http://evil.test/x onerror=alert(2)>\"'&{{ 7*7 }}"


@pytest.fixture
def empty() -> Report:
    return Report(model=ModelInfo(name="some/dir", source="directory"), recipe={"model": "some/dir"})


def test_checker_finds_what_it_is_for() -> None:
    for bad in ("<p><b></p></b>", "<p>", "</p>", '<p id="a" id="b"></p>', "<rect/>"):
        with pytest.raises(AssertionError):
            Checker(bad)


@pytest.mark.parametrize(("layers", "experts"), [(1, 8), (3, 40), (30, 64)])
def test_well_formed_and_self_contained(
    make_report: Make, make_evaluation: Callable[[int], Evaluation], layers: int, experts: int
) -> None:
    page = render_html(make_report(layers, experts), make_evaluation(layers))
    found = Checker(page)
    assert not re.search(r"https?://|url\(|@import|//[a-z]", page)
    for tag, attributes in found.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form", "image", "use")
        assert not {"src", "href", "xlink:href", "srcset", "action"} & set(attributes), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")]
    policy = [a["content"] for t, a in found.elements if t == "meta" and "http-equiv" in a]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"]
    assert page.startswith("<!DOCTYPE html>") and "prefers-color-scheme: dark" in page


def test_one_row_per_expert_and_one_section_per_layer(make_report: Make) -> None:
    report = make_report(3, 11)
    page = render_html(report, None)
    for layer in report.layers:
        start = page.index(f"<summary>Layer {layer.layer}:")
        body = page[page.index("<tbody>", start) : page.index("</tbody>", start)]
        assert body.count("<tr") == 11
        marked = sum(e.tokens == 0 or e.fallback is not None for e in layer.experts)
        assert body.count('class="bad"') == marked


def test_hostile_names_are_text(make_data: Callable[[int, int], Any]) -> None:
    clean = Checker(render_html(Report.model_validate(make_data(1, 2)), None))
    data = make_data(1, 2)
    data["model"]["name"] = data["backend"] = data["warnings"][0] = HOSTILE
    data["recipe"] = {"model": HOSTILE, HOSTILE: [HOSTILE]}
    data["versions"] = {HOSTILE: HOSTILE}
    data["passes"][0].update(name=HOSTILE, paper=HOSTILE, parameters={HOSTILE: HOSTILE})
    data["calibration"][0].update(name=HOSTILE, origin={HOSTILE: HOSTILE}, digest=HOSTILE)
    data["layers"][0]["experts"][0].update(action=HOSTILE, fallback=HOSTILE)
    data["loadable"]["vllm"]["reason"] = HOSTILE
    evaluation = Evaluation(
        perplexity={HOSTILE: Metric(value=2.0)},
        kl={HOSTILE: 1.0},
        tasks={HOSTILE: {HOSTILE: Metric(value=1.0)}},
    )
    found = Checker(render_html(Report.model_validate(data), evaluation))
    assert found.count("script") == clean.count("script") == 1
    assert found.count("img") == 0
    assert found.text.count("<script>alert(1)</script>") >= 12
    assert "{{ 7*7 }}" in found.text and "49" not in found.text


def test_nulls_are_not_measured_and_never_none_or_nan(empty: Report) -> None:
    found = Checker(render_html(empty, None))
    for title in ("Size by component", "Quality", "Output error per layer", "Router agreement per layer"):
        section = found.text[found.text.index(title) :]
        assert "not measured" in section[:160], title
    assert [tile.value for tile in tiles(empty, None)] == ["not measured"] * 6
    assert not re.search(r"\b(None|nan|null|undefined)\b", found.text)


def test_unmeasured_expert_values(make_data: Callable[[int, int], Any]) -> None:
    data = make_data(1, 3)
    data["layers"][0]["experts"] = [{"id": i} for i in range(3)]
    page = render_html(Report.model_validate(data), None)
    row = "<td>1</td>" + '<td class="nm">not measured</td>' * 5 + "<td>kept</td><td></td>"
    assert row in page
    assert "Calibration tokens per expert" not in page and "Bits per weight code" not in page


def test_headline_numbers(make_report: Make, make_evaluation: Callable[[int], Evaluation]) -> None:
    report = make_report(1, 8)
    shown = {tile.label: f"{tile.value} | {tile.note}" for tile in tiles(report, make_evaluation(1))}
    assert shown["Perplexity"].startswith("8.432 ± 0.051 | heldout.txt")
    assert shown["KL to the reference"] == "0.07310 | nats per token, heldout.txt"
    assert shown["Peak memory"] == "5.68 GiB | 81 % of the planned 6.98 GiB"  # 6.1e9 / 2^30, 6.1 / 7.5
    assert shown["Time"] == "1 h 03 min | 94 % of the planned 1 h 07 min"


def test_agreement_of_another_number_of_layers_is_not_drawn(
    make_report: Make, make_evaluation: Callable[[int], Evaluation]
) -> None:
    assert "evaluation tokens" in render_html(make_report(3, 4), make_evaluation(3))
    assert "evaluation tokens" not in render_html(make_report(3, 4), make_evaluation(2))


def test_many_warnings_come_first_and_fold(make_report: Make) -> None:
    report = make_report(1, 2).model_copy(update={"warnings": tuple(f"warning-{i};" for i in range(40))})
    page = render_html(report, None)
    assert all(page.count(f"warning-{i};") == 1 for i in range(40))
    assert page.index("warning-39;") < page.index('class="tiles"')
    assert "<summary>28 more</summary>" in page


def test_largest_model_stays_small(make_report: Make, make_evaluation: Callable[[int], Evaluation]) -> None:
    page = render_html(make_report(61, 256), make_evaluation(61))
    assert len(page.encode()) < 5_000_000
    assert Checker(page).count("details") == 61


def test_what_a_token_uses_and_the_budget_curve_are_shown(make_report: Callable[[int, int], Report]) -> None:
    report = make_report(3, 8)
    page, text = render_html(report, None), render_markdown(report, None)
    shown = {tile.label: f"{tile.value} | {tile.note}" for tile in tiles(report, None)}
    assert shown["Expert bytes per decoded token"].startswith("114\u00a0MiB")  # 3 layers of 4e7 bytes
    assert "of 8.00 experts per token and layer" in shown["Expert bytes per decoded token"]
    for words in ("Budget curve of allocate.global", "Experts used per token and layer", "this run", "predicted KL"):
        assert words in page, words
    assert "2.5 bits: 3.000 stored bits per weight, predicted KL 0.03125" in page
    assert "too small even for 1 bits everywhere" in page and "too small even for 1 bits everywhere" in text
    assert "expert bytes per decoded token" in text and "| this run |" in text


def test_experts_of_no_bits_have_a_colour_and_a_name(make_data: Callable[[int, int], dict[str, Any]]) -> None:
    data = make_data(1, 4)
    for expert in data["layers"][0]["experts"]:
        expert |= {"bits": {"gate_up": 2, "down": 2}, "action": "quantized"}
    data["layers"][0]["experts"][1] |= {"bits": {"gate_up": 0, "down": 0}, "action": "pruned"}
    (drawn,) = bit_maps(Report.model_validate(data).layers)
    assert dict(drawn.legend)["gone"] == "0 bit (left out)" and "1 x 0 bit, 3 x 2 bit" in drawn.drawing
