"""Byte sizes as people write them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)\s*")
_SPELLING = {unit.lower(): unit for unit in UNITS}


def parse_size(text: str) -> int:
    """Bytes of `"4GiB"`, `"1.5 GB"` or `"512 mib"`. Raises ValueError when it is not a size."""
    found = _SIZE.fullmatch(text)
    unit = _SPELLING.get(found.group(2).lower()) if found else None
    if found is None or unit is None:
        raise ValueError(f"'{text}' is not a size; write a number and a unit ({', '.join(UNITS)}), for example 4GiB")
    size = int(float(found.group(1)) * UNITS[unit])
    if size < 1:
        raise ValueError(f"'{text}' is no bytes at all; give a size above zero")
    return size


@dataclass(frozen=True)
class Budget:
    """What the routed experts may take. kind: `bits` = mean code bits, `bpw` = stored bits, `bytes` = the output."""

    kind: Literal["bits", "bpw", "bytes"]
    value: float


def parse_budget(text: str) -> Budget:
    """`"2.5 bits"`, `"2.75 bpw"` or a size such as `"12 GiB"`. Raises ValueError when it is none of them."""
    found = _SIZE.fullmatch(text)
    unit = found.group(2).lower() if found else ""
    if found is not None and unit in ("bit", "bits", "bpw"):
        value = float(found.group(1))
        if value <= 0:
            raise ValueError(f"'{text}' is no budget; give a number above zero")
        return Budget("bpw" if unit == "bpw" else "bits", value)
    try:
        return Budget("bytes", parse_size(text))
    except ValueError:
        allowed = "'2.5 bits' (mean code bits), '2.75 bpw' (stored bits per weight) or '12 GiB' (whole output)"
        raise ValueError(f"'{text}' is not a budget; allowed: {allowed}") from None
