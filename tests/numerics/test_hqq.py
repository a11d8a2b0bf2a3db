"""HQQ against a float64 loop over one group, and the promise that it never ends worse than it starts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moecompress.numerics.grids import dequantize, find_grid, quantize, round_to_nearest
from moecompress.numerics.hqq import hqq
from moecompress.types import Scheme


def weights(seed: int = 0, rows: int = 12, columns: int = 64, outliers: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator) * 0.02
    if outliers:
        w[:, ::17] *= 6
    return w


def scheme(bits: int, group: int, zero: str) -> Scheme:
    return Scheme(bits, group, zero == "none", zero)  # type: ignore[arg-type]


def loop(w: Tensor, bits: int, iterations: int = 20) -> list[float]:
    """The published iteration on one group in plain float64: the zero point after each step, u = round(w / s + z)."""
    top, values = 2**bits - 1, [float(v) for v in w]
    low, high = min(0.0, *values), max(0.0, *values)
    s = (high - low) / top
    z, beta, zeros = -low / s, 10.0, []
    unit = sum(abs(v) for v in values) / len(values)
    for _ in range(iterations):
        zeros.append(z)
        u = [min(top, max(0.0, float(torch.tensor(v / s + z, dtype=torch.float64).round()))) for v in values]
        total = 0.0
        for v, code in zip(values, u, strict=True):
            miss = (v - (code - z) * s) / unit
            kept = max(0.0, abs(miss) - max(abs(miss), 1e-30) ** -0.3 / beta)
            total += code - (v - unit * (kept if miss > 0 else -kept)) / s
        z, beta = total / len(values), beta * 1.01
    return zeros


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_zero_point_is_the_best_of_the_published_iteration(bits: int) -> None:
    w = weights(3, rows=1, columns=16)
    made = hqq(w, scheme(bits, 16, "float"), scale_dtype=torch.float32, iterations=20)
    start = find_grid(w, scheme(bits, 16, "float"), "minmax", torch.float32)
    s = float(start.scales)
    costs = []
    for z in loop(w[0].double(), bits, 21):
        u = (w[0].double() / s + z).round().clamp(0, 2**bits - 1)
        costs.append(float((w[0].double() - (u - z) * s).abs().sum()))
    assert float((w - dequantize(made)).abs().sum()) == pytest.approx(min(costs), rel=1e-3)
    assert min(costs) < costs[0]


@settings(max_examples=25)
@given(
    seed=st.integers(0, 99),
    bits=st.sampled_from([1, 2, 3, 4, 8]),
    zero=st.sampled_from(["none", "int", "float"]),
    grid=st.sampled_from(["minmax", "mse"]),
    group=st.sampled_from([16, 32, -1]),
)
def test_never_worse_than_its_start(seed: int, bits: int, zero: str, grid: Any, group: int) -> None:
    if bits == 1 and zero == "none":
        kind = Scheme(1, group, binary=True)
    else:
        kind = scheme(bits, group, zero)
    w = weights(seed)
    made = hqq(w, kind, grid=grid)
    start = round_to_nearest(w, kind, grid=grid)
    assert float((w - dequantize(made)).abs().sum()) <= float((w - dequantize(start)).abs().sum()) * (1 + 1e-5)
    assert made.scheme == kind and int(made.codes.max()) < 2**bits and bool(torch.isfinite(dequantize(made)).all())


def test_only_the_zero_point_moves_or_only_the_scale() -> None:
    w = weights()
    start = find_grid(w, scheme(3, 16, "float"), "minmax")
    made = hqq(w, scheme(3, 16, "float"))
    assert torch.equal(made.scales, start.scales) and made.zeros is not None and start.zeros is not None
    assert not torch.equal(made.zeros, start.zeros)
    symmetric = hqq(w, scheme(3, 16, "none"))
    assert symmetric.zeros is None and not torch.equal(
        symmetric.scales, find_grid(w, scheme(3, 16, "none"), "minmax").scales
    )


def test_integer_zero_points_are_codes() -> None:
    made = hqq(weights(), scheme(2, 16, "int"))
    assert made.zeros is not None and made.zeros.dtype == torch.uint8 and int(made.zeros.max()) <= 3


def test_values_on_the_grid_are_kept() -> None:
    kind = scheme(4, 16, "float")
    w = dequantize(quantize(weights(), find_grid(weights(), kind, "minmax"), kind))
    assert float((dequantize(hqq(w, kind)) - w).abs().max()) < 1e-3


@pytest.mark.parametrize("zero", ["none", "int", "float"])
def test_a_group_of_zeros_stays_zero(zero: str) -> None:
    w = weights()
    w[:, :16] = 0
    assert not dequantize(hqq(w, scheme(3, 16, zero)))[:, :16].any()


def test_rows_do_not_depend_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    w = weights()
    whole = hqq(w, scheme(3, 16, "float"))
    monkeypatch.setattr("moecompress.numerics.hqq._ROWS", 128)
    parts = hqq(w, scheme(3, 16, "float"))
    assert torch.equal(whole.codes, parts.codes)
