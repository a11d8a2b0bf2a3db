"""Clustering against brute force and planted partitions."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moecompress.numerics.clustering import (
    agglomerative_clusters,
    cosine_from_gram,
    kmeans,
    nearest_clusters,
    numbered,
    spectral_clusters,
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inertia(points: Tensor, labels: Tensor) -> float:
    total = 0.0
    for label in set(labels.tolist()):
        members = points[labels == label]
        total += float((members - members.mean(0)).square().sum())
    return total


def test_similarity_is_the_cosine_of_the_columns() -> None:
    columns = drawn(200, 6)
    columns[:, 4] = 0
    found = cosine_from_gram(columns.T @ columns)
    for i, j in itertools.product(range(6), repeat=2):
        wanted = float(torch.cosine_similarity(columns[:, i], columns[:, j], dim=0))
        assert float(found[i, j]) == pytest.approx(1.0 if i == j else wanted, abs=1e-12)
    centred = columns - columns.mean(1, keepdim=True)
    torch.testing.assert_close(
        cosine_from_gram(columns.T @ columns, centred=True), cosine_from_gram(centred.T @ centred)
    )
    moved = columns + drawn(200, 1, seed=1) * 5  # what routing does not see
    torch.testing.assert_close(cosine_from_gram(moved.T @ moved, centred=True), cosine_from_gram(centred.T @ centred))


@settings(max_examples=15)
@given(seed=st.integers(0, 999), count=st.integers(1, 4))
def test_kmeans_finds_the_best_partition_of_few_points(seed: int, count: int) -> None:
    points = drawn(7, 2, seed=seed)
    found = kmeans(points, count, seed, restarts=30)
    assert len(set(found.tolist())) == count and torch.equal(found, numbered(found))
    partitions = (torch.tensor(p) for p in itertools.product(range(count), repeat=7) if len(set(p)) == count)
    assert inertia(points, found) <= min(inertia(points, p) for p in partitions) * (1 + 1e-9) + 1e-12


def test_no_cluster_is_empty_even_among_equal_points() -> None:
    points = torch.zeros(6, 3)
    assert len(set(kmeans(points, 4).tolist())) == 4
    assert len(set(agglomerative_clusters(points, 4).tolist())) == 4
    assert len(set(spectral_clusters(torch.ones(6, 6), 4).tolist())) == 4


@pytest.mark.parametrize("seed", range(3))
def test_planted_blocks_are_found_whatever_the_order(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    planted = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3])[torch.randperm(10, generator=generator)]
    logits = drawn(400, 4, seed=seed)[:, planted] + 0.3 * drawn(400, 10, seed=seed + 50)
    similarity = (1 + cosine_from_gram(logits.T @ logits)) / 2
    assert torch.equal(spectral_clusters(similarity, 4, seed), numbered(planted))
    means = drawn(4, 16, seed=seed)[planted] + 0.1 * drawn(10, 16, seed=seed + 9)
    for method in ("average", "single", "complete"):
        assert torch.equal(agglomerative_clusters(means, 4, method), numbered(planted))


def test_hierarchy_merges_the_nearest_first() -> None:
    points = torch.tensor([[0.0], [1.0], [2.1], [6.0], [6.5]])
    assert agglomerative_clusters(points, 4).tolist() == [0, 1, 2, 3, 3]
    assert agglomerative_clusters(points, 3).tolist() == [0, 0, 1, 2, 2]
    assert agglomerative_clusters(points, 2).tolist() == [0, 0, 0, 1, 1]


def test_everyone_joins_the_most_similar_centre() -> None:
    similarity = torch.tensor([[1.0, 0.2, 0.9, 0.1], [0.2, 1, 0.3, 0.8], [0.9, 0.3, 1, 0.2], [0.1, 0.8, 0.2, 1]])
    assert nearest_clusters(similarity, [1, 2]).tolist() == [0, 1, 0, 1]
    assert nearest_clusters(torch.ones(3, 3), [0, 2]).tolist()[::2] == [0, 1]  # centres stay apart


def test_as_many_clusters_as_points_and_impossible_counts() -> None:
    points = drawn(5, 2)
    for found in (kmeans(points, 5), agglomerative_clusters(points, 5), spectral_clusters(torch.rand(5, 5), 5)):
        assert found.tolist() == list(range(5))
    for count in (0, 6):
        for call in (kmeans, agglomerative_clusters):
            with pytest.raises(ValueError, match=f"{count} clusters of 5"):
                call(points, count)
        with pytest.raises(ValueError, match=f"{count} clusters of 5"):
            spectral_clusters(torch.eye(5), count)
