"""AWQ's search spaces against loops: candidates around 1, clipping that never adds output error."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moecompress.numerics.awq import clip_steps, clipped, scale_candidates
from moecompress.numerics.grids import dequantize, round_to_nearest
from moecompress.types import Scheme


def test_candidates_are_powers_of_the_activity_centred_at_one() -> None:
    activity = torch.tensor([0.5, 2.0, 8.0, 1.0])
    made = scale_candidates(activity, 4)
    assert torch.equal(made[0], torch.ones(4))
    for i, row in enumerate(made):
        powers = [float(a) ** (i / 4) for a in activity]
        centre = (max(powers) * min(powers)) ** 0.5
        assert row.tolist() == pytest.approx([p / centre for p in powers], rel=1e-5)


def test_silent_channels_do_not_break_the_others() -> None:
    made = scale_candidates(torch.tensor([0.0, 1.0, 4.0]))
    assert torch.equal(made[:, 0], made[:, 1]) and bool(torch.isfinite(made).all()) and bool((made > 0).all())
    assert torch.equal(scale_candidates(torch.zeros(3)), torch.ones(20, 3))


def test_extreme_activity_stays_finite() -> None:
    made = scale_candidates(torch.tensor([1e-30, 1.0, 1e30]))
    assert bool(torch.isfinite(made).all()) and bool((made > 0).all())


@settings(max_examples=15)
@given(seed=st.integers(0, 99), bits=st.sampled_from([2, 3, 4]), grid=st.sampled_from(["minmax", "mse"]))
def test_clipping_is_the_best_step_of_every_group(seed: int, bits: int, grid: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    w, x = torch.randn(4, 32, generator=generator) ** 3, torch.randn(20, 32, generator=generator)
    scheme = Scheme(bits, 16)
    found = clip_steps(w, x, scheme, grid=grid, steps=6)  # type: ignore[arg-type]

    def error(row: int, group: int, step: int) -> float:
        part = slice(16 * group, 16 * group + 16)
        values = w[row : row + 1, part]
        limit = float(values.abs().max()) * (1 - step / 20)
        kind = Scheme(bits, 16)
        q = dequantize(round_to_nearest(values.clamp(-limit, limit), kind, grid=grid))  # type: ignore[arg-type]
        return float((x[:, part].double() @ (q - values).double().t()).square().sum())

    for row in range(4):
        for group in range(2):
            errors = [error(row, group, step) for step in range(6)]
            assert errors[int(found[row, group])] <= min(errors) * (1 + 1e-4)


def test_no_inputs_mean_no_clipping() -> None:
    assert not clip_steps(torch.randn(4, 32), torch.empty(0, 32), Scheme(3, 16)).any()


def test_clipped_limits_every_group() -> None:
    w = torch.tensor([[1.0, -4.0, 2.0, 8.0]])
    made = clipped(w, torch.tensor([[5, 0]], dtype=torch.uint8))
    assert made.tolist() == [[1.0, -3.0, 2.0, 8.0]]
