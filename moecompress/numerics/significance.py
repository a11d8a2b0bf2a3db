"""Values with standard errors from per-sample results, and paired differences between two models on equal samples.

Every metric here is g(R) of one ratio R = sum(x) / sum(w) over samples: a mean (w = 1), a perplexity per token, word or
byte (x = log-likelihood, w = count), bits per byte. Standard errors are of the first order (delta method).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["mean", "perplexity", "bits"]  # g(R) = R | exp(-R) | -R / ln 2
KINDS: tuple[Kind, ...] = ("mean", "perplexity", "bits")


@dataclass(frozen=True)
class Samples:
    """One metric on n samples. x, w: float64 [n]; w is all ones unless the samples have sizes."""

    x: NDArray[np.float64]
    w: NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """First minus second on the same samples. z: value / stderr; higher, lower: samples where the metric is.

    p: two-sided, of `test`: the exact sign test when every sample is 0 or 1 (McNemar), else Student's t with n - 1
    degrees of freedom. stderr, z, p are None where they cannot be said (one sample, or no sample differs).
    """

    value: float
    stderr: float | None
    count: int
    z: float | None
    higher: int
    lower: int
    p: float | None
    test: Literal["sign", "t"]


def samples(values: Sequence[float | Sequence[float]]) -> Samples | None:
    """From numbers, or from [x, w] pairs; None for anything else or for values that are not finite."""
    try:
        found = np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        return None
    if found.ndim == 1:
        found = np.stack([found, np.ones_like(found)], axis=1)
    if found.ndim != 2 or found.shape[1:] != (2,) or not len(found) or not np.isfinite(found).all():
        return None
    return Samples(found[:, 0], found[:, 1]) if (found[:, 1] > 0).all() else None


def kind_of(found: Samples, reported: float) -> Kind | None:
    """The metric whose value on these samples is the reported one; None when none gives it."""
    return next((kind for kind in KINDS if math.isclose(_transform(kind, found)[0], reported, rel_tol=1e-6)), None)


def estimate(kind: Kind, found: Samples) -> tuple[float, float | None]:
    """(value, standard error); the error is None for a single sample."""
    value, influence = _transform(kind, found)
    return value, _stderr(influence)


def paired(kind: Kind, first: Samples, second: Samples) -> Difference:
    """first - second. Row i of both is the same sample."""
    (a, of_a), (b, of_b) = _transform(kind, first), _transform(kind, second)
    change = first.x / first.w - second.x / second.w
    change = change if kind == "mean" else -change
    higher, lower = int((change > 0).sum()), int((change < 0).sum())
    stderr = _stderr(of_a - of_b)
    z = (a - b) / stderr if stderr else None
    binary = kind == "mean" and bool(np.isin(np.concatenate([first.x, second.x]), (0.0, 1.0)).all())
    p = sign_test(higher, lower) if binary else student(z, len(change))
    return Difference(a - b, stderr, len(change), z, higher, lower, p, "sign" if binary else "t")


def sign_test(higher: int, lower: int) -> float | None:
    """Two-sided exact probability of a split at least this uneven when both sides are equally likely."""
    from scipy.stats import binomtest

    return float(binomtest(higher, higher + lower, 0.5).pvalue) if higher + lower else None


def student(z: float | None, count: int) -> float | None:
    """Two-sided probability of |t| >= |z| with count - 1 degrees of freedom."""
    from scipy.stats import t

    return float(2 * t.sf(abs(z), count - 1)) if z is not None and count > 1 else None


def _transform(kind: Kind, found: Samples) -> tuple[float, NDArray[np.float64]]:
    """g(R) and what each sample adds to its deviation: g'(R) (x - R w) / sum(w)."""
    total = float(found.w.sum())
    ratio = float(found.x.sum()) / total
    with np.errstate(over="ignore"):
        value = {"mean": ratio, "perplexity": float(np.exp(-ratio)), "bits": -ratio / math.log(2)}[kind]
    slope = {"mean": 1.0, "perplexity": -value, "bits": -1 / math.log(2)}[kind]
    return value, slope * (found.x - ratio * found.w) / total


def _stderr(influence: NDArray[np.float64]) -> float | None:
    count = len(influence)
    return math.sqrt(float((influence**2).sum()) * count / (count - 1)) if count > 1 else None
