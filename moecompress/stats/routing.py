"""Who is routed where, and a sample of real expert inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moecompress.stats.base import Reduce, RoutingObservation, State, Statistic
from moecompress.types import MoESite


@dataclass(frozen=True)
class RoutingCounts(Statistic):
    """How often and how strongly each expert is chosen; skipped slots do not count.

    tokens: int64 [E], slots routed to the expert. total: int64 [], tokens seen. gate_sum, gate_square: float64 [E],
    sums of the routing weight and of its square.
    """

    name: ClassVar[str] = "routing_counts"
    depends_on: ClassVar[frozenset[str]] = frozenset({"attention", "norms", "router"})
    reduce: ClassVar[Mapping[str, Reduce]] = {
        "gate_square": "sum",
        "gate_sum": "sum",
        "tokens": "sum",
        "total": "sum",
    }

    def init(self, site: MoESite) -> State:
        return {
            "gate_square": torch.zeros(site.num_experts, dtype=torch.float64),
            "gate_sum": torch.zeros(site.num_experts, dtype=torch.float64),
            "tokens": torch.zeros(site.num_experts, dtype=torch.int64),
            "total": torch.zeros((), dtype=torch.int64),
        }

    def observe_routing(self, state: State, seen: RoutingObservation) -> None:
        experts, device = state["tokens"].shape[0], state["tokens"].device
        ids, gates = seen.ids.to(device), seen.weights.to(device, torch.float64)
        state["tokens"] += torch.bincount(ids.flatten(), minlength=experts + 1)[:experts]
        state["total"] += ids.shape[0]
        for key, value in (("gate_sum", gates), ("gate_square", gates.square())):
            per_token = gates.new_zeros(ids.shape[0], experts + 1).scatter_add_(1, ids, value)
            state[key] += per_token[:, :experts].sum(0)  # no atomic float adds: repeatable on GPUs


@dataclass(frozen=True)
class RoutingBySequence(Statistic):
    """How often each sequence chooses each expert; skipped slots do not count.

    sequences N, length T: of the token set, whose rows are numbered sequence * T + place. tokens: int64 [N, E].
    """

    sequences: int
    length: int

    name: ClassVar[str] = "routing_by_sequence"
    depends_on: ClassVar[frozenset[str]] = frozenset({"attention", "norms", "router"})
    reduce: ClassVar[Mapping[str, Reduce]] = {"tokens": "sum"}

    def init(self, site: MoESite) -> State:
        return {"tokens": torch.zeros(self.sequences, site.num_experts, dtype=torch.int64)}

    def observe_routing(self, state: State, seen: RoutingObservation) -> None:
        total = state["tokens"]
        count, experts = total.shape
        ids, sequence = seen.ids.to(total.device), (seen.rows // self.length).to(total.device)
        slots = sequence[:, None] * (experts + 1) + ids
        total += torch.bincount(slots.flatten(), minlength=count * (experts + 1)).view(count, experts + 1)[:, :experts]


@dataclass(frozen=True)
class RoutedProbability(Statistic):
    """Sum over the tokens routed to each expert of its softmax probability over ALL experts: PMQ's weight (2410.06270).

    probability: float64 [E], before any renormalisation over the chosen ones. The routing weight stands in where the
    router's first output is not one number per expert.
    """

    name: ClassVar[str] = "routed_probability"
    depends_on: ClassVar[frozenset[str]] = frozenset({"attention", "norms", "router"})
    reduce: ClassVar[Mapping[str, Reduce]] = {"probability": "sum"}

    def init(self, site: MoESite) -> State:
        return {"probability": torch.zeros(site.num_experts, dtype=torch.float64)}

    def observe_routing(self, state: State, seen: RoutingObservation) -> None:
        total = state["probability"]
        experts = total.shape[0]
        ids, values = seen.ids.to(total.device), seen.weights.to(total)
        if seen.logits is not None and seen.logits.shape[-1] == experts:
            chances = torch.nn.functional.pad(seen.logits.to(total).softmax(-1), (0, 1))
            values = chances.gather(1, ids)  # a skipped slot reads the padding
        per_token = total.new_zeros(ids.shape[0], experts + 1).scatter_add_(1, ids, values)
        total += per_token[:, :experts].sum(0)


@dataclass(frozen=True)
class TokenSample(Statistic):
    """Up to `n` tokens of the layer with their routing: real inputs for searches and accept / roll back.

    The tokens with the n smallest hashes of (row, seed), so the choice depends neither on the batches nor on their
    order, and merged samples are samples of the merged data. Ascending by row.
    hidden: float32 [m, H], ids: int64 [m, K], weights: float32 [m, K], rows: int64 [m], m <= n.
    The name is the same for every n: a smaller sample of the same seed is part of a larger one, so one serves all.
    """

    n: int
    seed: int = 0

    name: ClassVar[str] = "token_sample"
    depends_on: ClassVar[frozenset[str]] = frozenset({"activations", "attention", "norms", "router"})
    reduce: ClassVar[Mapping[str, Reduce]] = {
        "hidden": "concat",
        "ids": "concat",
        "rows": "concat",
        "weights": "concat",
    }

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n: {self.n}; allowed: at least 1")

    def covers(self, other: Statistic) -> bool:
        return isinstance(other, TokenSample) and self.seed == other.seed and self.n >= other.n

    def init(self, site: MoESite) -> State:
        return {
            "hidden": torch.empty(0, site.hidden),
            "ids": torch.empty(0, site.top_k, dtype=torch.int64),
            "rows": torch.empty(0, dtype=torch.int64),
            "weights": torch.empty(0, site.top_k),
        }

    def state_bytes(self, site: MoESite) -> int:
        return self.n * (4 * site.hidden + 12 * site.top_k + 8)

    def observe_routing(self, state: State, seen: RoutingObservation) -> None:
        device = state["rows"].device
        rows = seen.rows.to(device)
        take = _lowest(rows, self.n, self.seed)
        if state["rows"].shape[0] == self.n:  # most tokens of later batches stop here, before anything is copied
            bar = row_hash(state["rows"], self.seed).max()
            take = take[row_hash(rows[take], self.seed) < bar]
        if take.numel() == 0:
            return
        source = {"hidden": seen.hidden, "ids": seen.ids, "rows": seen.rows, "weights": seen.weights}
        for key, old in state.items():
            new = source[key]
            state[key] = torch.cat([old, new[take.to(new.device)].to(device, old.dtype)])
        self.settle(state)

    def settle(self, state: State) -> None:
        keep_lowest(state, self.n, self.seed)


def keep_lowest(state: State, n: int, seed: int) -> None:
    """Keep the n tokens of a sample with the smallest hashes of state["rows"], in ascending order, in place."""
    take = _lowest(state["rows"], n, seed)
    for key, value in state.items():
        state[key] = value[take]


def row_hash(rows: Tensor, seed: int) -> Tensor:
    """int64 [n] -> int64 [n]: the splitmix64 mixer, a bijection for every seed, so different rows never tie."""
    x = rows + (seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15 + 2**63) % 2**64 - 2**63
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor
    return x ^ (x >> 31 & (1 << 33) - 1)


def _lowest(rows: Tensor, n: int, seed: int) -> Tensor:
    """Positions of the n rows with the smallest hashes, in ascending order of the rows."""
    kept = torch.argsort(row_hash(rows, seed))[:n]
    return kept[torch.argsort(rows[kept])]
