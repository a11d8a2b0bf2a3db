"""The planted checkpoints compute what the demo checkpoint computes, and what is planted is there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import engine
import planted
import pytest
import torch
from torch import Tensor

IDS = engine.random_ids(4, 64, vocabulary=4096)
PLANTS: dict[str, Callable[[Path, Path], Path]] = {
    "never routed": lambda source, target: planted.routed_expert(source, target, IDS),
    "outliers": lambda source, target: planted.outlier_channels(source, target, (3, 77)),
    "permuted": lambda source, target: planted.permuted_experts(source, target, [*range(1, 16), 0]),
    "duplicates": lambda source, target: planted.permuted_duplicates(source, target),
    "super expert": lambda source, target: planted.super_expert(source, target, 1, 5, 9),
}


@pytest.fixture(scope="module")
def wanted(bench_a: Path) -> Tensor:
    return engine.own_logits(bench_a, IDS)


@pytest.mark.parametrize("name", PLANTS)
def test_the_function_is_preserved(name: str, bench_a: Path, wanted: Tensor, tmp_path: Path) -> None:
    path = PLANTS[name](bench_a, tmp_path / "planted")
    assert engine.difference(engine.own_logits(path, IDS), wanted) < 1e-5


def chosen_by(path: Path, expert: int) -> list[list[int]]:
    """Per layer, the tokens of IDS that the router sends to `expert`."""
    router = [engine.own_model(path).model.layers[layer].mlp.gate.weight for layer in range(4)]
    found = []
    for weight, inputs in zip(router, planted.router_inputs(path, IDS), strict=True):
        top = (inputs @ weight.detach().t()).topk(4).indices
        found.append((top == expert).any(-1).nonzero()[:, 0].tolist())
    return found


def test_the_planted_expert_gets_exactly_its_tokens(bench_a: Path, tmp_path: Path) -> None:
    assert chosen_by(planted.routed_expert(bench_a, tmp_path / "never", IDS), 16) == [[], [], [], []]
    # beyond the first layer the inputs are others as soon as an expert is: only there the tokens are certain
    assert chosen_by(planted.routed_expert(bench_a, tmp_path / "rare", IDS, [5, 200]), 16)[0] == [5, 200]


def test_too_many_tokens_are_refused(bench_a: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no router row separates"):
        planted.routed_expert(bench_a, tmp_path / "never", engine.random_ids(4, 64, vocabulary=5), list(range(100)))


def test_outliers_are_large(bench_a: Path, tmp_path: Path) -> None:
    path = planted.outlier_channels(bench_a, tmp_path / "outliers", (3, 77))
    for inputs in planted.router_inputs(path, IDS):
        sizes = inputs.abs().mean(0)
        assert set(sizes.topk(2).indices.tolist()) == {3, 77} and float(sizes[[3, 77]].min() / sizes.median()) > 20


def test_the_super_expert_has_a_massive_neuron(bench_a: Path, tmp_path: Path) -> None:
    path = planted.super_expert(bench_a, tmp_path / "super", 1, 5, 9)
    experts = engine.own_model(path).requires_grad_(False).model.layers[1].mlp.experts
    inputs = planted.router_inputs(path, IDS)[1]
    gate, up = (inputs @ experts.gate_up_proj[5].t()).chunk(2, -1)
    sizes = (torch.nn.functional.silu(gate) * up).abs().amax(0)
    assert int(sizes.argmax()) == 9 and float(sizes[9] / sizes.median()) > 100
