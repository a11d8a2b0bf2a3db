"""Numbers as people read them. Every function turns None into NOT_MEASURED."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moecompress import progress

NOT_MEASURED = "not measured"


def data_size(count: int | None) -> str:
    """Bytes in binary units, three significant digits: 13.8 GiB."""
    if count is None:
        return NOT_MEASURED
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1023.5:
            break
        value, unit = value / 1024, larger
    if unit == "B":
        return f"{count} B"
    return (f"{value:.0f}" if value >= 999.5 else f"{value:#.3g}".rstrip(".")) + f" {unit}"


def duration(seconds: float | None) -> str:
    """As `progress.duration`, or "not measured"."""
    return NOT_MEASURED if seconds is None else progress.duration(seconds)


def number(value: float | None, digits: int = 4) -> str:
    """`digits` significant digits (trailing zeros kept, so that columns line up); integers in full."""
    if value is None:
        return NOT_MEASURED
    if isinstance(value, int) or value == 0:
        return f"{value:.0f}"
    if 10**digits <= abs(value) < 1e15:
        return f"{value:.0f}"
    return f"{value:#.{digits}g}".rstrip(".")


def percent(fraction: float | None) -> str:
    """A fraction as per cent with one decimal."""
    return NOT_MEASURED if fraction is None else f"{100 * fraction:.1f} %"


def with_error(value: float | None, stderr: float | None) -> str:
    """`value ± stderr`, or the value alone when its error is unknown."""
    text = number(value)
    return text if value is None or stderr is None else f"{text} ± {number(stderr, 2)}"


def probability(p: float | None) -> str:
    """A p-value: two digits, `< 0.0001` below that."""
    return NOT_MEASURED if p is None else "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def difference(value: float | None, stderr: float | None, p: float | None) -> str:
    """`-0.013 ± 0.004 (p = 0.0011)`: a paired difference."""
    text = with_error(value, stderr)
    signed = f"+{text}" if value is not None and value > 0 else text
    return signed if p is None else f"{signed} (p {'' if p < 1e-4 else '= '}{probability(p)})"


def smaller(before: int | None, after: int | None) -> str | None:
    """`3.42x smaller` (or larger, or unchanged), None when it cannot be said."""
    if not before or not after:
        return None
    if before == after:
        return "unchanged"
    return f"{before / after:.2f}x smaller" if after < before else f"{after / before:.2f}x larger"


def against_plan(actual: float | None, planned: float | None, shown: str) -> str:
    """`81 % of the planned 6.98 GiB`; `planned: 6.98 GiB` without a measurement; "" without a plan.

    shown: the plan as text.
    """
    if planned is None:
        return ""
    return (
        f"planned: {shown}"
        if actual is None or not planned
        else f"{100 * actual / planned:.0f} % of the planned {shown}"
    )


def evaluation_text(result: Mapping[str, Any]) -> str:
    """What an evaluation found, for a terminal."""
    texts, agreement = result.get("perplexity") or {}, result.get("top1_agreement") or {}
    bits = result.get("activation_bits")
    rows = [f"inputs      rounded to int{bits} on request; nothing is saved"] if bits else []
    rows += [f"perplexity  {name}: {with_error(v['value'], v['stderr'])}" for name, v in texts.items()]
    rows += [f"kl          {name}: {number(value)} nats per token" for name, value in (result.get("kl") or {}).items()]
    rows += [f"agreement   {name}: {percent(v)} of the most likely tokens" for name, v in agreement.items()]
    paired = result.get("tasks_paired") or {}
    for task, metrics in (result.get("tasks") or {}).items():
        for name, v in metrics.items():
            row = f"task        {task}: {name} {with_error(v['value'], v['stderr'])}"
            change = paired.get(task, {}).get(name)
            shown = change and difference(change["value"], change["stderr"], change["p"])
            rows.append(f"{row}, {shown} against the reference" if shown else row)
    return "\n".join(rows)
