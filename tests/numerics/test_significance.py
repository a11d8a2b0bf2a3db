"""Standard errors against textbook formulas and the jackknife, paired tests against scipy and enumeration."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from moecompress.numerics.significance import KINDS, Kind, Samples, estimate, kind_of, paired, samples, sign_test


def drawn(seed: int, count: int = 400, sized: bool = False) -> Samples:
    rng = np.random.default_rng(seed)
    w = rng.integers(5, 40, count).astype(float) if sized else np.ones(count)
    return Samples(-w * rng.gamma(4.0, 0.5, count), w)


def value(kind: Kind, x: Any, w: Any) -> float:
    """The metric from its definition."""
    ratio = math.fsum(x) / math.fsum(w)
    return {"mean": ratio, "perplexity": math.exp(-ratio), "bits": -ratio * math.log2(math.e)}[kind]


def test_the_mean_is_the_textbook_case() -> None:
    taken = drawn(0)
    found, stderr = estimate("mean", taken)
    assert found == pytest.approx(taken.x.mean()) and stderr == pytest.approx(stats.sem(taken.x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sized", [False, True])
def test_errors_agree_with_the_jackknife(kind: Kind, sized: bool) -> None:
    taken = drawn(1, sized=sized)
    found, stderr = estimate(kind, taken)
    assert found == pytest.approx(value(kind, taken.x, taken.w))
    n = len(taken.x)
    without = [value(kind, np.delete(taken.x, i), np.delete(taken.w, i)) for i in range(n)]
    jackknife = math.sqrt((n - 1) / n * sum((v - np.mean(without)) ** 2 for v in without))
    assert stderr == pytest.approx(jackknife, rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sized", [False, True])
def test_paired_errors_agree_with_the_jackknife(kind: Kind, sized: bool) -> None:
    first = drawn(2, sized=sized)
    second = Samples(first.x - 0.1 * first.w * np.random.default_rng(3).random(len(first.x)), first.w)
    found = paired(kind, first, second)
    n = len(first.x)
    without = [
        value(kind, np.delete(first.x, i), np.delete(first.w, i))
        - value(kind, np.delete(second.x, i), np.delete(second.w, i))
        for i in range(n)
    ]
    jackknife = math.sqrt((n - 1) / n * sum((v - np.mean(without)) ** 2 for v in without))
    assert found.stderr == pytest.approx(jackknife, rel=0.02)
    assert found.value == pytest.approx(estimate(kind, first)[0] - estimate(kind, second)[0])
    assert found.stderr is not None and found.stderr < (estimate(kind, first)[1] or 0.0)  # why pairing is worth it


def test_means_are_tested_like_scipy() -> None:
    first, second = drawn(4, 40), drawn(5, 40)
    expected = stats.ttest_rel(first.x, second.x)
    found = paired("mean", first, second)
    assert (found.z, found.p, found.test) == (pytest.approx(expected.statistic), pytest.approx(expected.pvalue), "t")


def test_right_or_wrong_is_the_exact_mcnemar_test() -> None:
    a = samples([1] * 30 + [1] * 9 + [0] * 2 + [0] * 20)
    b = samples([1] * 30 + [0] * 9 + [1] * 2 + [0] * 20)
    assert a is not None and b is not None
    found = paired("mean", a, b)
    assert (found.higher, found.lower, found.test, found.count) == (9, 2, "sign", 61)
    assert found.p == pytest.approx(2 * sum(math.comb(11, k) for k in range(3)) / 2**11)
    assert found.value == pytest.approx(7 / 61)


@pytest.mark.parametrize("count", range(1, 9))
def test_the_sign_test_against_enumeration(count: int) -> None:
    for higher in range(count + 1):
        gap = abs(2 * higher - count)
        as_far = sum(abs(2 * sum(signs) - count) >= gap for signs in product((0, 1), repeat=count))
        assert sign_test(higher, count - higher) == pytest.approx(as_far / 2**count)
    assert sign_test(0, 0) is None


def test_higher_means_a_higher_metric() -> None:
    worse, better = samples([-3.0, -2.0, -4.0]), samples([-1.0, -2.5, -1.0])
    assert worse is not None and better is not None
    found = paired("perplexity", worse, better)
    assert found.value > 0 and (found.higher, found.lower) == (2, 1)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=20))
def test_a_model_does_not_differ_from_itself(values: list[float]) -> None:
    taken = samples(values)
    assert taken is not None
    found = paired("mean", taken, taken)
    assert (found.value, found.stderr, found.z, found.p, found.higher, found.lower) == (0, 0, None, None, 0, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_is_known_from_the_value(kind: Kind) -> None:
    taken = drawn(6, sized=True)
    assert kind_of(taken, value(kind, taken.x, taken.w)) == kind
    assert kind_of(taken, 123.456) is None


@pytest.mark.parametrize("bad", [[], ["a"], [[1, 2, 3]], [1.0, math.nan], [[1.0, 0.0]], [[1], [1, 2]], [{"a": 1}]])
def test_what_is_no_number_is_left_out(bad: list[Any]) -> None:
    assert samples(bad) is None


def test_one_sample_has_no_error() -> None:
    taken = samples([0.5])
    assert taken is not None and estimate("mean", taken) == (0.5, None)
    assert paired("mean", taken, taken).stderr is None
