"""Tuning through the whole model: float32 masters, the best of the checks, batches, distillation's targets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine
import families
import pytest
import torch
from torch import Tensor

from moecompress.numerics.distill import divergence, teacher
from moecompress.stream.model import StreamModel, open_model
from moecompress.stream.train import TrainContext
from moecompress.stream.tune import batches_without_end, distillation, next_token_loss, replaced, tune
from moecompress.types import LayerWeights, TokenBatch

KEY = (0, "gate")
BATCH = TokenBatch(torch.zeros(1, 4, dtype=torch.int64), (0,))


@dataclass(frozen=True)
class Valley(TrainContext):
    """A model of one tensor whose loss is its squared distance from `goal` (for judges: from `judges_goal`)."""

    goal: float = 0.0
    judges_goal: float = 0.0

    def forward_backward(self, loss: Any, trainables: Any, batch: Any, *, resident: bool = False) -> Any:
        if not trainables:
            value = self.weights(0).tensors["gate"]
            assert isinstance(value, Tensor)
            return float((value.float() - self.judges_goal).square().sum()), {}
        value = trainables[KEY].detach()
        return 0.0, {KEY: 2 * (value - self.goal)}


def valley(start: float, **goals: float) -> Valley:
    weights = lambda index: LayerWeights(index, {"gate": torch.full((2, 2), start)})  # noqa: E731
    return Valley(SimpleNamespace(), {}, weights, {}, torch.Generator, False, print, **goals)  # type: ignore[arg-type]


def context_of(model: StreamModel, runs: dict[str, Any]) -> TrainContext:
    return TrainContext(model, runs, model.read_layer, {}, torch.Generator, True, print)


def tuned(context: Valley, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    start = {KEY: context.weights(0).tensors["gate"]}
    settings = {"steps": 200, "lr": 0.05, "checks": 10, **options}
    return tune(context, start, {KEY: dtype}, next_token_loss, iter([BATCH] * 500), [BATCH], **settings)  # type: ignore[arg-type]


def test_it_goes_to_the_optimum() -> None:
    found = tuned(valley(1.0, goal=3.0, judges_goal=3.0))
    assert found.losses[0] == (0, 16.0) and found.losses[-1][0] == 200
    torch.testing.assert_close(found.tensors[KEY], torch.full((2, 2), 3.0), rtol=0, atol=0.02)


def test_steps_below_the_stored_unit_add_up() -> None:
    """At 1 a bfloat16 cannot move by 1/1000; a hundred such steps of a float32 master move it."""
    found = tuned(valley(1.0, goal=3.0, judges_goal=3.0), torch.bfloat16, steps=100, lr=1e-3)
    assert found.tensors[KEY].dtype == torch.bfloat16 and float(found.tensors[KEY][0, 0]) >= 1.03
    assert (torch.ones(1, dtype=torch.bfloat16) + 1e-3).eq(1).all()


def test_what_judges_worse_is_not_kept() -> None:
    """The learned goal is past the judges': kept is the check nearest to theirs, or the start."""
    found = tuned(valley(1.0, goal=3.0, judges_goal=1.5))
    assert found.best > 0 and abs(float(found.tensors[KEY][0, 0]) - 1.5) < 0.6
    assert dict(found.losses)[found.best] == min(value for _, value in found.losses)
    away = tuned(valley(1.0, goal=3.0, judges_goal=-1.0))
    assert away.best == 0 and torch.equal(away.tensors[KEY], torch.ones(2, 2))


def test_every_sequence_once_per_round() -> None:
    ids = torch.arange(10)[:, None].expand(10, 3)
    batches = batches_without_end(ids, (1, 3, 4, 6, 9), 2, torch.Generator().manual_seed(0))
    rounds = [[next(batches) for _ in range(2)] for _ in range(3)]
    for one in rounds:
        rows = [row for batch in one for row in batch.rows]
        assert len(set(rows)) == 4 <= len({1, 3, 4, 6, 9} & set(rows)) and {len(batch.rows) for batch in one} == {2}
        assert all(torch.equal(batch.ids[:, 0], torch.tensor(batch.rows)) for batch in one)
    assert [batch.rows for batch in rounds[0]] != [batch.rows for batch in rounds[1]]


def test_the_teacher_is_the_original_model(tmp_path: Path) -> None:
    path = families.save_tiny("qwen3_moe", tmp_path / "model", torch.float32)
    model, ids = open_model(path), engine.random_ids(4, 10)
    run = engine.token_run(model, ids, tmp_path / "run")
    engine.through_layers(model, run)
    context = context_of(model, {"default": run})
    loss = distillation(context, run, 16)
    own = engine.own_logits(path, ids)
    batch = TokenBatch(ids[[2, 0]], (2, 0))
    assert float(loss(own[[2, 0]], batch)) == pytest.approx(0, abs=1e-5)
    other = own[[1, 3]]
    wanted = torch.stack([divergence(teacher(own[row], 16), other[at]).mean() for at, row in enumerate((2, 0))]).mean()
    assert float(loss(other, batch)) == pytest.approx(float(wanted), rel=1e-4) and float(wanted) > 0


def test_replaced_tensors_are_in_their_layers_alone(tmp_path: Path) -> None:
    model = open_model(families.save_tiny("qwen3_moe", tmp_path / "model", torch.float32))
    context = context_of(model, {})
    made = replaced(context, {(1, "mlp.gate.weight"): torch.zeros(8, 64)})
    assert not bool(made.weights(1).tensors["mlp.gate.weight"].any())  # type: ignore[union-attr]
    assert engine.same_layer(made.weights(2), model.read_layer(2))
