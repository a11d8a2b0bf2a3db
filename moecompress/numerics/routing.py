"""Routing as numbers: distributions over experts, how far two routers are apart, and routers that bring logits back.

Source of the closed forms: least squares with a ridge towards the present router; EAC-MoE's loss over the leading
experts (2508.01625) is a sum of squares per row, so its minimum needs no descent.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moecompress.types import Scoring


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


def routing_divergence(original: Tensor, compressed: Tensor, scoring: Scoring) -> float:
    """Mean KL(original || compressed) in nats over the tokens of two router outputs [n, E]."""
    p, q = (routing_probabilities(logits, scoring).clamp_min(1e-30) for logits in (original, compressed))
    return float((p * (p.log() - q.log())).sum(-1).mean())


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
