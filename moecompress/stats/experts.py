"""What every expert makes of its tokens: powers of gates and output norms, and EASY-EP's token-weighted contributions.

Raw sums, so that every pruning score of the family S(b, alpha, beta) is a quotient of two numbers of one state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moecompress.stats.base import (
    BlockObservation,
    ExpertObservation,
    Reduce,
    RoutingObservation,
    State,
    Statistic,
)
from moecompress.types import MoESite

POWERS = 3  # exponents 0, 1 and 2 of gate and norm
_DEPENDS = frozenset({"activations", "attention", "experts", "norms", "router"})


@dataclass(frozen=True)
class ExpertActivity(Statistic):
    """Sums over the tokens X_i routed to expert i, with routing weight g and unweighted output norm n = |E_i|_2.

    powers: float64 [E, 3, 3], `powers[i, a, b]` = sum of g^a n^b: (0, 0) counts, (1, 0) soft counts, (0, 1) EAN,
    (1, 1) REAP's numerator (2510.13999), (2, 2) both squared. max_output: float32 [E], the largest |element| of an
    output. probability: float64 [E], sum over ALL tokens of the softmax of the router's first output; zeros where
    there is none.
    """

    name: ClassVar[str] = "expert_activity"
    depends_on: ClassVar[frozenset[str]] = _DEPENDS
    reduce: ClassVar[Mapping[str, Reduce]] = {"max_output": "max", "powers": "sum", "probability": "sum"}

    def init(self, site: MoESite) -> State:
        return {
            "max_output": torch.zeros(site.num_experts),
            "powers": torch.zeros(site.num_experts, POWERS, POWERS, dtype=torch.float64),
            "probability": torch.zeros(site.num_experts, dtype=torch.float64),
        }

    def observe_routing(self, state: State, seen: RoutingObservation) -> None:
        total = state["probability"]
        if seen.logits is None or seen.logits.shape[-1] < total.shape[0]:
            return
        total += seen.logits.to(total).softmax(-1).sum(0)[: total.shape[0]]

    def observe_expert(self, state: State, seen: ExpertObservation) -> None:
        if seen.outputs.shape[0] == 0:
            return
        sums = state["powers"][seen.expert]
        gates, norms = seen.weights.to(sums), norms_of(seen.outputs).to(sums.device)
        exponents = torch.arange(POWERS, dtype=torch.float64, device=sums.device)
        sums += (gates[:, None] ** exponents).t() @ (norms[:, None] ** exponents)
        largest = state["max_output"][seen.expert]
        torch.maximum(largest, seen.outputs.abs().max().to(largest), out=largest)


@dataclass(frozen=True)
class TokenContributions(Statistic):
    """EASY-EP's expert scores (2504.06792): sum over tokens of g |E_i|_2 s_t, s_t = max(0, 1 - cos(x_t, x_t + r_t)).

    x_t: the residual stream that the norm before the experts reads; r_t: the sum of the ROUTED experts alone, so shared
    experts play no part. s_t is 0 where x_t or x_t + r_t is 0. A plain sum over all tokens.
    score: float64 [E]. token_weight: float64 [], sum of s_t. tokens: int64 [].
    """

    name: ClassVar[str] = "token_contributions"
    depends_on: ClassVar[frozenset[str]] = _DEPENDS
    blocks: ClassVar[bool] = True
    reduce: ClassVar[Mapping[str, Reduce]] = {"score": "sum", "token_weight": "sum", "tokens": "sum"}

    def init(self, site: MoESite) -> State:
        return {
            "score": torch.zeros(site.num_experts, dtype=torch.float64),
            "token_weight": torch.zeros((), dtype=torch.float64),
            "tokens": torch.zeros((), dtype=torch.int64),
        }

    def observe_block(self, state: State, seen: BlockObservation) -> None:
        score = state["score"]
        weight = token_weights(seen.residual.to(score), seen.routed.to(score))
        score += (seen.contributions.to(score) * weight[:, None]).sum(0)
        state["token_weight"] += weight.sum()
        state["tokens"] += weight.shape[0]


def norms_of(outputs: Tensor) -> Tensor:
    """[n, H] -> float64 [n], Euclidean norms."""
    return outputs.double().square().sum(-1).sqrt()


def token_weights(residual: Tensor, routed: Tensor) -> Tensor:
    """s_t = max(0, 1 - cos(x_t, x_t + r_t)) of [T, H] and [T, H] -> [T]; 0 where either vector is 0."""
    after = residual + routed
    size = norms_of(residual) * norms_of(after)
    cosine = (residual.double() * after.double()).sum(-1) / size.clamp_min(torch.finfo(torch.float64).tiny)
    return torch.where(size > 0, (1 - cosine).clamp_min(0), 0.0).to(residual.dtype)
