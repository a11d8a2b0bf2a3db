"""Byte sizes as people write them."""

from __future__ import annotations

import re

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
