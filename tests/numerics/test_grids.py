"""Grids against float64 loops, brute force and compressed-tensors; order relations between the rules."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moecompress.numerics import grids
from moecompress.numerics.grids import (
    NORM,
    Grid,
    GridRule,
    dequantize,
    find_grid,
    quantize,
    round_to_nearest,
    stored_bits,
)
from moecompress.numerics.packing import pack_codes
from moecompress.types import QuantizedTensor, Scheme

SCHEMES = [
    *(Scheme(bits, group) for bits in (2, 3, 4, 8) for group in (8, -1)),
    *(Scheme(bits, 8, False, "int") for bits in (1, 2, 3, 4, 8)),
    *(Scheme(bits, 8, False, "float") for bits in (1, 2, 4, 8)),
]
BINARY = Scheme(1, 8, binary=True)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def _name(scheme: Scheme) -> str:
    return f"w{scheme.bits}g{scheme.group_size}{'b' if scheme.binary else scheme.zero}"


def _weight(rows: int = 6, columns: int = 24, seed: int = 0, scale: float = 0.02) -> Tensor:
    return scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def _value(q: QuantizedTensor, row: int, column: int) -> float:
    """One stored value by the definition in types.QuantizedTensor, in Python floats."""
    group = column // (q.shape[1] // q.scales.shape[1])
    u, s = int(q.codes[row, column]), float(q.scales[row, group])
    if q.scheme.binary:
        return (2 * u - 1) * s
    z = 2 ** (q.scheme.bits - 1) if q.zeros is None else float(q.zeros[row, group])
    return (u - z) * s


def _group_errors(weight: Tensor, q: QuantizedTensor, importance: Tensor | None = None) -> Tensor:
    """Sum of h |w - q|^NORM per group, float64 [out, G]."""
    error = (weight.double() - dequantize(q, torch.float64)).abs() ** NORM
    if importance is not None:
        error = error * importance.double()
    return error.view(weight.shape[0], q.scales.shape[1], -1).sum(-1)


@pytest.mark.parametrize("scheme", [*SCHEMES, BINARY], ids=_name)
@pytest.mark.parametrize("rule", ["minmax", "mse"])
def test_values_are_nearest_and_match_the_definition(scheme: Scheme, rule: GridRule) -> None:
    weight = _weight()
    q = round_to_nearest(weight, scheme, grid=rule)
    assert q.codes.dtype == torch.uint8 and q.scales.dtype == torch.bfloat16
    values = dequantize(q)
    for row, column in itertools.product(range(6), range(24)):
        assert values[row, column].item() == pytest.approx(_value(q, row, column), rel=1e-6, abs=1e-12)
        one = [torch.full_like(q.codes, u) for u in range(1 << scheme.bits)]
        distances = [
            abs(weight[row, column].item() - _value(QuantizedTensor(c, q.scales, q.zeros, scheme), row, column))
            for c in (one if scheme.bits < 8 else ())
        ]
        if distances:
            chosen = abs(weight[row, column].item() - values[row, column].item())
            assert chosen <= min(distances) * (1 + 1e-4) + 1e-8


@pytest.mark.parametrize("scheme", SCHEMES, ids=_name)
def test_minmax_is_the_formula(scheme: Scheme) -> None:
    weight = _weight()
    grid = find_grid(weight, scheme, "minmax", torch.float32)
    top = 2**scheme.bits - 1
    size = weight.shape[1] // grid.scales.shape[1]
    for row, group in itertools.product(range(6), range(grid.scales.shape[1])):
        w = weight[row, group * size : (group + 1) * size].tolist()
        if scheme.symmetric:
            assert grid.zeros is None
            assert grid.scales[row, group].item() == pytest.approx(max(map(abs, w)) / (top / 2), rel=1e-6)
            continue
        low, high = min(0.0, *w), max(0.0, *w)
        s = (high - low) / top
        assert grid.scales[row, group].item() == pytest.approx(s, rel=1e-6)
        assert grid.zeros is not None
        zero = grid.zeros[row, group].item()
        if scheme.zero == "int":
            assert grid.zeros.dtype == torch.uint8 and abs(zero + low / s) <= 0.5 + 1e-4
        else:
            assert zero == pytest.approx(-low / s, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_minmax_scales_equal_compressed_tensors(bits: int) -> None:
    utils = pytest.importorskip("compressed_tensors.quantization.utils")
    args = pytest.importorskip("compressed_tensors.quantization").QuantizationArgs(num_bits=bits, symmetric=True)
    weight = _weight().view(6, 3, 8)
    theirs, _ = utils.calculate_qparams(weight.amin(-1), weight.amax(-1), args)
    ours = find_grid(weight.view(6, 24), Scheme(bits, 8), "minmax", torch.float32).scales
    torch.testing.assert_close(ours, theirs)


@settings(max_examples=40, deadline=None)
@given(
    scheme=st.sampled_from(SCHEMES),
    seed=st.integers(0, 9999),
    power=st.integers(-6, 6),
    shift=st.floats(-2, 2),
    dtype=st.sampled_from(DTYPES),
    weighted=st.booleans(),
)
def test_mse_is_never_worse_than_minmax(
    scheme: Scheme, seed: int, power: int, shift: float, dtype: torch.dtype, weighted: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tails = torch.distributions.StudentT(3.0)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        weight = (tails.sample((3, 16)) + shift) * 10.0**power
    importance = torch.rand(16, generator=generator) if weighted else None
    errors = {
        rule: _group_errors(
            weight, quantize(weight, find_grid(weight, scheme, rule, dtype, importance), scheme), importance
        )
        for rule in ("minmax", "mse")
    }
    assert torch.isfinite(errors["mse"]).all()
    assert (errors["mse"] <= errors["minmax"] * (1 + 1e-4) + 1e-30).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_is_close_to_the_exhaustive_search(bits: int, symmetric: bool) -> None:
    """Against every ratio 1.00 ... 0.21 of the min-max scale (both signs when symmetric), tried one by one."""
    scheme = Scheme(bits, 32, symmetric, "none" if symmetric else "int")
    weight = _weight(64, 64, seed=1)
    start = find_grid(weight, scheme, "minmax", torch.float32)
    least = torch.full((64, 2), math.inf, dtype=torch.float64)
    for i, sign in itertools.product(range(80), (1, -1) if symmetric else (1,)):
        q = quantize(weight, Grid(start.scales * (sign * (1 - i / 100)), start.zeros), scheme)
        least = torch.minimum(least, _group_errors(weight, q))
    found = _group_errors(weight, quantize(weight, find_grid(weight, scheme, "mse", torch.float32), scheme))
    assert found.sum() <= 1.03 * least.sum()
    assert (found <= 1.5 * least).all()


def test_negative_scales_serve_the_longer_positive_tail() -> None:
    """Codes -2..1: the group {2, -1, 0, ...} needs a negative scale, its negation a positive one."""
    group = torch.tensor([[2.0, -1.0, 0.0, 1.0, 2.0, -1.0, 1.0, 0.0]])
    for weight, sign in ((group, -1), (-group, 1)):
        q = round_to_nearest(weight, Scheme(2, 8), grid="mse", scale_dtype=torch.float32)
        assert math.copysign(1, q.scales.item()) == sign
        torch.testing.assert_close(dequantize(q), weight, rtol=0, atol=0.03)
    worse = round_to_nearest(group, Scheme(2, 8), grid="minmax", scale_dtype=torch.float32)
    assert (dequantize(worse) - group).abs().max() > 0.5


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 9999), weighted=st.booleans())
def test_binary_is_optimal(seed: int, weighted: bool) -> None:
    """No sign pattern with its own best scale has a lower (weighted) squared error: all 2^6 are tried."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(6, generator=generator, dtype=torch.float64)
    h = torch.rand(6, generator=generator, dtype=torch.float64) + 0.1 if weighted else torch.ones(6).double()
    least = math.inf
    for signs in itertools.product((-1.0, 1.0), repeat=6):
        c = torch.tensor(signs, dtype=torch.float64)
        s = (h * w * c).sum() / (h * c * c).sum()
        least = min(least, (h * (w - s * c) ** 2).sum().item())
    weight, scheme = w.float()[None], Scheme(1, 6, binary=True)
    q = round_to_nearest(weight, scheme, scale_dtype=torch.float32, importance=h.float() if weighted else None)
    assert (h * (w - dequantize(q, torch.float64)[0]) ** 2).sum().item() == pytest.approx(least, rel=1e-5)


