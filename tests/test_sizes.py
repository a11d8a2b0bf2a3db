from __future__ import annotations

import pytest

from moecompress.sizes import UNITS, Budget, parse_budget, parse_size


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


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("2.5 bits", Budget("bits", 2.5)),
        ("2 bit", Budget("bits", 2.0)),
        (" 2.75 BPW", Budget("bpw", 2.75)),
        ("1.5 GiB", Budget("bytes", 1.5 * 2**30)),
        ("300B", Budget("bytes", 300)),
    ],
)
def test_budgets(text: str, budget: Budget) -> None:
    assert parse_budget(text) == budget


@pytest.mark.parametrize("text", ["2.5", "bits", "-1 bits", "0 bits", "2 pounds", "0 GiB", ""])
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(ValueError, match="budget"):
        parse_budget(text)
