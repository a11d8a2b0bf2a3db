"""Charts and heat maps against what their coordinates must mean."""

from __future__ import annotations

import re
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from moecompress.report.maps import STEPS, _ranges, _short, _step, bit_maps, error_map, token_map
from moecompress.report.schema import ExpertBits, ExpertInfo, LayerInfo
from moecompress.report.svg import Line, Segment, line_chart, stacked_bar, ticks


def layer_of(*experts: ExpertInfo, index: int = 0) -> LayerInfo:
    return LayerInfo(layer=index, experts=experts)


def cells(drawing: str) -> Counter[str]:
    """Number of fields per colour class of a heat map."""
    found = re.findall(r'<path class="(\w+)" d="([^"]*)"', drawing)
    return Counter({colour: path.count("M") for colour, path in found})


@given(st.floats(0, 1e9), st.floats(1e-9, 1e9))
@settings(max_examples=60, deadline=None)
def test_ticks_cover_the_range_with_few_even_steps(low: float, span: float) -> None:
    span = max(span, low * 1e-6)
    axis = ticks(low, low + span)
    slack = 1e-6 * span
    assert axis[0] <= low + slack and axis[-1] >= low + span - slack
    assert 2 <= len(axis) <= 7
    steps = [b - a for a, b in zip(axis, axis[1:], strict=False)]
    assert max(steps) - min(steps) < slack
    assert axis[0] + steps[0] > low - slack and axis[-1] - steps[0] < low + span + slack  # no empty step at an end


def test_ticks_of_a_single_value() -> None:
    assert ticks(0.0, 0.0)[0] == 0.0 < ticks(0.0, 0.0)[-1]


def test_bar_segments_follow_each_other() -> None:
    bar = stacked_bar([Segment("a", "first", 0.5), Segment("b", "<second>", 0.25)], "bars")
    found = [tuple(map(float, m)) for m in re.findall(r'x="([\d.]+)%" y="0" width="([\d.]+)%"', bar)]
    assert found == [(0.0, 50.0), (50.0, 25.0)]
    assert "&lt;second&gt;" in bar


def test_line_breaks_where_nothing_was_measured() -> None:
    chart = line_chart([Line("s1", "error", [1.0, None, 3.0, 4.0])], ["0", "1", "2", "3"], str)
    path = re.search(r'class="line s1" d="([^"]*)"', chart)
    assert path and re.sub(r"[^ML]", "", path[1]) == "MML"
    assert "layer 1: error not measured" in chart


def test_points_are_where_their_values_say() -> None:
    chart = line_chart([Line("s1", "error", [0.0, 2.0, 4.0])], ["0", "1", "2"], str)
    path = re.search(r'class="line s1" d="([^"]*)"', chart)
    assert path
    points = [tuple(map(float, p.split())) for p in re.findall(r"[\d.]+ [\d.]+", path[1])]
    assert [y for _, y in points] == [200.0, 100.0, 0.0]  # 0 at the bottom, the top tick 4 at the top
    assert points[1][0] - points[0][0] == points[2][0] - points[1][0] > 0


def test_perfect_agreement_stays_below_one_hundred_per_cent() -> None:
    chart = line_chart([Line("s1", "agreement", [1.0, 1.0])], ["0", "1"], "{:.3f}".format, fraction=True)
    labels = [float(v) for v in re.findall(r'<span style="top:[\d.]+%">([\d.]+)<', chart)]
    assert max(labels) == 1.0 and min(labels) == 0.98


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_token_legend_names_the_interval_of_every_count(counts: list[int]) -> None:
    low, high = min(counts), max(counts)
    legend = {}
    for colour, text in _ranges(low, high):
        first, _, last = text.partition(" - ")
        legend[colour] = (int(first), int(last or first))
    for count in counts:
        step = _step(count, low, high)
        assert 0 <= step < STEPS
        near = [c for c, (a, b) in legend.items() if a <= count <= b]
        assert len(near) == 1  # intervals do not overlap and leave nothing out
        assert abs(int(near[0][1:]) - step) <= 1  # floating point may move a count that sits on an edge


