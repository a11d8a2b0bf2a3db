from __future__ import annotations

import pytest

from moecompress.sizes import UNITS, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1B", 1),
        ("4GiB", 4 * 2**30),
        (" 1.5 gb ", 1_500_000_000),
        ("512 mib", 2**29),
        ("0.5KiB", 512),
        ("2TB", 2 * 10**12),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "4", "GiB", "4 G", "-1GiB", "1e3MB", "4GiB!", "4 GiB 2"])
def test_what_is_no_size_is_refused_with_all_units(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size") as caught:
        parse_size(text)
    assert repr(text)[1:-1] in str(caught.value) and all(unit in str(caught.value) for unit in UNITS)


def test_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="above zero"):
        parse_size("0.0 GiB")
