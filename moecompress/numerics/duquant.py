"""DuQuant (2406.01721): block rotations that spread the largest activations, and a zigzag order between two of them."""

from __future__ import annotations

import torch
from torch import Tensor

from moecompress.numerics.turn import turned
from moecompress.types import Turn


def spreading_rotation(block: int) -> Tensor:
    """R~ float64 [b, b], orthogonal, first row constant 1 / sqrt(b): a lone value at position 0 is spread evenly.

    The reflection that exchanges the first axis and the diagonal.
    """
    axis = torch.full((block,), -(block**-0.5), dtype=torch.float64)
    axis[0] += 1
    length = axis @ axis
    identity = torch.eye(block, dtype=torch.float64)
    return identity if float(length) == 0 else identity - 2 * torch.outer(axis, axis) / length


def random_rotation(size: int, generator: torch.Generator) -> Tensor:
    """float64 [size, size], orthogonal, Haar distributed."""
    drawn = torch.randn(size, size, dtype=torch.float64, generator=generator)
    q, r = torch.linalg.qr(drawn)
    return q * torch.sign(torch.diagonal(r))


def greedy_rotation(x: Tensor, block: int, steps: int, generator: torch.Generator) -> tuple[Tensor, list[float]]:
    """R float64 [b, b] for all blocks of x [n, c], and the peak (largest minus smallest value) after every step.

    Each step takes the largest |value|, in channel m of its block, and multiplies by E R~ Q E: E swaps channels 0 and
    m, R~ spreads channel 0, Q = diag(1, Q') mixes the others at random. R is the product of the steps up to the one
    with the smallest peak, none of them when nothing gets smaller; so the peak never grows.
    """
    base = spreading_rotation(block)
    current = x.double().reshape(-1, block)
    made, best = torch.eye(block, dtype=torch.float64), torch.eye(block, dtype=torch.float64)
    peaks = [_peak(current)]
    for _ in range(steps):
        at = int(current.abs().argmax()) % block
        mixing = torch.eye(block, dtype=torch.float64)
        mixing[1:, 1:] = random_rotation(block - 1, generator)
        swap = torch.arange(block)
        swap[0], swap[at] = at, 0
        step = (base @ mixing)[swap][:, swap]
        current, made = current @ step, made @ step
        peaks.append(_peak(current))
        if peaks[-1] < min(peaks[:-1]):
            best = made
    return best, peaks


def zigzag(sizes: Tensor, block: int) -> Tensor:
    """A permutation int64 [c] that deals channels to the c / b blocks in snake order of their size [c].

    1, 2, ..., B, B, ..., 2, 1, 1, ...: every block gets large and small channels alike, the largest first.
    """
    blocks = sizes.numel() // block
    dealt = torch.argsort(sizes, descending=True, stable=True).reshape(block, blocks)
    dealt[1::2] = dealt[1::2].flip(1)
    return dealt.t().reshape(-1)


def duquant(x: Tensor, block: int, steps: int, permute: bool, generator: torch.Generator) -> tuple[Turn, list[float]]:
    """The turn R1 P R2 for inputs like x [n, c] and the peaks before, after R1, after R2 (R1 alone without `permute`).

    block divides c. With a single block a permutation changes nothing and is left out.
    """
    first, peaks = greedy_rotation(x, block, steps, generator)
    turn = Turn(first.float())
    if not permute or x.shape[1] == block:
        return turn, [peaks[0], min(peaks)]
    halfway = turned(x.double(), turn)
    order = zigzag(halfway.abs().amax(0), block)
    second, later = greedy_rotation(halfway[:, order], block, steps, generator)
    return Turn(first.float(), order.to(torch.int32), second.float()), [peaks[0], min(peaks), min(later)]


def _peak(x: Tensor) -> float:
    return float(x.max() - x.min())
