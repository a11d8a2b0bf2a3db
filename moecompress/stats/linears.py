"""Second moments of the inputs of a layer's ordinary Linear matrices (attention, shared experts, dense MLP)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from moecompress.stats.base import LinearObservation, Reduce, State, Statistic
from moecompress.stats.moments import Rounding, with_rounding
from moecompress.types import MoESite


@dataclass(frozen=True)
class LinearHessian(Statistic):
    """sum x x^T of every named Linear's input, float32 [in, in] under the Linear's name; raw, without 2 / N.

    columns: (weight name inside the layer, input columns) of the matrices. Linears that receive the same tensor
    (q, k, v; gate, up) share one sum, in memory too. rounding: as in `ExpertHessian`.
    gates: (Linear of a shared expert, weight of the sigmoid gate behind it): its tokens count by that gate to the
    `power`, as routed ones do by theirs (AGQ, 2505.03804).
    """

    columns: tuple[tuple[str, int], ...]
    rounding: Rounding | None = None
    gates: tuple[tuple[str, str], ...] = ()
    power: Literal[1, 2] = 1

    name: ClassVar[str] = "linear_hessian"
    depends_on: ClassVar[frozenset[str]] = frozenset(
        {"activations", "attention", "dense_mlp", "experts", "norms", "router", "shared_experts"}
    )

    @property
    def reduce(self) -> Mapping[str, Reduce]:
        return dict.fromkeys(sorted(self.linears), "sum")

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.columns)

    @property
    def gated(self) -> Mapping[str, str]:
        return dict(self.gates)

    def init(self, site: MoESite | None) -> State:
        return {name: torch.zeros(columns, columns) for name, columns in sorted(self.columns)}

    def observe_linear(self, state: State, seen: LinearObservation) -> None:
        if seen.name not in state:
            return
        gates = self.gated
        shared = seen.same_as
        if shared is not None and shared in state and gates.get(shared) == gates.get(seen.name):
            state[seen.name] = state[shared]
            return
        x = with_rounding(seen.inputs.to(state[seen.name].device, torch.float32), self.rounding)
        if seen.name in gates:
            assert seen.gates is not None, "the collector reports the gates that are asked for"
            x = x * (seen.gates.to(x) ** (self.power / 2))[:, None]
        state[seen.name].addmm_(x.t(), x)
