"""How alike experts are: products of router logits, mean outputs, and who is chosen together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moecompress.stats.base import ExpertObservation, Reduce, RoutingObservation, State, Statistic
from moecompress.types import MoESite

_ROUTING = frozenset({"activations", "attention", "norms", "router"})


@dataclass(frozen=True)
class RouterGram(Statistic):
    """Products of raw router logits: gram float64 [E, E] = sum over tokens of h h^T. tokens: int64 [].

    tokens stays 0 where the router's first output is not one number per expert.
    """

    name: ClassVar[str] = "router_gram"
    depends_on: ClassVar[frozenset[str]] = _ROUTING
    reduce: ClassVar[Mapping[str, Reduce]] = {"gram": "sum", "tokens": "sum"}

    def init(self, site: MoESite) -> State:
        experts = site.num_experts
        return {
            "gram": torch.zeros(experts, experts, dtype=torch.float64),
            "tokens": torch.zeros((), dtype=torch.int64),
        }

    def observe_routing(self, state: State, seen: RoutingObservation) -> None:
        gram = state["gram"]
        if seen.logits is None or seen.logits.shape[-1] != gram.shape[0]:
            return
        logits = seen.logits.to(gram)
        gram += logits.T @ logits
        state["tokens"] += logits.shape[0]


@dataclass(frozen=True)
class MeanOutputs(Statistic):
    """Every expert's unweighted output, over ALL tokens whoever they are routed to (HC-SMoE, 2410.08589).

    sum: float64 [E, H]. tokens: int64 [E]. Finalised also mean float64 [E, H].
    """

    name: ClassVar[str] = "mean_outputs"
    depends_on: ClassVar[frozenset[str]] = _ROUTING | {"experts"}
    all_experts: ClassVar[bool] = True
    reduce: ClassVar[Mapping[str, Reduce]] = {"sum": "sum", "tokens": "sum"}

    def init(self, site: MoESite) -> State:
        return {
            "sum": torch.zeros(site.num_experts, site.hidden, dtype=torch.float64),
            "tokens": torch.zeros(site.num_experts, dtype=torch.int64),
        }

    def observe_expert(self, state: State, seen: ExpertObservation) -> None:
        state["sum"][seen.expert] += seen.outputs.to(state["sum"]).sum(0)
        state["tokens"][seen.expert] += seen.outputs.shape[0]

    def finalise(self, state: State) -> dict[str, Tensor]:
        return {"mean": state["sum"] / state["tokens"].clamp_min(1)[:, None], **state}


@dataclass(frozen=True)
class CoActivation(Statistic):
    """Who is chosen together: pairs int64 [E, E], tokens that chose both; the diagonal counts who is chosen at all."""

    name: ClassVar[str] = "co_activation"
    depends_on: ClassVar[frozenset[str]] = _ROUTING
    reduce: ClassVar[Mapping[str, Reduce]] = {"pairs": "sum"}

    def init(self, site: MoESite) -> State:
        return {"pairs": torch.zeros(site.num_experts, site.num_experts, dtype=torch.int64)}

    def observe_routing(self, state: State, seen: RoutingObservation) -> None:
        experts = state["pairs"].shape[0]
        chosen = torch.zeros(seen.ids.shape[0], experts + 1, dtype=torch.float64, device=state["pairs"].device)
        chosen.scatter_(1, seen.ids.to(chosen.device), 1.0)
        chosen = chosen[:, :experts]
        state["pairs"] += (chosen.T @ chosen).long()