def test_token_map_marks_each_coverage_problem_once() -> None:
    experts = (
        ExpertInfo(id=0, tokens=5),
        ExpertInfo(id=1, tokens=0),
        ExpertInfo(id=2, tokens=7, fallback="rtn"),
        ExpertInfo(id=3),
    )
    found = token_map([layer_of(*experts)])
    assert found is not None
    assert cells(found.drawing)["bad"] == 2 and cells(found.drawing)["none"] == 1
    assert sum(cells(found.drawing).values()) == 4
    assert "2 of 4 experts have a coverage problem: 1 saw no token at all, 1 " in found.note
    assert "coverage problem: experts 1, 2" in found.drawing
    assert dict(found.legend)["bad"] == "coverage problem"


def test_token_map_is_absent_when_unmeasured_and_quiet_when_all_is_well() -> None:
    assert token_map([layer_of(ExpertInfo(id=0))]) is None
    assert token_map([]) is None
    found = token_map([layer_of(ExpertInfo(id=0, tokens=3))])
    assert found is not None and "bad" not in dict(found.legend) and found.note.startswith("No coverage problem")


def test_layers_of_different_width_share_a_map() -> None:
    layers = [layer_of(*(ExpertInfo(id=i, tokens=i + 1) for i in range(n)), index=n) for n in (2, 9)]
    found = token_map([*layers, layer_of(index=3)])
    assert found is not None and sum(cells(found.drawing).values()) == 11


def test_bit_maps_one_when_equal_two_when_not() -> None:
    same = [ExpertInfo(id=i, bits=ExpertBits(gate_up=b, down=b)) for i, b in enumerate((2, 2, 16))]
    gone = ExpertInfo(id=3, action="pruned")
    (one,) = bit_maps([layer_of(*same, gone)])
    assert sorted(cells(one.drawing).values()) == [1, 1, 2] and cells(one.drawing)["gone"] == 1
    assert [name for _, name in one.legend] == ["removed", "2 bit", "16 bit (source dtype)"]
    assert "6.67 bits" in one.note  # (2 + 2 + 16) / 3
    mixed = [ExpertInfo(id=0, bits=ExpertBits(gate_up=2, down=3))]
    assert [m.title.rpartition(" ")[2] for m in bit_maps([layer_of(*mixed)])] == ["gate_up", "down"]
    assert bit_maps([layer_of(ExpertInfo(id=0))]) == []


def test_error_map_says_where_the_worst_expert_is() -> None:
    first = layer_of(ExpertInfo(id=0, error=0.001), ExpertInfo(id=1, error=0.1), ExpertInfo(id=2))
    second = layer_of(ExpertInfo(id=0, error=0.25, weight_error=0.9), ExpertInfo(id=1, action="pruned"), index=7)
    found = error_map([first, second])
    assert found is not None and "largest is 25 % (layer 7, expert 0)" in found.note and "output" in found.note
    drawn = cells(found.drawing)
    assert (
        drawn["none"] == 1 and drawn["gone"] == 1 and drawn["q0"] == 1 and drawn["q6"] == 1 and sum(drawn.values()) == 5
    )
    assert [name for _, name in found.legend][:2] == ["not measured", "0.1 - 0.22 %"] and len(found.legend) == 8
    weights = error_map([layer_of(ExpertInfo(id=0, weight_error=0.02), ExpertInfo(id=1, weight_error=0.0))])
    assert weights is not None and "weights" in weights.note and [name for _, name in weights.legend] == ["2 %"]
    assert error_map([layer_of(ExpertInfo(id=0, tokens=3))]) is None


@given(st.integers(0, 10**9))
@settings(max_examples=80, deadline=None)
def test_short_counts_fit_a_cell_and_are_close(count: int) -> None:
    text = _short(count)
    assert len(text) <= 5
    scale = {"k": 10**3, "M": 10**6}.get(text[-1], 1)
    assert abs(float(text.rstrip("kM")) * scale - count) <= 0.06 * count
