"""DuQuant's rotations and order, and turns in general: orthogonal, exact, and better for activations with outliers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moecompress.numerics.activation import rounded_activations
from moecompress.numerics.duquant import duquant, greedy_rotation, random_rotation, spreading_rotation, zigzag
from moecompress.numerics.turn import turn_matrix, turned, unturned, without_turns
from moecompress.types import ExpertWeights, Turn


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spiky(rows: int = 40, columns: int = 64, seed: int = 0) -> Tensor:
    """Normal values, two channels 30 times larger."""
    x = torch.randn(rows, columns, generator=draw(seed))
    x[:, [5, columns - 3]] *= 30
    return x


def off(rotation: Tensor) -> float:
    return float((rotation @ rotation.t() - torch.eye(len(rotation), dtype=rotation.dtype)).abs().max())


@pytest.mark.parametrize("block", [2, 16, 128])
def test_the_spreading_rotation(block: int) -> None:
    made = spreading_rotation(block)
    assert off(made) < 1e-14
    torch.testing.assert_close(made[0], torch.full((block,), block**-0.5, dtype=torch.float64))


def test_random_rotations_are_orthogonal_and_follow_the_generator() -> None:
    first, again, other = (random_rotation(12, draw(seed)) for seed in (0, 0, 1))
    assert off(first) < 1e-13 and torch.equal(first, again) and not torch.equal(first, other)


def test_the_greedy_rotation_against_a_slow_replay() -> None:
    """Steps multiplied out one by one on explicit block-diagonal matrices; the kept prefix has the smallest peak."""
    x, block, steps = spiky(6, 16), 8, 5
    found, peaks = greedy_rotation(x, block, steps, draw())
    generator, current, product = draw(), x.double().clone(), torch.eye(block, dtype=torch.float64)
    wanted, best = product, float(current.max() - current.min())
    assert peaks[0] == best
    for step in range(steps):
        flat = current.abs().argmax()
        m = int(flat) % 16 % block
        swap = torch.eye(block, dtype=torch.float64)
        swap[:, [0, m]] = swap[:, [m, 0]]
        mixing = torch.block_diag(torch.ones(1, 1, dtype=torch.float64), random_rotation(block - 1, generator))
        rotation = swap @ spreading_rotation(block) @ mixing @ swap
        current = current @ torch.block_diag(rotation, rotation)
        product = product @ rotation
        peak = float(current.max() - current.min())
        assert peaks[step + 1] == pytest.approx(peak, rel=1e-9)
        if peak < best:
            wanted, best = product, peak
    torch.testing.assert_close(found, wanted)
    assert off(found) < 1e-12


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([8, 16, 32]))
def test_zigzag_is_a_permutation_that_evens_out_blocks(seed: int, block: int) -> None:
    sizes = torch.rand(64, generator=draw(seed)) ** 4
    order = zigzag(sizes, block)
    assert torch.equal(order.sort().values, torch.arange(64))
    means = sizes[order].reshape(-1, block).mean(1)
    assert float(means.std()) <= float(sizes.reshape(-1, block).mean(1).std()) + 1e-6
    inside = sizes[order].reshape(-1, block)
    assert bool((inside[:, 1:] <= inside[:, :-1]).all())


def test_zigzag_in_snake_order() -> None:
    sizes = torch.tensor([1.0, 8, 3, 6, 5, 4, 7, 2])
    blocks = sizes[zigzag(sizes, 4)].reshape(2, 4).tolist()
    assert blocks == [[8, 5, 4, 1], [7, 6, 3, 2]]


@pytest.mark.parametrize("permute", [True, False])
def test_a_turn_is_orthogonal_exact_and_lowers_the_peak(permute: bool) -> None:
    x, w = spiky(), torch.randn(24, 64, generator=draw(1))
    turn, peaks = duquant(x, 16, 32, permute, draw())
    matrix = turn_matrix(turn, 64)
    assert off(matrix) < 1e-5
    assert (turn.order is not None) == (turn.second is not None) == permute
    assert peaks == sorted(peaks, reverse=True) and peaks[-1] < peaks[0] / 2
    torch.testing.assert_close(turned(x, turn).double(), x.double() @ matrix, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(turned(x, turn) @ turned(w, turn).t(), x @ w.t(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(unturned(turned(x, turn), turn), x, rtol=1e-4, atol=1e-4)
    expert = ExpertWeights(turned(w, turn), w, gate_up_turn=turn)
    plain = without_turns(expert)
    assert plain.gate_up_turn is None and plain.down is w
    torch.testing.assert_close(plain.gate_up, w, rtol=1e-4, atol=1e-4)  # type: ignore[arg-type]

    def lost(values: Tensor) -> float:
        return float((rounded_activations(values, 4) - values).square().sum())

    assert lost(turned(x, turn)) < lost(x) * (0.5 if permute else 0.7)


def test_a_single_block_needs_no_order() -> None:
    turn, _ = duquant(spiky(columns=64), 64, 4, True, draw())
    assert turn.order is None and turn.second is None


def test_flat_activations_are_left_alone() -> None:
    turn, peaks = duquant(torch.zeros(3, 16), 8, 3, False, draw())
    assert torch.equal(turn.first, torch.eye(8)) and peaks == [0, 0]


def test_parts_are_applied_in_order() -> None:
    """first, then the order, then second: on a turn of three different parts, element by element."""
    x = torch.randn(3, 8, generator=draw())
    first, second = random_rotation(4, draw(1)).float(), random_rotation(4, draw(2)).float()
    order = torch.tensor([3, 0, 7, 1, 2, 6, 5, 4])
    step = torch.cat([x[:, :4] @ first, x[:, 4:] @ first], 1)
    step = torch.stack([step[:, int(j)] for j in order], 1)
    wanted = torch.cat([step[:, :4] @ second, step[:, 4:] @ second], 1)
    torch.testing.assert_close(turned(x, Turn(first, order, second)), wanted)
