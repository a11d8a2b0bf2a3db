"""Expert activity and EASY-EP's contributions against loops over tokens, and the laws of raw sums."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moecompress.stats.base import (
    BlockObservation,
    ExpertObservation,
    RoutingObservation,
    State,
    Statistic,
    merge,
)
from moecompress.stats.experts import ExpertActivity, TokenContributions, token_weights
from moecompress.types import MoESite

E, K, H, T = 5, 2, 6, 40
SITE = MoESite("mlp.experts", "mlp.gate", num_experts=E, top_k=K, hidden=H, width=4)


class Data:
    """T routed tokens with every expert's output for each; expert 3 is never chosen."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        chance = torch.tensor([3.0, 2.0, 1.0, 0.0, 1.0]).expand(T, E)
        self.ids = torch.multinomial(chance, K, generator=generator)
        self.gates = torch.rand(T, K, generator=generator)
        self.logits = torch.randn(T, E, generator=generator)
        self.outputs = torch.randn(T, E, H, generator=generator)
        self.residual = torch.randn(T, H, generator=generator)

    def gate(self, token: int, expert: int) -> float:
        return sum(float(g) for i, g in zip(self.ids[token], self.gates[token], strict=True) if int(i) == expert)

    def chosen(self, token: int) -> list[int]:
        return [int(i) for i in self.ids[token]]

    def routed(self, token: int) -> Tensor:
        return sum((self.gate(token, i) * self.outputs[token, i] for i in self.chosen(token)), torch.zeros(H))

    def norm(self, token: int, expert: int) -> float:
        return math.sqrt(sum(float(v) ** 2 for v in self.outputs[token, expert]))


def observe(statistic: Statistic, state: State, data: Data, at: Tensor) -> None:
    rows = at.tolist()
    statistic.observe_routing(
        state, RoutingObservation(data.residual[at], data.ids[at], data.gates[at], data.logits[at], at)
    )
    contributions = torch.zeros(len(rows), E, dtype=torch.float64)
    for expert in range(E):
        mine = torch.tensor([t for t in rows if expert in data.chosen(t)], dtype=torch.int64)
        for place, token in enumerate(rows):
            contributions[place, expert] = data.gate(token, expert) * data.norm(token, expert)
        gates = torch.tensor([data.gate(int(t), expert) for t in mine])
        nothing = torch.empty(len(mine), 0)
        seen = ExpertObservation(expert, mine, gates, data.residual[mine], nothing, data.outputs[mine, expert])
        statistic.observe_expert(state, seen)
    routed = torch.stack([data.routed(t) for t in rows])
    statistic.observe_block(state, BlockObservation(data.residual[at], routed, contributions))


def collected(statistic: Statistic, data: Data, *parts: Tensor) -> State:
    state = statistic.init(SITE)
    for part in parts or (torch.arange(T),):
        observe(statistic, state, data, part)
    return state


def test_activity_equals_loops_over_tokens() -> None:
    data = Data()
    state = collected(ExpertActivity(), data)
    for expert in range(E):
        tokens = [t for t in range(T) if expert in data.chosen(t)]
        for a in range(3):
            for b in range(3):
                wanted = sum(data.gate(t, expert) ** a * data.norm(t, expert) ** b for t in tokens)
                assert float(state["powers"][expert, a, b]) == pytest.approx(wanted, rel=1e-6)
        largest = max((float(data.outputs[t, expert].abs().max()) for t in tokens), default=0.0)
        assert float(state["max_output"][expert]) == largest
        total = sum(float(data.logits[t].double().softmax(-1)[expert]) for t in range(T))
        assert float(state["probability"][expert]) == pytest.approx(total, rel=1e-9)
    assert state["powers"][3].abs().max() == 0  # never chosen
    assert int(state["powers"][:, 0, 0].sum()) == T * K


def test_contributions_equal_the_papers_definition() -> None:
    data = Data(1)
    state = collected(TokenContributions(), data)
    wanted, weights = [0.0] * E, 0.0
    for t in range(T):
        x, y = data.residual[t].double(), data.residual[t].double() + data.routed(t).double()
        s = max(0.0, 1 - float(x @ y) / math.sqrt(float(x @ x) * float(y @ y)))
        weights += s
        for expert in data.chosen(t):
            wanted[expert] += data.gate(t, expert) * data.norm(t, expert) * s
    assert state["score"].tolist() == pytest.approx(wanted, rel=1e-5)
    assert float(state["token_weight"]) == pytest.approx(weights, rel=1e-5) and int(state["tokens"]) == T


def test_token_weights_at_the_edges() -> None:
    """No contribution and no residual weigh nothing; turning around weighs 2; tiny angles are not lost."""
    x = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    r = torch.tensor([[0.0, 0.0], [1.0, 1.0], [-1.0, 0.0], [-3.0, 0.0], [0.0, 1e-3]])
    found = token_weights(x.double(), r.double())
    assert found[:4].tolist() == [0.0, 0.0, 0.0, 2.0]
    assert float(found[4]) == pytest.approx(1 - 1 / math.sqrt(1 + 1e-6), rel=1e-6)


@pytest.mark.parametrize("statistic", [ExpertActivity(), TokenContributions()], ids=lambda s: s.name)
@settings(max_examples=10)
@given(seed=st.integers(0, 99), cut=st.integers(1, T - 1))
def test_batches_order_and_merging_do_not_matter(statistic: Statistic, seed: int, cut: int) -> None:
    data = Data(seed)
    order = torch.randperm(T, generator=torch.Generator().manual_seed(seed))
    whole, parts = collected(statistic, data), collected(statistic, data, order[:cut], order[cut:])
    joined = merge(statistic, collected(statistic, data, order[:cut]), collected(statistic, data, order[cut:]))
    assert list(whole) == sorted(statistic.reduce)
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(joined[key], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("statistic", [ExpertActivity(), TokenContributions()], ids=lambda s: s.name)
def test_relabelled_experts_have_relabelled_sums(statistic: Statistic) -> None:
    data, order = Data(2), torch.tensor([2, 0, 4, 1, 3])
    other = Data(2)
    other.ids, other.logits, other.outputs = (
        order.argsort()[data.ids],
        data.logits[:, order],
        data.outputs[:, order],
    )
    before, after = collected(statistic, data), collected(statistic, other)
    for key, value in before.items():
        wanted = value[order] if value.dim() else value
        torch.testing.assert_close(after[key], wanted, rtol=1e-12, atol=0)
