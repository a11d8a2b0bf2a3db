"""The heat maps of the report: routed tokens, code bits and errors, layers down, experts across."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from moecompress.report.schema import ExpertInfo, LayerInfo
from moecompress.report.svg import Cell, Row, heat_map
from moecompress.types import PROJECTIONS, Projection

STEPS = 7  # colours of the sequential scale, classes q0 .. q6
BIT_COLOURS = {0: "gone", 1: "q0", 2: "q2", 3: "q3", 4: "q4", 8: "q5", 16: "q6"}


@dataclass(frozen=True)
class Map:
    """A drawn heat map: heading, one sentence, SVG and legend entries (colour class, text)."""

    title: str
    note: str
    drawing: Markup
    legend: tuple[tuple[str, str], ...]


def token_map(layers: Sequence[LayerInfo]) -> Map | None:
    """Tokens per expert, logarithmic, coverage problems in a colour of their own; None when unmeasured."""
    experts = [expert for layer in layers for expert in layer.experts]
    counts = [e.tokens for e in experts if e.tokens]
    if not any(e.tokens is not None for e in experts):
        return None
    low, high = (min(counts), max(counts)) if counts else (1, 1)

    def cell(expert: ExpertInfo) -> Cell:
        text = "" if expert.tokens is None else _short(expert.tokens)
        if expert.uncovered:
            return Cell("bad", text or "?")
        return Cell("none", "?") if expert.tokens is None else Cell(f"q{_step(expert.tokens, low, high)}", text)

    def title(layer: LayerInfo) -> str:
        seen = sorted(e.tokens for e in layer.experts if e.tokens is not None)
        spread = f"min {seen[0]}, median {seen[len(seen) // 2]}, max {seen[-1]}" if seen else "not measured"
        bad = [str(e.id) for e in layer.experts if e.uncovered]
        return f"layer {layer.layer}: tokens per expert {spread}" + (
            f"; coverage problem: experts {', '.join(bad[:20])}{' ...' if len(bad) > 20 else ''}" if bad else ""
        )

    starved, silent = sum(e.uncovered for e in experts), sum(e.tokens == 0 for e in experts)
    note = (
        f"{starved} of {len(experts)} experts have a coverage problem: {silent} saw no token at all, "
        f"{starved - silent} saw some but needed a fallback."
        if starved
        else f"No coverage problem among {len(experts)} experts."
    )
    legend = [("bad", "coverage problem")] if starved else []
    if any(e.tokens is None for e in experts):
        legend.append(("none", "not measured"))
    legend += _ranges(low, high) if counts else []
    return Map("Calibration tokens per expert", note, _draw(layers, cell, title, "tokens per expert"), tuple(legend))


def bit_maps(layers: Sequence[LayerInfo]) -> list[Map]:
    """Code width per expert: one map, or one per projection where they differ; empty when unknown."""
    experts = [expert for layer in layers for expert in layer.experts]
    if not any(e.bits.gate_up is not None or e.bits.down is not None or e.removed for e in experts):
        return []
    if all(e.bits.gate_up == e.bits.down for e in experts):
        return [_bit_map(layers, "gate_up", "Bits per weight code")]
    return [_bit_map(layers, p, f"Bits per weight code: {p}") for p in PROJECTIONS]


def _bit_map(layers: Sequence[LayerInfo], projection: Projection, heading: str) -> Map:
    def width(expert: ExpertInfo) -> int | None:
        return expert.bits.gate_up if projection == "gate_up" else expert.bits.down

    def colour(expert: ExpertInfo) -> str:
        bits = width(expert)
        return ("gone" if expert.removed else "none") if bits is None else BIT_COLOURS.get(bits, "none")

    def cell(expert: ExpertInfo) -> Cell:
        bits = width(expert)
        return Cell(colour(expert), ("" if expert.removed else "?") if bits is None else str(bits))

    def title(layer: LayerInfo) -> str:
        found = [width(e) for e in layer.experts]
        parts = [f"{found.count(b)} x {b} bit" for b in BIT_COLOURS if b in found]
        gone = sum(e.removed for e in layer.experts)
        return f"layer {layer.layer}: " + ", ".join(parts + ([f"{gone} removed"] if gone else []))

    experts = [expert for layer in layers for expert in layer.experts]
    used, kept = {colour(e) for e in experts}, [b for e in experts if (b := width(e)) is not None]
    gone = any(e.removed for e in experts)
    names = [(c, f"{b} bit" if b < 16 else "16 bit (source dtype)") for b, c in BIT_COLOURS.items() if b]
    names = [("gone", "removed" if gone else "0 bit (left out)"), ("none", "not known"), *names]
    legend = [(c, n) for c, n in names if c in used]
    mean = f"Mean over the {len(kept)} stored experts: {sum(kept) / len(kept):.3g} bits." if kept else "None is stored."
    return Map(heading, mean, _draw(layers, cell, title, heading), tuple(legend))


def error_map(layers: Sequence[LayerInfo]) -> Map | None:
    """Error per expert in per cent, logarithmic: of its output, or of its weights in a run without data; None when
    unmeasured."""
    experts = [expert for layer in layers for expert in layer.experts]
    outputs = any(e.error is not None for e in experts)

    def error(expert: ExpertInfo) -> float | None:
        return expert.error if outputs else expert.weight_error

    known = [(value, layer, e) for layer in layers for e in layer.experts if (value := error(e)) is not None]
    if not known:
        return None
    sizes = [value for value, _, _ in known if value > 0]
    low, high = (min(sizes), max(sizes)) if sizes else (1.0, 1.0)

    def cell(expert: ExpertInfo) -> Cell:
        value = error(expert)
        if value is None:
            return Cell("gone", "") if expert.removed else Cell("none", "?")
        return Cell(f"q{_step(value, low, high)}" if value > 0 else "q0", _per_cent(value))

    def title(layer: LayerInfo) -> str:
        found = sorted(value for e in layer.experts if (value := error(e)) is not None)
        spread = (_per_cent(found[at]) for at in (0, len(found) // 2, -1)) if found else ()
        return f"layer {layer.layer}: " + (
            "min {} %, median {} %, max {} %".format(*spread) if found else "not measured"
        )

    value, layer, worst = max(known, key=lambda found: found[0])
    kind = "output on its own tokens" if outputs else "weights"
    note = (
        f"Squared error of each expert's {kind}, relative, in per cent; the largest is {_per_cent(value)} % "
        f"(layer {layer.layer}, expert {worst.id})."
    )
    edges = [low * (high / low) ** (i / STEPS) for i in range(STEPS + 1)]
    spans = [(f"q{i}", f"{_per_cent(a)} - {_per_cent(b)} %") for i, (a, b) in enumerate(pairwise(edges))]
    legend = spans if high > low else [(f"q{STEPS // 2}", f"{_per_cent(low)} %")] if sizes else []
    if any(error(e) is None and not e.removed for e in experts):
        legend.insert(0, ("none", "not measured"))
    return Map("Error per expert", note, _draw(layers, cell, title, "error per expert"), tuple(legend))


def _per_cent(share: float) -> str:
    """Two digits of a share in per cent, at most five characters where it is above 0.01 %: 0.012, 1.2, 12, 120."""
    return f"{100 * share:.0f}" if share >= 0.1 else f"{100 * share:.2g}"


def _draw(
    layers: Sequence[LayerInfo],
    cell: Callable[[ExpertInfo], Cell],
    title: Callable[[LayerInfo], str],
    label: str,
) -> Markup:
    rows = []
    for layer in layers:
        by_id = {e.id: cell(e) for e in layer.experts}
        cells = [by_id.get(i) for i in range(max(by_id, default=-1) + 1)]
        rows.append(Row(f"L{layer.layer}", title(layer), cells))
    return heat_map(rows, label)


def _step(value: float, low: float, high: float) -> int:
    """Which of STEPS logarithmic intervals of [low, high] holds `value`; the middle one if low == high."""
    if low == high:
        return STEPS // 2
    return min(STEPS - 1, int(STEPS * math.log(value / low) / math.log(high / low)))


def _ranges(low: int, high: int) -> list[tuple[str, str]]:
    """Legend of the token scale: the whole numbers in each interval; empty intervals are left out."""
    if low == high:
        return [(f"q{STEPS // 2}", str(low))]
    edges = [low * (high / low) ** (i / STEPS) for i in range(STEPS + 1)]
    firsts = [low] + [math.ceil(e) for e in edges[1:-1]] + [high + 1]
    spans = [(i, firsts[i], firsts[i + 1] - 1) for i in range(STEPS) if firsts[i + 1] > firsts[i]]
    return [(f"q{i}", str(a) if a == b else f"{a} - {b}") for i, a, b in spans]


def _short(count: int) -> str:
    """At most four characters: 999, 1.2k, 12k, 3.4M."""
    for limit, unit in ((10**6, "M"), (10**3, "k")):
        if count >= limit:
            value = count / limit
            return f"{value:.1f}{unit}" if value < 9.95 else f"{value:.0f}{unit}"
    return str(count)
