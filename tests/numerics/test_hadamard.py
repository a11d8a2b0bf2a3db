"""Hadamard matrices of every order that is claimed, and their fast application."""

from __future__ import annotations

import pytest
import torch

from moecompress.numerics.hadamard import default_block, hadamard_matrix, is_known, random_signs, rotated

ORDERS = (1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 44, 48, 60, 68, 76, 84, 108, 140, 152, 180, 256)


@pytest.mark.parametrize("order", ORDERS)
def test_rows_are_orthogonal_signs(order: int) -> None:
    made = hadamard_matrix(order)
    assert bool((made.abs() == 1).all())
    assert torch.equal(made @ made.t(), order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize(("size", "block"), [(768, 768), (2048, 2048), (2880, 2880), (1408, 1408), (14336, 14336)])
def test_sizes_of_real_models_are_known(size: int, block: int) -> None:
    assert default_block(size) == block


def test_unknown_orders_fall_back_to_a_power_of_two() -> None:
    """46 = 2 * 23 cannot be an order; 92 = 4 * 23 and 52 = 4 * 13 are none of Paley's with a prime."""
    assert not is_known(46) and not is_known(92) and not is_known(6)
    assert default_block(46) == 2 and default_block(92) == 4
    with pytest.raises(ValueError, match="order 92"):
        hadamard_matrix(92)
    with pytest.raises(ValueError, match="blocks of 12 in 64"):
        rotated(torch.ones(2, 64), 12)


@pytest.mark.parametrize(("size", "block"), [(64, 64), (64, 16), (48, 12), (48, 48), (80, 20), (56, 28), (72, 36)])
def test_fast_application_equals_the_matrix(size: int, block: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, size, generator=generator, dtype=torch.float64)
    signs = random_signs(size, generator)
    base = hadamard_matrix(block) / block**0.5
    whole = torch.diag(signs) @ torch.block_diag(*[base] * (size // block))
    torch.testing.assert_close(rotated(x, block, signs), x @ whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rotated(x, block), x @ torch.block_diag(*[base] * (size // block)))
    identity = rotated(torch.eye(size, dtype=torch.float64), block, signs)
    torch.testing.assert_close(identity @ identity.t(), torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    assert rotated(x.float(), block, signs).dtype == torch.float32


def test_one_large_channel_is_spread_evenly() -> None:
    x = torch.zeros(1, 64)
    x[0, 9] = 8.0
    assert torch.equal(rotated(x, 64).abs(), torch.ones(1, 64))


def test_signs_follow_the_generator() -> None:
    first, again, other = (random_signs(64, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other) and set(first.tolist()) == {-1.0, 1.0}
