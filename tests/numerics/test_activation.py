"""Rounding of activations against a slow loop, and what it must never do."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moecompress.numerics.activation import activation_codes, rounded_activations


def slow(row: list[float], bits: int, clip: float) -> tuple[list[int], float]:
    """One token, exactly, but for the float32 scale: codes with ties to even, and the scale."""
    top = 2 ** (bits - 1) - 1
    largest = max(abs(value) for value in row)
    scale = float(torch.tensor(largest) * (clip / top))
    scale = scale if scale > 0 else 1.0
    codes = [round(Fraction(float(torch.tensor(value) / torch.tensor(scale)))) for value in row]  # half to even
    return [max(-top - 1, min(top, code)) for code in codes], scale


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("clip", [1.0, 0.9, 0.5])
def test_against_a_slow_loop(bits: int, clip: float) -> None:
    x = torch.randn(20, 24, generator=torch.Generator().manual_seed(bits))
    x[0], x[1], x[2, 3] = 0, 1.5, 1000.0  # a zero row, a constant row, a row with an outlier
    codes, scales = activation_codes(x, bits, clip)
    assert codes.dtype == torch.int8 and scales.dtype == torch.float32 and scales.shape == (20, 1)
    for row, found, scale in zip(x.tolist(), codes.tolist(), scales[:, 0].tolist(), strict=True):
        assert (found, scale) == slow(row, bits, clip)
    assert torch.equal(rounded_activations(x, bits, clip), codes * scales)
    assert not rounded_activations(x, bits, clip)[0].any() and float(scales[0]) == 1


def test_ties_go_to_the_even_code() -> None:
    row = torch.tensor([[7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    assert activation_codes(row, 4)[0].tolist() == [[7, 0, 2, 2, 0, -2, -2]]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([4, 8]), st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_token_is_rounded_by_itself(seed: int, bits: int, dtype: torch.dtype) -> None:
    """Batches do not matter, signs and powers of two pass through, and no value moves by more than half a step."""
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)
    made = rounded_activations(x, bits)
    assert made.dtype == dtype
    assert torch.equal(made, torch.cat([rounded_activations(row[None], bits) for row in x]))
    assert torch.equal(rounded_activations(-x * 4, bits), -made * 4)
    codes, scales = activation_codes(x, bits)
    assert bool(((codes * scales - x.float()).abs() <= 0.5001 * scales).all())
    assert int(codes.abs().amax()) == 2 ** (bits - 1) - 1


def test_more_bits_and_less_spread_are_better() -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    spiky = x.clone()
    spiky[:, 5] *= 40

    def lost(values: Tensor, bits: int, clip: float = 1.0) -> float:
        made = rounded_activations(values, bits, clip)
        return float((made - values).square().sum() / values.square().sum())

    def small(values: Tensor, bits: int) -> float:
        """Of all channels but the outlier's."""
        made, keep = rounded_activations(values, bits), torch.arange(64) != 5
        return float((made - values)[:, keep].square().sum() / values[:, keep].square().sum())

    assert lost(x, 8) < lost(x, 4) / 100
    assert lost(x, 4, 0.9) < lost(x, 4)  # normal values: clipping a little pays at 4 bits
    assert small(spiky, 4) > 20 * small(x, 4)


@pytest.mark.parametrize(("bits", "clip"), [(3, 1.0), (16, 1.0), (4, 0.0), (4, 1.1)])
def test_other_settings_are_refused(bits: int, clip: float) -> None:
    with pytest.raises(ValueError, match="allowed"):
        activation_codes(torch.ones(2, 4), bits, clip)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_rounded_to_something_finite(bad: float) -> None:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    x[1, 5] = bad
    found = rounded_activations(x, 4)
    assert not bool(torch.isfinite(found[1]).any())
    assert torch.equal(found[[0, 2]], rounded_activations(x[[0, 2]], 4))
