"""Expert-Balanced Self-Sampling (MoEQuant, 2505.03804, eq. 2-13): the objective and one step of its search.

Letters as everywhere; S sentences, B beams of each, C children per beam. The score of a text is a cost (the paper
writes "maximise"): its negative log-likelihood per token plus sigma / tau; sigma says how unevenly experts are used.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moecompress.numerics.sampling import gumbel


def sigma(counts: Tensor, tokens: int) -> Tensor:
    """Imbalance float64 [...] of counts int64 [..., L, E] over that many tokens (eq. 3, 4).

    Mean over layers of the sample standard deviation (E - 1) over experts of u = count / tokens. So the frequencies of
    a layer sum to K, the convention under which the paper's own figures are possible.
    """
    return (counts.double() / tokens).std(-1, correction=1).mean(-1)


def imbalance(counts: Tensor, tokens: int, corpus: Tensor | None, corpus_tokens: int) -> Tensor:
    """The balance term of a prefix, before the division by tau. counts: int64 [..., L, E] of its `tokens` tokens.

    Without a corpus: its own sigma. With one (counts int64 [L, E] of the texts finished before): sigma of both together
    times (corpus tokens + tokens) / tokens. That is eq. 9 written for the whole data set and divided by the prefix's
    share of it, so the term does not fade as the corpus grows.
    """
    if corpus is None or corpus_tokens == 0:
        return sigma(counts, tokens)
    together = corpus_tokens + tokens
    return sigma(counts + corpus, together) * (together / tokens)


def likeliest(logprobs: Tensor, take: int) -> tuple[Tensor, Tensor]:
    """The `take` largest of float [..., V] with their ids, descending; equal ones by ascending id."""
    take = min(take, logprobs.shape[-1])
    values, ids = logprobs.topk(take, -1)
    flat, bar = logprobs.reshape(-1, logprobs.shape[-1]), values[..., -1:].reshape(-1, 1)
    tied = ((flat >= bar).sum(-1) > take).nonzero()[:, 0]  # topk leaves open which of equal ones it takes
    if tied.numel():
        best = flat[tied].sort(dim=-1, descending=True, stable=True)
        values.view(-1, take)[tied], ids.view(-1, take)[tied] = best.values[:, :take], best.indices[:, :take]
    ids, order = ids.sort(-1)
    values, order = values.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, order)


def drawn(
    logprobs: Tensor, take: int, pool: int, temperature: float, generators: Sequence[torch.Generator]
) -> tuple[Tensor, Tensor]:
    """`take` different tokens per beam, drawn from P^(1 / temperature) among its `pool` likeliest: log P and ids.

    logprobs: float64 [S, B, V]; generators[s] serves sentence s, which so depends on no other.
    """
    values, ids = likeliest(logprobs, max(take, pool))
    noise = torch.stack([gumbel(tuple(values.shape[1:]), own) for own in generators])
    chosen = (values / temperature + noise).topk(min(take, values.shape[-1]), -1).indices
    return values.gather(-1, chosen), ids.gather(-1, chosen)


def best_children(
    likelihood: Tensor, deferred: Tensor, values: Tensor, length: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The best children of all beams of a sentence together (eq. 11, 13): parents [S, B'], places among the parent's
    children [S, B'] and their likelihoods [S, B'], best first; B' = min(width, B * C).

    likelihood: float64 [S, B], sum of log P of each beam of `length` tokens. deferred: [S, B], the beam's own imbalance
    over tau, the same for all its children. values: [S, B, C], log P of the children. Ties: parent, then place.
    """
    grown = likelihood[..., None] + values
    score = -grown / (length + 1) + deferred[..., None]
    children = values.shape[-1]
    flat = score.flatten(1).sort(dim=-1, stable=True).indices[:, :width]
    return flat // children, flat % children, grown.flatten(1).gather(1, flat)


def add_routes(counts: Tensor, routed: Tensor) -> Tensor:
    """counts int64 [R, L, E] with one more token per row: routed int64 [L, R, K], E = skipped."""
    rows, layers, experts = counts.shape
    padded = torch.cat([counts, counts.new_zeros(rows, layers, 1)], -1)
    per_row = routed.transpose(0, 1)
    return padded.scatter_add_(2, per_row, torch.ones_like(per_row))[..., :experts]
