"""First and second moments of what every expert's matrices receive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from moecompress.stats.base import ExpertObservation, Reduce, State, Statistic
from moecompress.types import PROJECTIONS, MoESite, Projection

Weighting = Literal["none", "affinity"]
_UPSTREAM = frozenset({"activations", "attention", "norms", "router"})


@dataclass(frozen=True)
class ExpertHessian(Statistic):
    """Second moments of one projection's inputs, per expert: sum over its tokens of c^power x x^T.

    which: `gate_up` (x = the expert's input, c = H columns) or `down` (x = the intermediate, c = I columns).
    weighting: `affinity` weighs each token by its routing weight c (MoEQuant, 2505.03804, eq. 18-19: power 1;
    power 2 is the exact squared error of the block's output); `none` is the plain GPTQ Hessian.
    hessian: float32 [E, c, c], raw sums without the factor 2 / N. tokens: int64 [E]. weight: float64 [E], sum of
    c^power (equal to tokens without weighting).
    """

    which: Projection
    weighting: Weighting = "none"
    power: Literal[1, 2] = 1

    reduce: ClassVar[Mapping[str, Reduce]] = {"hessian": "sum", "tokens": "sum", "weight": "sum"}

    @property
    def name(self) -> str:
        weighted = "" if self.weighting == "none" else f".affinity{self.power}"
        return f"expert_hessian.{self.which}{weighted}"

    @property
    def depends_on(self) -> frozenset[str]:
        return _UPSTREAM if self.which == "gate_up" else _UPSTREAM | {"experts"}

    def init(self, site: MoESite) -> State:
        columns = _columns(site)[self.which]
        return {
            "hessian": torch.zeros(site.num_experts, columns, columns),
            "tokens": torch.zeros(site.num_experts, dtype=torch.int64),
            "weight": torch.zeros(site.num_experts, dtype=torch.float64),
        }

    def observe_expert(self, state: State, seen: ExpertObservation) -> None:
        device = state["hessian"].device
        x = _inputs(seen, self.which).to(device, torch.float32)
        state["tokens"][seen.expert] += x.shape[0]
        if self.weighting == "none":
            state["weight"][seen.expert] += x.shape[0]
        else:
            c = seen.weights.to(device, torch.float64).abs() ** self.power
            state["weight"][seen.expert] += c.sum()
            x = x * c.sqrt().float()[:, None]
        state["hessian"][seen.expert].addmm_(x.t(), x)


@dataclass(frozen=True)
class InputMoments(Statistic):
    """Sizes of each input channel of both projections, per expert.

    State, with p = `gate_up` [E, H] or `down` [E, I]: `p.abs_sum` float64, `p.abs_max` float32, and tokens int64 [E].
    Finalised also `p.abs_mean` float32; channels of an expert without tokens are 0.
    """

    name: ClassVar[str] = "input_moments"
    depends_on: ClassVar[frozenset[str]] = _UPSTREAM | {"experts"}
    reduce: ClassVar[Mapping[str, Reduce]] = {
        "down.abs_max": "max",
        "down.abs_sum": "sum",
        "gate_up.abs_max": "max",
        "gate_up.abs_sum": "sum",
        "tokens": "sum",
    }

    def init(self, site: MoESite) -> State:
        state: State = {}
        for which, columns in sorted(_columns(site).items()):
            state[f"{which}.abs_max"] = torch.zeros(site.num_experts, columns)
            state[f"{which}.abs_sum"] = torch.zeros(site.num_experts, columns, dtype=torch.float64)
        state["tokens"] = torch.zeros(site.num_experts, dtype=torch.int64)
        return state

    def observe_expert(self, state: State, seen: ExpertObservation) -> None:
        if seen.inputs.shape[0] == 0:
            return
        state["tokens"][seen.expert] += seen.inputs.shape[0]
        for which in PROJECTIONS:
            largest, total = state[f"{which}.abs_max"][seen.expert], state[f"{which}.abs_sum"][seen.expert]
            size = _inputs(seen, which).to(largest.device, torch.float32).abs()
            torch.maximum(largest, size.amax(0), out=largest)
            total += size.sum(0, dtype=torch.float64)

    def finalise(self, state: State) -> dict[str, Tensor]:
        tokens = state["tokens"].clamp(min=1)[:, None]
        means = {f"{which}.abs_mean": (state[f"{which}.abs_sum"] / tokens).float() for which in PROJECTIONS}
        return dict(sorted({**state, **means}.items()))


def _columns(site: MoESite) -> dict[Projection, int]:
    return {"gate_up": site.hidden, "down": site.width}


def _inputs(seen: ExpertObservation, which: Projection) -> Tensor:
    return seen.inputs if which == "gate_up" else seen.intermediate
