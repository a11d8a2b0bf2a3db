"""Groups of experts that behave alike: spectral and hierarchical clustering, and nearest representatives.

Labels are int64 [N], numbered by first member, so equal partitions have equal labels. No cluster is empty.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import cdist
from torch import Tensor

ITERATIONS = 100


def cosine_from_gram(gram: Tensor, centred: bool = False) -> Tensor:
    """Cosine similarity [N, N] of columns from their products [N, N], float64 in [-1, 1]; a zero column is like none.

    centred: as if every row had had its mean over the columns taken off before (a constant added to all logits of a
    token then changes nothing).
    """
    gram = gram.double()
    if centred:
        gram = gram - gram.mean(0, keepdim=True)
        gram = gram - gram.mean(1, keepdim=True)
    size = gram.diagonal().clamp_min(0).sqrt()
    norm = size[:, None] * size[None, :]
    cosine = torch.where(norm > 0, gram / norm.clamp_min(torch.finfo(torch.float64).tiny), 0.0).clamp(-1, 1)
    return cosine.fill_diagonal_(1.0)


def spectral_clusters(similarity: Tensor, count: int, seed: int = 0, restarts: int = 10) -> Tensor:
    """`count` clusters of similarity [N, N] in [0, 1] (Ng, Jordan and Weiss): the rows of the leading eigenvectors of
    D^-1/2 S D^-1/2, brought to length 1, by k-means. Deterministic for a seed.

    Self-similarity stays in: a matrix of (1 + cosine) / 2 is positive semi-definite then, and directions in which
    copies differ have the eigenvalue 0, so that copies fall together. Raises ValueError for a count outside 1..N.
    """
    affinity = similarity.double().numpy()
    number = len(affinity)
    _check_count(count, number)
    if count == number:
        return torch.arange(number)
    degree = np.maximum(affinity.sum(1), np.finfo(np.float64).tiny) ** -0.5
    _, vectors = np.linalg.eigh(degree[:, None] * affinity * degree[None, :])
    rows = vectors[:, -count:]
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    return kmeans(torch.from_numpy(rows.copy()), count, seed, restarts)


def kmeans(points: Tensor, count: int, seed: int = 0, restarts: int = 10) -> Tensor:
    """Lloyd's algorithm on points [N, d] from k-means++ starts; the best of `restarts`. A cluster that runs empty takes
    the point farthest from its centre. Raises ValueError for a count outside 1..N."""
    _check_count(count, len(points))
    data = points.double().numpy()
    generator = np.random.default_rng(seed)
    best, least = np.zeros(len(data), dtype=np.int64), np.inf
    for _ in range(restarts):
        labels, inertia = _lloyd(data, _spread(data, count, generator))
        if inertia < least * (1 - 1e-12):
            best, least = labels, inertia
    return numbered(torch.from_numpy(best))


def _spread(data: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """k-means++: each next centre is a point drawn by its squared distance from the nearest one so far."""
    centres = [int(generator.integers(len(data)))]
    while len(centres) < count:
        distance = cdist(data, data[centres], "sqeuclidean").min(1)
        distance[centres] = 0
        total = distance.sum()
        others = np.setdiff1d(np.arange(len(data)), centres)
        drawn = generator.choice(len(data), p=distance / total) if total > 0 else generator.choice(others)
        centres.append(int(drawn))
    return data[centres]


def _lloyd(data: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, float]:
    labels = np.full(len(data), -1)
    for _ in range(ITERATIONS):
        distance = cdist(data, centres, "sqeuclidean")
        nearest = distance.argmin(1)
        for empty in np.setdiff1d(np.arange(len(centres)), nearest):
            crowded = np.bincount(nearest, minlength=len(centres))[nearest] > 1
            nearest[np.where(crowded, distance[np.arange(len(data)), nearest], -1).argmax()] = empty
        if (nearest == labels).all():
            break
        labels = nearest
        centres = np.stack([data[labels == k].mean(0) for k in range(len(centres))])
    return labels, float(cdist(data, centres, "sqeuclidean")[np.arange(len(data)), labels].sum())


def agglomerative_clusters(points: Tensor, count: int, method: str = "average") -> Tensor:
    """`count` clusters of points [N, d] by merging the two nearest again and again, Euclidean distances.

    method: `average`, `single` or `complete` linkage. Raises ValueError for a count outside 1..N.
    """
    _check_count(count, len(points))
    if count == len(points):
        return torch.arange(count)
    tree = linkage(points.double().numpy(), method)
    labels = fcluster(tree, count, "maxclust")
    if len(set(labels)) < count:  # equal heights: cut after the right number of merges
        labels = _cut(tree, len(points), count)
    return numbered(torch.from_numpy(labels.astype(np.int64)))


def _cut(tree: np.ndarray, number: int, count: int) -> np.ndarray:
    members = {i: [i] for i in range(number)}
    for step in range(number - count):
        first, second = int(tree[step, 0]), int(tree[step, 1])
        members[number + step] = members.pop(first) + members.pop(second)
    labels = np.empty(number, dtype=np.int64)
    for label, found in enumerate(members.values()):
        labels[found] = label
    return labels


def nearest_clusters(similarity: Tensor, centres: Sequence[int]) -> Tensor:
    """Everyone joins the most similar of `centres`, who stay apart. similarity: [N, N]."""
    chosen = torch.tensor(list(centres))
    labels = similarity[:, chosen].argmax(1)
    labels[chosen] = torch.arange(len(chosen))
    return numbered(labels)


def numbered(labels: Tensor) -> Tensor:
    """The same partition with clusters numbered by their first member."""
    names = {label: number for number, label in enumerate(dict.fromkeys(labels.tolist()))}
    return torch.tensor([names[label] for label in labels.tolist()])


def _check_count(count: int, number: int) -> None:
    if not 1 <= count <= number:
        raise ValueError(f"{count} clusters of {number}; allowed: 1 to {number}")
