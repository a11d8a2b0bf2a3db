"""Learned rounding of a whole Mixture-of-Experts block (SignRound, 2309.05516, from any start, by sign-SGD or Adam).

The block's output on real tokens is compared with its target, each expert gets its own part of the error, and the
gradients stay inside the block. Memory: the learned numbers of one block and the activations of one batch; what a
batch needs is [tokens, K, ...], never [E, T, H].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moecompress.numerics.block import BlockSample, routed
from moecompress.numerics.rounding import Adam, LearnedMatrix
from moecompress.types import QuantizedTensor

Optimizer = Literal["adam", "sign_sgd"]
Decay = Literal["cosine", "linear"]
Rounding = Literal["soft", "straight"]
ExpertForward = Callable[[int, Tensor, Tensor, Tensor], Tensor]
Codes = tuple[tuple[QuantizedTensor, ...], tuple[QuantizedTensor, ...]]


@dataclass(frozen=True)
class Schedule:
    """steps of `batch` tokens each. rate, scale_rate: first step sizes of offsets (codes) and scale factors.

    Both fall to 0 by `decay`. rounding: `straight` rounds in every step and passes the gradient through (SignRound);
    `soft` begins without rounding and narrows the ramp between two codes to a step, so that weights settle one after
    the other while those still on a ramp make up for them. checks: how often the judging tokens are looked at.
    """

    steps: int = 200
    batch: int = 4096
    optimizer: Optimizer = "adam"
    rate: float = 5e-3
    scale_rate: float = 3e-4
    decay: Decay = "cosine"
    rounding: Rounding = "soft"
    checks: int = 10


@dataclass(frozen=True)
class Learned:
    """codes: (gate_up, down), one QuantizedTensor per expert. best: the step they are from.

    errors: (step, relative squared error of the block's output on the judging tokens), the start first.
    """

    codes: Codes
    errors: tuple[tuple[int, float], ...]
    best: int


def learn_block(
    forward: ExpertForward,
    gate_up: Sequence[LearnedMatrix],
    down: Sequence[LearnedMatrix],
    train: BlockSample,
    judge: BlockSample | None,
    schedule: Schedule,
    generator: torch.Generator,
) -> Learned:
    """Learn offsets and scales of all experts of one block; the matrices are changed in place.

    forward(e, gate_up, down, inputs [n, H]) -> [n, H]: expert e with these float32 matrices, differentiable in them.
    judge: tokens that choose among the start and the checks; None = keep the last step.
    Deterministic for a generator and a thread count. Raises ValueError for a sample without tokens.
    """
    if train.hidden.shape[0] == 0:
        raise ValueError("train: 0 tokens; allowed: at least 1")
    learner = _Learner(forward, gate_up, down, schedule)
    errors: list[tuple[int, float]] = []
    kept: Codes | None = None
    every = max(1, schedule.steps // schedule.checks)
    batches = _batches(train.hidden.shape[0], schedule.batch, generator)
    for step in range(schedule.steps + 1):
        if judge is not None and (step % every == 0 or step == schedule.steps):
            error = learner.error(judge)
            if kept is None or error < min(value for _, value in errors):
                best, kept = step, learner.codes()
            errors.append((step, error))
        if step < schedule.steps:
            learner.step(train.rows(next(batches)), step / schedule.steps)
    if kept is None:
        best, kept = schedule.steps, learner.codes()
    return Learned(kept, tuple(errors), best)


@dataclass(frozen=True)
class _Hit:
    """One expert's part of a batch. rows: int64 [n]; gates: [n, 1]; values: its matrices, leaves of output [n, H]."""

    expert: int
    rows: Tensor
    gates: Tensor
    values: tuple[Tensor, Tensor]
    output: Tensor


class _Learner:
    """The matrices of a block and the optimizer's memory."""

    def __init__(
        self,
        forward: ExpertForward,
        gate_up: Sequence[LearnedMatrix],
        down: Sequence[LearnedMatrix],
        schedule: Schedule,
    ) -> None:
        self._forward, self._plan = forward, schedule
        self._matrices = (tuple(gate_up), tuple(down))
        self._moments: dict[tuple[int, int], tuple[Adam, Adam]] = {}

    def codes(self) -> Codes:
        gate_up, down = (tuple(matrix.quantized() for matrix in side) for side in self._matrices)
        return gate_up, down

    def error(self, sample: BlockSample) -> float:
        """Relative squared error of the block's output, a batch at a time."""
        missed = size = 0.0
        with torch.no_grad():
            for part in torch.split(torch.arange(sample.hidden.shape[0]), self._plan.batch):
                piece = sample.rows(part)
                missed += float(self._residual(piece)[0].square_().sum(dtype=torch.float64))
                size += float(piece.target.square().sum(dtype=torch.float64))
        return missed / size if size > 0 else 0.0

    def step(self, sample: BlockSample, progress: float) -> None:
        """One update of every expert that the sample hits. progress: from 0 to 1."""
        softness = (1 - progress) ** 2 if self._plan.rounding == "soft" else 0.0
        falling = 1 - progress if self._plan.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        with torch.enable_grad():
            residual, hits = self._residual(sample, softness)
        slope = residual * (2 / residual.shape[0])
        for hit in hits:
            gradients = torch.autograd.grad(hit.output, hit.values, slope[hit.rows] * hit.gates)
            for side, gradient in enumerate(gradients):
                self._update(side, hit.expert, gradient, softness, falling)

    def _residual(self, sample: BlockSample, softness: float = 0.0) -> tuple[Tensor, list[_Hit]]:
        """output - target [T, H] without a graph, and the experts' parts of it."""
        residual, hits = -sample.target, []
        for expert, rows, slots in routed(sample.ids, len(self._matrices[0])):
            gates = sample.weights[rows, slots][:, None]
            gate_up, down = (side[expert].values(softness).requires_grad_() for side in self._matrices)
            output = self._forward(expert, gate_up, down, sample.hidden[rows])
            residual.scatter_add_(0, rows[:, None].expand(-1, residual.shape[1]), output.detach() * gates)
            hits.append(_Hit(expert, rows, gates, (gate_up, down), output))
        return residual, hits

    def _update(self, side: int, expert: int, gradient: Tensor, softness: float, falling: float) -> None:
        matrix, plan = self._matrices[side][expert], self._plan
        offset, factor = matrix.gradients(gradient, softness)
        if plan.optimizer == "adam":
            known = self._moments.get((side, expert))
            known = known or self._moments.setdefault((side, expert), (Adam.zeros(offset), Adam.zeros(factor)))
            offset, factor = known[0].direction(offset), known[1].direction(factor)
        else:
            offset, factor = offset.sign_(), factor.sign_()
        matrix.move(offset.mul_(plan.rate * falling), factor.mul_(plan.scale_rate * falling))


def _batches(tokens: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Rows of one batch after the other, without end: every token once per round, but for a last part batch."""
    while True:
        order = torch.randperm(tokens, generator=generator)
        yield from torch.split(order[: max(1, tokens // size) * size], size)
