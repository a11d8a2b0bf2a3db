"""The linearity shortcut is the definition; few tokens are not believed; the routed probability is what it says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moecompress.stats.base import RoutingObservation
from moecompress.stats.routing import RoutedProbability
from moecompress.stats.sensitivity import output_errors, shrunk
from moecompress.types import MoESite

T, E, K, H, W = 24, 4, 2, 6, 5


def block(hidden: Tensor, ids: Tensor, gates: Tensor, up: Tensor, down: Tensor, shared: Tensor) -> Tensor:
    """A whole MoE block, token by token: routed experts plus a shared one."""
    out = torch.zeros_like(hidden)
    for t in range(T):
        out[t] = shared @ hidden[t]
        for slot in range(K):
            e = int(ids[t, slot])
            out[t] += gates[t, slot] * (down[e] @ torch.nn.functional.silu(up[e] @ hidden[t]))
    return out


def test_the_shortcut_equals_running_the_block_again() -> None:
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, up, down, shared = rand(T, H), rand(E, W, H), rand(E, H, W), rand(H, H)
    ids = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(T)])
    gates = torch.rand(T, K, generator=generator, dtype=torch.float64)
    gates /= gates.sum(1, keepdim=True)  # renormalised
    plain = block(hidden, ids, gates, up, down, shared)
    for e in range(E):
        rows, slots = (ids == e).nonzero(as_tuple=True)
        candidates = [((up[e] * 4).round() / 4, down[e]), (up[e], (down[e] * 2).round() / 2), (up[e] * 0, down[e])]
        wanted = torch.nn.functional.silu(hidden[rows] @ up[e].T) @ down[e].T
        made = [torch.nn.functional.silu(hidden[rows] @ a.T) @ b.T for a, b in candidates]
        found = output_errors(wanted, gates[rows, slots], made)
        for number, (a, b) in enumerate(candidates):
            other_up, other_down = up.clone(), down.clone()
            other_up[e], other_down[e] = a, b
            naive = (block(hidden, ids, gates, other_up, other_down, shared) - plain).square().sum(0)
            assert torch.allclose(found[number], naive, rtol=1e-9)
        removed = output_errors(wanted, gates[rows, slots], [torch.zeros_like(wanted)])[0]
        assert torch.allclose(found[2], removed, rtol=1e-9)  # silu(0) = 0: a zeroed matrix removes the expert
        assert float(output_errors(wanted, gates[rows, slots], [wanted]).sum()) == 0.0


def test_the_errors_of_two_halves_add_up() -> None:
    wanted, made = torch.randn(10, H), torch.randn(10, H)
    gates = torch.rand(10)
    whole = output_errors(wanted, gates, [made])
    halves = [output_errors(wanted[part], gates[part], [made[part]]) for part in (slice(0, 4), slice(4, 10))]
    assert torch.allclose(whole, halves[0] + halves[1], rtol=1e-12)


def test_few_tokens_are_drawn_towards_the_layer() -> None:
    sampled = torch.tensor([1000, 10, 0])
    errors = torch.tensor([[1000.0, 2000.0], [0.0, 0.0], [0.0, 0.0]])
    mean = errors.double().sum(0) / 1010
    found = shrunk(errors, sampled, torch.tensor([2000, 20, 0]), prior=64)
    assert torch.allclose(found[0], (errors[0] + 64 * mean) / 1064 * 2000)
    assert torch.allclose(found[1], 64 * mean / 74 * 20)
    assert torch.allclose(found[2], mean.double())  # one token's worth of the mean
    assert (found[1] > 0).all() and torch.isfinite(found).all()
    assert torch.allclose(shrunk(errors, sampled, sampled, prior=0)[0], errors[0].double())
    assert float(shrunk(torch.zeros(3, 2), torch.zeros(3), torch.zeros(3)).sum()) == 0.0


@pytest.mark.parametrize("logits", [True, False])
def test_routed_probability_by_hand(logits: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(T, E, generator=generator)
    ids = torch.randint(0, E + 1, (T, K), generator=generator)  # E = a skipped slot
    weights = torch.rand(T, K, generator=generator)
    statistic = RoutedProbability()
    state = statistic.init(MoESite("experts", "gate", E, K, H, W))
    for part in (slice(0, 7), slice(7, T)):
        seen = RoutingObservation(
            torch.zeros(T, H)[part], ids[part], weights[part], scores[part] if logits else None, torch.arange(T)[part]
        )
        statistic.observe_routing(state, seen)
    wanted = [0.0] * E
    for t in range(T):
        for slot in range(K):
            e = int(ids[t, slot])
            if e < E:
                chance = float(scores[t, e].double().exp() / scores[t].double().exp().sum())
                wanted[e] += chance if logits else float(weights[t, slot])
    assert state["probability"].tolist() == pytest.approx(wanted, rel=1e-6)
