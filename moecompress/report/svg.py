"""Charts as inline SVG (and a little HTML for axis labels, so that text keeps its size at every page width).

Colours are CSS classes; the style sheet gives each a value for light and for dark pages. All text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 1000, 200  # units of the plot area; stretched to the box by the browser


@dataclass(frozen=True)
class Segment:
    """A part of a stacked bar: colour class, hover text, fraction of the full width."""

    colour: str
    title: str
    fraction: float


@dataclass(frozen=True)
class Line:
    """A series over the layers; None leaves a gap."""

    colour: str
    name: str
    values: Sequence[float | None]


@dataclass(frozen=True)
class Cell:
    """A field of a heat map; `text` is written inside where there is room."""

    colour: str
    text: str = ""


@dataclass(frozen=True)
class Row:
    """A line of a heat map: label at the left, hover text, one cell per expert id (None = no such expert)."""

    label: str
    title: str
    cells: Sequence[Cell | None]


def stacked_bar(segments: Sequence[Segment], label: str) -> Markup:
    """One horizontal bar as wide as its box; segments are laid end to end, the rest stays empty."""
    parts, start = [], 0.0
    for segment in segments:
        width = 100 * segment.fraction
        parts.append(
            Markup('<rect class="{}" x="{:.3f}%" y="0" width="{:.3f}%" height="28"><title>{}</title></rect>').format(
                segment.colour, start, width, segment.title
            )
        )
        start += width
    return Markup('<svg class="bar" role="img" aria-label="{}">{}</svg>').format(label, Markup("").join(parts))


def ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers that cover [low, high], about `wanted` steps of 1, 2, 2.5 or 5 times a power of ten."""
    span = high - low if high > low else (abs(high) or 1.0)
    power = 10 ** math.floor(math.log10(span / wanted))
    step = next((s * power for s in (1, 2, 2.5, 5) if s * power * wanted >= span * 0.999), 10 * power)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * i for i in range(first, max(last, first + 1) + 1)]


def line_chart(
    lines: Sequence[Line],
    labels: Sequence[str],
    show: Callable[[float], str],
    fraction: bool = False,
) -> Markup:
    """Lines over the layers. labels: one per position; show: value -> text; fraction: the axis ends at 1 and
    spans 0.02 at least, else it starts at 0. The caller makes sure that at least one value is not None."""
    known = [v for line in lines for v in line.values if v is not None]
    axis = ticks(min(0.98, *known), 1.0) if fraction else ticks(0.0, max(known))
    low, high = axis[0], axis[-1]

    def x(i: int) -> float:
        return WIDTH * (0.5 if len(labels) == 1 else 0.02 + 0.96 * i / (len(labels) - 1))

    def y(value: float) -> float:
        return HEIGHT * (high - value) / (high - low)

    grid = Markup('<path class="grid" d="{}"/>').format("".join(f"M0 {y(t):.1f}h{WIDTH}" for t in axis))
    drawn = Markup("").join(_line(line, x, y, small=len(labels) > 24) for line in lines)
    width = WIDTH / len(labels)
    hover = Markup("").join(
        Markup('<rect class="hit" x="{:.1f}" y="0" width="{:.1f}" height="{}"><title>{}</title></rect>').format(
            x(i) - width / 2, width, HEIGHT, _hover(lines, i, label, show)
        )
        for i, label in enumerate(labels)
    )
    left = Markup("").join(
        Markup('<span style="top:{:.1f}%">{}</span>').format(100 * y(t) / HEIGHT, show(t)) for t in axis
    )
    every = max(1, math.ceil(len(labels) / 8))
    bottom = Markup("").join(
        Markup('<span style="left:{:.1f}%">{}</span>').format(100 * x(i) / WIDTH, label)
        for i, label in enumerate(labels)
        if i % every == 0
    )
    return Markup(
        '<div class="chart"><div class="ylabels" aria-hidden="true">{}</div><svg viewBox="0 0 {} {}" '
        'preserveAspectRatio="none" role="img" aria-label="{}">{}{}{}</svg>'
        '<div class="xlabels" aria-hidden="true">{}</div></div>'
    ).format(left, WIDTH, HEIGHT, ", ".join(line.name for line in lines), grid, drawn, hover, bottom)


