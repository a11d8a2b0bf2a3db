"""The objective of EBSS against numpy and closed forms, its step against loops, samplers against their definitions."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moecompress.numerics.ebss import add_routes, best_children, drawn, imbalance, likeliest, sigma
from moecompress.numerics.repetition import compressed_share, distinct_share
from moecompress.numerics.sampling import next_tokens, repeats


def random_counts(*shape: int, top: int = 50, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, top, shape, generator=torch.Generator().manual_seed(seed))


def test_sigma_is_the_mean_over_layers_of_the_sample_deviation() -> None:
    counts = random_counts(3, 5, 8)
    want = numpy.std(counts.numpy() / 40, axis=-1, ddof=1).mean(-1)
    assert numpy.allclose(sigma(counts, 40).numpy(), want, atol=1e-15)
    assert float(sigma(torch.full((2, 8), 10), 40)) == 0
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(sigma(counts[..., order], 40), sigma(counts, 40))


@pytest.mark.parametrize(
    ("experts", "top_k", "published"), [(64, 6, 0.294), (60, 4, 0.252), (8, 2, 0.463), (64, 8, 0.333), (128, 8, 0.243)]
)
def test_all_tokens_on_the_same_experts_have_the_largest_sigma(experts: int, top_k: int, published: float) -> None:
    counts = torch.zeros(4, experts, dtype=torch.int64)
    counts[:, :top_k] = 7
    share = top_k / experts
    assert float(sigma(counts, 7)) == pytest.approx(math.sqrt(experts * share * (1 - share) / (experts - 1)), rel=1e-12)
    assert float(sigma(counts, 7)) == pytest.approx(published, abs=6e-4)


def test_with_a_corpus_the_term_is_that_of_the_whole_set_over_the_prefixs_share() -> None:
    corpus, own = random_counts(3, 8, top=900), random_counts(2, 3, 8, top=9, seed=1)
    found = imbalance(own, 6, corpus, 600)
    for row, one in zip(found.tolist(), own, strict=True):
        assert row == pytest.approx(float(sigma(one + corpus, 606)) * 606 / 6, rel=1e-12)
    assert torch.equal(imbalance(own, 6, None, 0), sigma(own, 6))
    # a prefix that uses what the corpus lacks beats one that repeats it, however large the corpus is
    lacking = torch.tensor([[1000, 1000, 1000, 10]])
    for size in (1, 100):
        terms = imbalance(torch.tensor([[[0, 0, 0, 3]], [[3, 0, 0, 0]]]), 3, lacking * size, 3010 * size)
        assert float(terms[1] - terms[0]) > 0.5


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 6), st.integers(1, 9))
def test_likeliest_children_and_the_best_of_all_are_a_stable_sort(seed: int, beams: int, take: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logprobs = -torch.randint(0, 5, (2, beams, 7), generator=generator).double()  # many ties
    values, ids = likeliest(logprobs, take)
    for s in range(2):
        for b in range(beams):
            want = sorted(range(7), key=lambda v: (-float(logprobs[s, b, v]), v))[:take]
            assert ids[s, b].tolist() == want and values[s, b].tolist() == [float(logprobs[s, b, v]) for v in want]
    likelihood = -torch.randint(0, 4, (2, beams), generator=generator).double()
    deferred = torch.randint(0, 3, (2, beams), generator=generator).double() / 4
    parents, places, grown = best_children(likelihood, deferred, values, 3, width)
    for s in range(2):
        scored = [
            (-(float(likelihood[s, b]) + float(values[s, b, c])) / 4 + float(deferred[s, b]), b, c)
            for b in range(beams)
            for c in range(values.shape[-1])
        ]
        want_pairs = [(b, c) for _, b, c in sorted(scored)[:width]]
        assert list(zip(parents[s].tolist(), places[s].tolist(), strict=True)) == want_pairs
        assert grown[s].tolist() == [float(likelihood[s, b]) + float(values[s, b, c]) for b, c in want_pairs]


def test_children_share_their_parents_imbalance_and_more_of_it_only_hurts() -> None:
    likelihood, values = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[[-1.0, -2.0], [-1.5, -1.6]]]).double()
    ranks = []
    for extra in (0.0, 0.2, 0.4, 2.0):
        parents, _, _ = best_children(likelihood, torch.tensor([[extra, 0.0]]).double(), values, 1, 4)
        ranks.append([place for place, parent in enumerate(parents[0].tolist()) if parent == 0])
    assert ranks == [[0, 3], [0, 3], [2, 3], [2, 3]]  # its best child falls behind, never rises


def test_routes_are_counted_and_skipped_slots_are_not() -> None:
    counts = torch.zeros(2, 1, 3, dtype=torch.int64)
    routed = torch.tensor([[[0, 2], [3, 1]]])  # 3 = skipped
    assert add_routes(counts, routed).tolist() == [[[1, 0, 1]], [[0, 1, 0]]]


def test_draws_are_without_replacement_and_follow_the_probabilities() -> None:
    logprobs = torch.tensor([0.5, 0.3, 0.15, 0.05]).double().log()
    seen = torch.zeros(4)
    pairs = 0
    for seed in range(3000):
        _, ids = drawn(logprobs.view(1, 1, 4), 2, 4, 1.0, [torch.Generator().manual_seed(seed)])
        assert len(set(ids[0, 0].tolist())) == 2
        seen[ids[0, 0, 0]] += 1
        pairs += set(ids[0, 0].tolist()) == {0, 1}
    assert torch.allclose(seen / 3000, logprobs.exp().float(), atol=0.03)
    assert pairs / 3000 == pytest.approx(0.5 * 0.3 / 0.5 + 0.3 * 0.5 / 0.7, abs=0.03)
    cut = {int(drawn(logprobs.view(1, 1, 4), 1, 2, 1.0, [torch.Generator().manual_seed(s)])[1]) for s in range(99)}
    assert cut == {0, 1}  # the pool
    cold = {int(drawn(logprobs.view(1, 1, 4), 1, 4, 0.01, [torch.Generator().manual_seed(s)])[1]) for s in range(99)}
    assert cold == {0}  # the temperature


def test_sampled_tokens_respect_the_nucleus() -> None:
    logprobs = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    draws = [next_tokens(logprobs, 1.0, 0.8, [torch.Generator().manual_seed(s)]).item() for s in range(400)]
    assert set(draws) == {0, 1}
    assert sum(token == 0 for token in draws) / 400 == pytest.approx(0.5 / 0.8, abs=0.08)
    assert next_tokens(torch.tensor([[0.25, 0.25]]).log(), 0, 1.0).tolist() == [0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=9, max_size=9), min_size=1, max_size=3), st.integers(0, 9))
def test_the_guard_bans_exactly_what_would_repeat(rows: list[list[int]], length: int) -> None:
    ids = torch.tensor(rows)[:, : max(1, length)]
    banned = repeats(ids, 4, 3, 2)
    for row, marks in zip(ids.tolist(), banned.tolist(), strict=True):
        grams = {tuple(row[i : i + 3]) for i in range(len(row) - 2)}
        for token in range(4):
            again = tuple([*row, token][-3:]) in grams and len(row) >= 2
            assert marks[token] == (again or row[-2:] == [token, token])
    assert not bool(repeats(ids, 4, 0, 0).any())


def test_repetition_is_measured() -> None:
    generator = torch.Generator().manual_seed(0)
    varied, stuck = torch.randint(0, 4096, (512,), generator=generator), torch.full((512,), 7)
    assert compressed_share(stuck) < 0.05 < 0.3 < compressed_share(varied)
    assert distinct_share(varied) > 0.99 and distinct_share(stuck) == 1 / 509
