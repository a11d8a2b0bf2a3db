"""Routing as numbers: distributions over experts, how far two routers are apart, and routers that bring logits back.

Source of the closed forms: least squares with a ridge towards the present router; EAC-MoE's loss over the leading
experts (2508.01625) is a sum of squares per row, so its minimum needs no descent.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from moecompress.types import Scoring

Clusters = Sequence[Sequence[int]]


def routing_probabilities(logits: Tensor, scoring: Scoring) -> Tensor:
    """Router outputs [n, E] as a distribution over experts, float64."""
    values = logits.double()
    if scoring == "softmax":
        return values.softmax(-1)
    if scoring == "sigmoid":
        positive = values.sigmoid()
    elif scoring == "sqrt_softplus":
        positive = F.softplus(values).sqrt()
    else:
        positive = values.clamp_min(0)
    return positive / positive.sum(-1, keepdim=True).clamp_min(1e-30)


def routing_divergence(
    original: Tensor, compressed: Tensor, scoring: Scoring, clusters: Clusters | None = None
) -> float:
    """Mean KL(original || compressed) in nats over the tokens of two router outputs, [n, E] and [n, C].

    clusters: for each of the C the experts of the original that it stands for, whose shares among all of these add up;
    None = the same experts.
    """
    p, q = routing_probabilities(original, scoring), routing_probabilities(compressed, scoring)
    if clusters is not None:
        members = [member for cluster in clusters for member in cluster]
        places = torch.tensor([place for place, cluster in enumerate(clusters) for _ in cluster])
        shares = routing_probabilities(original[:, members], scoring)
        p = torch.zeros_like(q).index_add_(1, places, shares)
    p, q = p.clamp_min(1e-30), q.clamp_min(1e-30)
    return float((p * (p.log() - q.log())).sum(-1).mean())


def merged_outputs(outputs: Tensor, clusters: Clusters) -> Tensor:
    """Outputs [n, R] of a softmax router -> [n, C]: logsumexp over every cluster's members.

    So a cluster gets its members' probability in sum. What that adds to all outputs of a token alike is taken off, as a
    softmax does not see it: experts alone keep their outputs, and so do pairs of equal ones.
    """
    sums = [outputs[:, list(c)].logsumexp(1) if len(c) > 1 else outputs[:, c[0]] for c in clusters]
    added = [total - outputs[:, list(c)].mean(1) for total, c in zip(sums, clusters, strict=True)]
    return torch.stack(sums, 1) - torch.stack(added, 1).mean(1, keepdim=True)


def distinct(ids: Tensor) -> Tensor:
    """Choices [n, K] with -1 for what a row names a second time, in ascending order."""
    found = ids.sort(1).values
    again = torch.zeros_like(found, dtype=torch.bool)
    again[:, 1:] = found[:, 1:] == found[:, :-1]
    return found.masked_fill(again, -1)


def set_agreement(first: Tensor, second: Tensor) -> float:
    """Mean Jaccard index of the expert sets in two id tables [n, K] and [n, K']; negative ids are skipped slots."""
    known = first >= 0
    common = ((first[:, :, None] == second[:, None, :]).any(-1) & known).sum(-1).double()
    union = known.sum(-1) + (second >= 0).sum(-1) - common
    return float((common / union).mean())


def ridge(weight: Tensor, gram: Tensor, residual: Tensor, strength: float) -> Tensor:
    """The rows that minimise sum_t |y_t - W' x_t|^2 + lam |W' - W|^2: W + R (G + lam I)^-1, float64 [R, C].

    weight: W [R, C]. gram: G = sum x x^T [C, C]. residual: R = sum (y - W x) x^T [R, C].
    lam = strength * mean(diag G). A residual of 0 gives W back exactly, whatever G is. Raises ValueError for a gram or
    residual that is not finite, and where no strength makes G solvable (strength 0 and rank below C).
    """
    g, r = gram.double(), residual.double()
    if not bool(torch.isfinite(g).all() and torch.isfinite(r).all()):
        raise ValueError("the sums over the router's inputs are not finite")
    mean = g.diagonal().mean()
    if not bool(r.any()) or float(mean) == 0.0:
        return weight.double()
    factor, info = torch.linalg.cholesky_ex(g + strength * mean * torch.eye(g.shape[0], dtype=g.dtype))
    if int(info):
        raise ValueError(f"the router's inputs span fewer than {g.shape[0]} directions and the ridge is {strength:g}")
    return weight.double() + torch.cholesky_solve(r.t(), factor).t()


def leading(wanted: Tensor, chosen: Tensor, count: int) -> Tensor:
    """bool [n, R]: whether output i is among a token's `count` largest of wanted [n, R], or among those chosen [n, K].

    The choice may follow other numbers than the outputs (correction biases, groups), so it always counts. An id of R
    or more (a skipped slot) counts for nothing.
    """
    rows = wanted.shape[1]
    mask = torch.zeros(wanted.shape[0], rows + 1, dtype=torch.bool)
    mask.scatter_(1, chosen.clamp(max=rows), True)
    mask.scatter_(1, wanted.topk(min(count, rows), dim=1).indices, True)
    return mask[:, :rows]
