"""What rounding one expert costs: output errors of candidate weights on the tokens that were really routed to it.

A block's output is sum_e g_e f_e(x) with gates g that do not depend on the experts. So replacing one expert changes it
by g_e (f'_e(x) - f_e(x)) on that expert's own tokens and by nothing on others: no block has to be run per candidate.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

PRIOR_TOKENS = 64  # an expert with this many tokens is believed half


def output_errors(wanted: Tensor, gates: Tensor, candidates: Iterable[Tensor]) -> Tensor:
    """sum_t g_t^2 (f'(x_t) - f(x_t))^2 for every element of the output: float64 [C, H].

    wanted: f(x) [n, H] before the gate; gates: [n]; candidates: C tensors f'(x) [n, H], made one at a time.
    """
    weights = gates.double().square()
    return torch.stack([((made - wanted).double().square_() * weights[:, None]).sum(0) for made in candidates])


def shrunk(errors: Tensor, sampled: Tensor, tokens: Tensor, prior: float = PRIOR_TOKENS) -> Tensor:
    """Errors over all tokens of every expert, from sums over the sampled ones: float64 [E, ...].

    errors: [E, ...] sums over `sampled` [E] tokens of an expert; tokens: [E], all that were routed to it. The mean
    error per token is drawn towards the layer's mean with the strength of `prior` tokens, and an expert that no token
    reached counts as if one had: few tokens otherwise mean a cost near 0 by chance. A layer without tokens stays 0.
    """
    shape = (-1, *[1] * (errors.ndim - 1))
    seen = sampled.double().reshape(shape)
    mean = errors.double().sum(0) / seen.sum().clamp(min=1)
    per_token = (errors.double() + prior * mean) / (seen + prior)
    return per_token * tokens.double().clamp(min=1).reshape(shape)