def _line(line: Line, x: Callable[[int], float], y: Callable[[float], float], small: bool) -> Markup:
    pen, steps, dots = "M", [], []
    for i, value in enumerate(line.values):
        if value is None:
            pen = "M"
            continue
        steps.append(f"{pen}{x(i):.1f} {y(value):.1f}")
        dots.append(f"M{x(i):.1f} {y(value):.1f}h.01")
        pen = "L"
    return Markup('<path class="line {0}" d="{1}"/><path class="dot{3} {0}" d="{2}"/>').format(
        line.colour, "".join(steps), "".join(dots), " small" if small else ""
    )


def _hover(lines: Sequence[Line], i: int, label: str, show: Callable[[float], str]) -> str:
    found = [(line.name, line.values[i]) for line in lines]
    return f"layer {label}: " + ", ".join(f"{name} {'not measured' if v is None else show(v)}" for name, v in found)


def heat_map(rows: Sequence[Row], label: str) -> Markup:
    """Layers down, experts across. One path per colour keeps 61 x 256 cells small; hover text is per row."""
    columns = max(len(row.cells) for row in rows)
    wide = max(4, min(44, 1100 // columns))
    tall = 28 if len(rows) <= 4 else 20 if len(rows) <= 24 else 11
    gap = 2 if wide >= 12 else 1 if wide >= 6 else 0
    margin, head = 8 + 7 * max(len(row.label) for row in rows), 18
    size = margin + columns * wide, head + len(rows) * tall
    paths: dict[str, list[str]] = {}
    written = []
    for r, row in enumerate(rows):
        for c, cell in enumerate(row.cells):
            if cell is None:
                continue
            x, y, w, h = margin + c * wide, head + r * tall, wide - gap, tall - max(gap, 1)
            paths.setdefault(cell.colour, []).append(f"M{x} {y}h{w}v{h}h-{w}z")
            if cell.text and wide >= 30 and tall >= 20:
                written.append(
                    Markup('<text class="in {}" x="{}" y="{}">{}</text>').format(
                        cell.colour, x + w / 2, y + h / 2 + 4, cell.text
                    )
                )
    cells = Markup("").join(Markup('<path class="{}" d="{}"/>').format(k, "".join(v)) for k, v in paths.items())
    return Markup(
        '<div class="scroll" tabindex="0"><svg class="map" width="{0}" height="{1}" viewBox="0 0 {0} {1}" '
        'role="img" aria-label="{2}">{3}{4}{5}{6}</svg></div>'
    ).format(
        *size,
        label,
        cells,
        Markup("").join(written),
        _column_labels(columns, wide, margin),
        _rows(rows, size, tall),
    )


def _column_labels(columns: int, wide: int, margin: int) -> Markup:
    every = next(n for n in (1, 2, 4, 8, 16, 32, 64, columns) if n * wide >= 30 or n >= columns)
    return Markup("").join(
        Markup('<text class="axis" text-anchor="middle" x="{}" y="12">{}</text>').format(margin + (c + 0.5) * wide, c)
        for c in range(0, columns, every)
    )


def _rows(rows: Sequence[Row], size: tuple[int, int], tall: int) -> Markup:
    every = 1 if tall >= 16 else 4  # labels of thin lines would touch
    head = size[1] - len(rows) * tall
    return Markup("").join(
        Markup('{}<rect class="hit" x="0" y="{}" width="{}" height="{}"><title>{}</title></rect>').format(
            Markup('<text class="axis" x="0" y="{}">{}</text>').format(
                head + r * tall + tall / 2 + 3.5, escape(row.label)
            )
            if r % every == 0
            else "",
            head + r * tall,
            size[0],
            tall,
            row.title,
        )
        for r, row in enumerate(rows)
    )
