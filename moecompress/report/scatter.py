"""Points with error bars as inline SVG; numbers beside the points as HTML, so that they keep their size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from moecompress.report.svg import HEIGHT, WIDTH, ticks

_LOG_FROM = 15.0  # largest over smallest value from which the axis is logarithmic
_NEAR_X, _NEAR_Y = 3.0, 7.0  # per cent of the plot: labels closer than this are written as one


@dataclass(frozen=True)
class Point:
    """label: short, written beside the point, or empty; error: half the length of the bar; None = no bar."""

    label: str
    colour: str
    title: str
    x: float
    y: float
    error: float | None = None


@dataclass(frozen=True)
class Axis:
    """Values at the marks and the place of a value between 0 (low) and 1 (high)."""

    marks: tuple[float, ...]
    place: Callable[[float], float]


def scatter(
    points: Sequence[Point], label: str, show_x: Callable[[float], str], show_y: Callable[[float], str]
) -> Markup:
    """A plot of at least one point. x starts at 0; y is logarithmic when it spans more than a factor of fifteen."""
    across = _linear(0.0, max(p.x for p in points) * 1.08)
    up = _vertical(points)

    def x(value: float) -> float:
        return WIDTH * across.place(value)

    def y(value: float) -> float:
        return HEIGHT * (1 - min(max(up.place(value), 0.0), 1.0))

    grid = Markup('<path class="grid" d="{}{}"/>').format(
        "".join(f"M0 {y(t):.1f}h{WIDTH}" for t in up.marks), "".join(f"M{x(t):.1f} 0v{HEIGHT}" for t in across.marks)
    )
    drawn = Markup("").join(_point(point, x(point.x), y) for point in points)
    left = _labels(up.marks, show_y, lambda t: f"top:{100 * y(t) / HEIGHT:.1f}%")
    bottom = _labels(across.marks, show_x, lambda t: f"left:{100 * x(t) / WIDTH:.1f}%")
    inside = Markup("").join(
        Markup('<span style="left:{:.1f}%;top:{:.1f}%">{}</span>').format(a, b, ", ".join(names))
        for a, b, names in _together(
            [(100 * x(p.x) / WIDTH, 100 * y(p.y) / HEIGHT, p.label) for p in points if p.label]
        )
    )
    return Markup(
        '<div class="chart scatter"><div class="ylabels" aria-hidden="true">{}</div><div class="plot">'
        '<svg viewBox="0 0 {} {}" preserveAspectRatio="none" role="img" aria-label="{}">{}{}</svg>'
        '<div class="marks" aria-hidden="true">{}</div></div>'
        '<div class="xlabels" aria-hidden="true">{}</div></div>'
    ).format(left, WIDTH, HEIGHT, label, grid, drawn, inside, bottom)


def _point(point: Point, x: float, y: Callable[[float], float]) -> Markup:
    bar = ""
    if point.error:
        low, high = y(point.y - point.error), y(point.y + point.error)
        bar = f"M{x:.1f} {low:.1f}V{high:.1f}" + "".join(f"M{x - 5:.1f} {end:.1f}h10" for end in (low, high))
    return Markup(
        '<path class="line {0}" d="{1}"/><path class="dot {0}" d="M{2:.1f} {3:.1f}h.01"><title>{4}</title></path>'
    ).format(point.colour, bar, x, y(point.y), point.title)


def _linear(low: float, high: float) -> Axis:
    marks = ticks(low, high)
    first, last = marks[0], marks[-1]
    return Axis(tuple(marks), lambda value: (value - first) / (last - first))


def _vertical(points: Sequence[Point]) -> Axis:
    """Fits all values with their bars."""
    low = min(p.y - (p.error or 0.0) for p in points)
    high = max(p.y + (p.error or 0.0) for p in points)
    smallest = min(p.y for p in points)
    if smallest > 0 and high / smallest > _LOG_FROM:
        return _logarithmic(max(low, smallest / 3), high)
    return _linear(min(low, 0.0) if low < 0.4 * high else low, high)


def _logarithmic(low: float, high: float) -> Axis:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(powers) <= 4 else (1,)
    marks = [step * 10.0**power for power in powers for step in steps]
    first = max((mark for mark in marks if mark <= low), default=marks[0])
    last = min((mark for mark in marks if mark >= high), default=marks[-1])
    width = math.log(last / first)
    kept = tuple(mark for mark in marks if first <= mark <= last)
    return Axis(kept, lambda value: math.log(value / first) / width if value > 0 else 0.0)


def _labels(marks: Sequence[float], show: Callable[[float], str], style: Callable[[float], str]) -> Markup:
    return Markup("").join(Markup('<span style="{}">{}</span>').format(style(t), show(t)) for t in marks)


def _together(places: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, list[str]]]:
    """Labels that would lie on each other, as one at the first one's place."""
    found: list[tuple[float, float, list[str]]] = []
    for x, y, name in places:
        near = next((row for row in found if abs(row[0] - x) < _NEAR_X and abs(row[1] - y) < _NEAR_Y), None)
        if near:
            near[2].append(name)
        else:
            found.append((x, y, [name]))
    return found