@pytest.mark.parametrize("scheme", [*SCHEMES, BINARY], ids=_name)
@pytest.mark.parametrize("rule", ["minmax", "mse"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_group_of_zeros_stays_zero(scheme: Scheme, rule: GridRule, dtype: torch.dtype) -> None:
    weight = _weight()
    weight[1] = 0
    weight[2, :8] = 0
    q = round_to_nearest(weight, scheme, grid=rule, scale_dtype=dtype)
    values = dequantize(q)
    assert torch.isfinite(values).all()
    assert torch.equal(values[1], torch.zeros(24))
    assert (q.scales[1] == (0 if scheme.binary else 1)).all()
    if scheme.group_size == 8:
        assert torch.equal(values[2, :8], torch.zeros(8))


@pytest.mark.parametrize("scheme", [*SCHEMES, BINARY], ids=_name)
@pytest.mark.parametrize("rule", ["minmax", "mse"])
@pytest.mark.parametrize("size", [1e-42, 1e-12, 3e-8, 1e5, 1e9, 1e37])
def test_scales_outside_float16_stay_finite(scheme: Scheme, rule: GridRule, size: float) -> None:
    weight = _weight(scale=1.0) * size
    q = round_to_nearest(weight, scheme, grid=rule, scale_dtype=torch.float16)
    assert torch.isfinite(q.scales).all() and torch.isfinite(dequantize(q)).all()
    assert scheme.binary or (q.scales != 0).all()
    if size < 1:  # wrong by at most two of the smallest steps of half precision
        assert (dequantize(q) - weight).abs().max() <= 2.0**-23


@pytest.mark.parametrize("scheme", [Scheme(3, 8), Scheme(2, 8, False, "int"), BINARY], ids=_name)
def test_importance_helps_where_it_lies(scheme: Scheme) -> None:
    weight = _weight(40, 8, seed=3)
    importance = torch.tensor([100.0, 100.0, 1, 1, 1, 1, 1, 1])
    weighted, plain = (
        _group_errors(weight, round_to_nearest(weight, scheme, grid="mse", importance=h), importance).sum()
        for h in (importance, None)
    )
    assert weighted < plain
    scaled = find_grid(weight, scheme, "mse", importance=importance * 1e20)
    assert torch.equal(scaled.scales, find_grid(weight, scheme, "mse", importance=importance).scales)
    none = find_grid(weight, scheme, "mse", importance=torch.zeros(8))
    assert torch.equal(none.scales, find_grid(weight, scheme, "mse").scales)


@pytest.mark.parametrize("scheme", [Scheme(4, 8), Scheme(3, -1), Scheme(4, 8, False, "int"), BINARY], ids=_name)
def test_rows_are_independent_of_each_other_and_of_chunks(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, h = _weight(7), torch.rand(24)
    whole = round_to_nearest(weight, scheme, grid="mse", importance=h)
    monkeypatch.setattr(grids, "_CHUNK", 50)  # two rows at a time
    parts = round_to_nearest(weight, scheme, grid="mse", importance=h)
    assert torch.equal(whole.codes, parts.codes) and torch.equal(whole.scales, parts.scales)


class _LargestTemporary(TorchDispatchMode):
    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and not func.is_view:
                self.largest = max(self.largest, tensor.nbytes)
        return out


def test_search_needs_little_memory() -> None:
    """At most ten temporaries live at once, so 64 MB allow 6 MB each; a whole float32 matrix here has 12.6 MB."""
    weight = _weight(1536, 2048)
    with _LargestTemporary() as seen:
        find_grid(weight, Scheme(4, 32), "mse")
    assert 0 < seen.largest < 6e6


@pytest.mark.parametrize("scheme", [*SCHEMES, BINARY], ids=_name)
def test_stored_bits_count_what_is_stored(scheme: Scheme) -> None:
    q = round_to_nearest(_weight(), scheme)
    parts = [pack_codes(q.codes, scheme.bits), q.scales, *([] if q.zeros is None else [q.zeros])]
    assert stored_bits(q.shape, scheme) == 8 * sum(part.nbytes for part in parts)
    assert stored_bits((3, 5), Scheme(16)) == 3 * 5 * 16


def test_dequantize_rounds_once() -> None:
    q = round_to_nearest(_weight(), Scheme(4, 8))
    assert torch.equal(dequantize(q, torch.bfloat16), dequantize(q).to(torch.bfloat16))


def test_wrong_inputs_say_what_is_allowed() -> None:
    weight = _weight()
    with pytest.raises(ValueError, match="group_size 7 does not divide 24"):
        find_grid(weight, Scheme(4, 7))
    with pytest.raises(ValueError, match="allowed: binary=True or a zero point"):
        find_grid(weight, Scheme(1, 8))
    with pytest.raises(ValueError, match="no codes"):
        find_grid(weight, Scheme(16))
    with pytest.raises(ValueError, match=r"importance: shape \(6,\); allowed: \(24,\)"):
        find_grid(weight, Scheme(4, 8), importance=torch.ones(6))
    with pytest.raises(ValueError, match=r"scales: shape \(6, 3\); allowed: \(5, 3\)"):
        quantize(weight[:5], find_grid(weight, Scheme(4, 8)), Scheme(4, 8))
