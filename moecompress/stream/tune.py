"""Tune chosen tensors of several layers against a loss on the model's final logits, and keep what judged best."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moecompress.numerics.distill import Teacher, divergence, teacher
from moecompress.stream.streams import TokenRun, final_logits
from moecompress.stream.train import Loss, TrainContext
from moecompress.types import LayerWeights, TokenBatch

Key = tuple[int, str]  # layer, name inside the layer


@dataclass(frozen=True)
class Tuned:
    """tensors: the best ones, in the dtypes they will be stored in; losses: (step, loss of the judging tokens)."""

    tensors: Mapping[Key, Tensor]
    losses: tuple[tuple[int, float], ...]
    best: int


def tune(
    context: TrainContext,
    start: Mapping[Key, Tensor],
    dtypes: Mapping[Key, torch.dtype],
    loss: Loss,
    batches: Iterator[TokenBatch],
    judges: Sequence[TokenBatch],
    *,
    steps: int,
    lr: float,
    checks: int = 5,
) -> Tuned:
    """Adam on float32 copies of `start`, so that steps below half a unit of the stored dtype add up; the rate falls to
    0 along a cosine. Judged (and kept, when best) is what the stored dtype makes of them; the start counts as step 0.
    """
    masters = {key: value.detach().float().clone() for key, value in start.items()}
    optimizer = torch.optim.Adam(list(masters.values()), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: 0.5 * (1 + math.cos(math.pi * at / steps)))
    kept = {key: value.to(dtypes[key], copy=True) for key, value in masters.items()}
    losses = [(0, judged(context, start, loss, judges))]
    best, every = 0, max(1, steps // checks)
    for step in range(1, steps + 1):
        _, gradients = context.forward_backward(loss, masters, next(batches), resident=context.resident)
        for key, value in masters.items():
            value.grad = gradients[key]
        optimizer.step()
        schedule.step()
        if step % every == 0 or step == steps:
            stored = {key: value.detach().to(dtypes[key], copy=True) for key, value in masters.items()}
            value_now = judged(context, stored, loss, judges)
            if value_now < min(value for _, value in losses):
                best, kept = step, stored
            losses.append((step, value_now))
    return Tuned(kept, tuple(losses), best)


def judged(context: TrainContext, tensors: Mapping[Key, Tensor], loss: Loss, judges: Sequence[TokenBatch]) -> float:
    """Mean loss of the judging sequences with these tensors in their layers."""
    there = replaced(context, tensors)
    losses = (there.forward_backward(loss, {}, batch, resident=context.resident)[0] for batch in judges)
    total = sum(value * len(batch.rows) for value, batch in zip(losses, judges, strict=True))
    return total / sum(len(batch.rows) for batch in judges)


def replaced(context: TrainContext, tensors: Mapping[Key, Tensor]) -> TrainContext:
    """The same model with these tensors in their layers."""
    before = context.weights

    def weights(index: int) -> LayerWeights:
        return before(index).with_tensors({name: value for (layer, name), value in tensors.items() if layer == index})

    return replace(context, weights=weights)


def batches_without_end(
    ids: Tensor, rows: Sequence[int], size: int, generator: torch.Generator
) -> Iterator[TokenBatch]:
    """Batches of `size` sequences among rows of ids [N, T], every sequence once per round."""
    while True:
        order = [rows[at] for at in torch.randperm(len(rows), generator=generator).tolist()]
        for at in range(0, max(1, len(order) // size) * size, size):
            chosen = tuple(order[at : at + size])
            yield TokenBatch(ids[list(chosen)], chosen)


def next_token_loss(logits: Tensor, batch: TokenBatch) -> Tensor:
    """Mean cross-entropy of the next tokens."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.ids[:, 1:].flatten())


def distillation(context: TrainContext, run: TokenRun, count: int) -> Callable[[Tensor, TokenBatch], Tensor]:
    """Mean KL to the original model's predictions, of which each position keeps the `count` likeliest tokens.

    They come from the original stream as it left the last layer, so the original model is not run again.
    """
    known: dict[int, Teacher] = {}
    for row, (_, logits) in enumerate(final_logits(context.model, run, "original")):
        known[row] = teacher(logits[0], count)

    def loss(logits: Tensor, batch: TokenBatch) -> Tensor:
        return torch.stack([divergence(known[row], logits[at]).mean() for at, row in enumerate(batch.rows)]).mean()

    return loss
