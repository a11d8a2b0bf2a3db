"""quantize.hqq: every form is stored as said, and in its own norm it is never worse than rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engine
import layers
import pytest
import torch

from moecompress.experts import materialise
from moecompress.passes.quantize_hqq import QuantizeHQQ
from moecompress.passes.quantize_rtn import QuantizeRTN
from moecompress.types import LayerWeights, QuantizedTensor, Scheme


@pytest.fixture(scope="module")
def at(bench_a: Path, tmp_path_factory: pytest.TempPathFactory) -> layers.AtLayer:
    return layers.at_layer(bench_a, engine.random_ids(2, 32, vocabulary=4096), tmp_path_factory.mktemp("run"))


def missed(before: LayerWeights, after: LayerWeights) -> float:
    """Sum of |W - Q| over all experts."""
    return sum(
        float((materialise(a.projection(p), torch.float64) - materialise(b.projection(p), torch.float64)).abs().sum())
        for a, b in zip(before.experts, after.experts, strict=True)
        for p in ("gate_up", "down")
    )


@pytest.mark.parametrize("grid", ["minmax", "mse"])
@pytest.mark.parametrize("symmetric, zero", [(True, "float"), (False, "float"), (False, "int")])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_forms(bits: Any, symmetric: bool, zero: Any, grid: Any, at: layers.AtLayer) -> None:
    step = QuantizeHQQ(bits=bits, group_size=32, symmetric=symmetric, zero=zero, grid=grid)
    assert step.check(at.model.facts) == [] and not step.needs_data
    _, after = at.process(step)
    for expert in after.experts:
        for q in (expert.gate_up, expert.down):
            assert isinstance(q, QuantizedTensor)
            assert q.scheme == Scheme(bits, 32, symmetric, "none" if symmetric else zero)
    if symmetric or zero == "int":
        rounded = QuantizeRTN(bits=bits, group_size=32, symmetric=symmetric, grid=grid)
        start = missed(at.weights, at.process(rounded)[1])
        assert missed(at.weights, after) <= start  # a whole step of the zero point is often too far
        assert not symmetric or missed(at.weights, after) < 0.99 * start


def test_no_iterations_are_rounding(at: layers.AtLayer) -> None:
    step = QuantizeHQQ(bits=3, group_size=32, symmetric=True, iterations=0, grid="mse")
    assert layers.same_codes(at.process(step)[1], at.process(QuantizeRTN(bits=3, group_size=32, grid="mse"))[1])


def test_one_symmetric_bit_is_binary(at: layers.AtLayer) -> None:
    step = QuantizeHQQ(bits=1, group_size=32, symmetric=True)
    assert step.scheme.binary
    assert layers.same_codes(at.process(step)[1], at.process(QuantizeRTN(bits=1, group_size=32))[1])
