"""First and second moments of what every expert's matrices receive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from moecompress.numerics.activation import rounded_activations
from moecompress.stats.base import ExpertObservation, Reduce, State, Statistic
from moecompress.types import PROJECTIONS, MoESite, Projection

Weighting = Literal["none", "affinity"]
Rounding = tuple[int, float]
_UPSTREAM = frozenset({"activations", "attention", "norms", "router"})


@dataclass(frozen=True)
class ExpertHessian(Statistic):
    """Second moments of one projection's inputs, per expert: sum over its tokens of c^power x x^T.

    which: `gate_up` (x = the expert's input, c = H columns) or `down` (x = the intermediate, c = I columns).
    weighting: `affinity` weighs each token by its routing weight c (MoEQuant, 2505.03804, eq. 18-19: power 1;
    power 2 is the exact squared error of the block's output); `none` is the plain GPTQ Hessian.
    experts: (first, end) of the G experts whose matrices are kept; None = all. Counts always cover all experts.
    pooled: also the sum over all experts, kept or not.
    rounding: (bits, clip) of the rounding that x will go through (numerics.activation); x' keeps its full precision.
    all_experts: every token at every expert, routed there or not. paired: also sums (x' - x) x^T, where x' is what
    the expert would receive from the same token in the original stream.

    hessian: float32 [G, c, c], raw sums without the factor 2 / N. tokens: int64 [E]. weight: float64 [E], sum of
    c^power (equal to tokens without weighting). pooled: float32 [c, c]. delta [G, c, c], pooled_delta [c, c]: paired.
    """

    which: Projection
    weighting: Weighting = "none"
    power: Literal[1, 2] = 1
    experts: tuple[int, int] | None = None
    all_experts: bool = False
    paired: bool = False
    pooled: bool = True
    rounding: Rounding | None = None

    @property
    def reduce(self) -> Mapping[str, Reduce]:
        sums = ["hessian", *["delta"] * self.paired]
        keys = [*sums, *(["pooled", *["pooled_delta"] * self.paired] if self.pooled else []), "tokens", "weight"]
        return dict.fromkeys(sorted(keys), "sum")

    @property
    def name(self) -> str:
        parts = ["expert_hessian", self.which]
        if self.weighting != "none":
            parts.append(f"affinity{self.power}")
        if self.experts is not None:
            parts.append(f"{self.experts[0]}-{self.experts[1]}")
        parts += ["all_experts"] * self.all_experts + ["paired"] * self.paired + ["unpooled"] * (not self.pooled)
        parts += [] if self.rounding is None else [f"rounded{self.rounding[0]}-{self.rounding[1]}"]
        return ".".join(parts)

    @property
    def depends_on(self) -> frozenset[str]:
        return _UPSTREAM if self.which == "gate_up" and not self.paired else _UPSTREAM | {"experts"}

    @property
    def paired_intermediate(self) -> bool:
        return self.paired and self.which == "down"

    def init(self, site: MoESite) -> State:
        columns = _columns(site)[self.which]
        first, end = self.experts or (0, site.num_experts)
        state: State = {}
        for key in self.reduce:
            if key in ("tokens", "weight"):
                state[key] = torch.zeros(site.num_experts, dtype=torch.int64 if key == "tokens" else torch.float64)
            else:
                kept = () if key.startswith("pooled") else (end - first,)
                state[key] = torch.zeros(*kept, columns, columns)
        return state

    def observe_expert(self, state: State, seen: ExpertObservation) -> None:
        device = state["hessian"].device
        x = with_rounding(_inputs(seen, self.which).to(device, torch.float32), self.rounding)
        state["tokens"][seen.expert] += x.shape[0]
        root = None
        if self.weighting == "none":
            state["weight"][seen.expert] += x.shape[0]
        else:
            c = seen.weights.to(device, torch.float64).abs() ** self.power
            state["weight"][seen.expert] += c.sum()
            root = c.sqrt().float()[:, None]
        if not self.pooled and not self._keeps(state, seen.expert):
            return
        x = x if root is None else x * root
        self._add(state, seen.expert, "hessian", "pooled", x.t() @ x)
        if self.paired:
            theirs = seen.original_inputs if self.which == "gate_up" else seen.original_intermediate
            assert theirs is not None, "a paired statistic is only collected beside the original stream"
            theirs = theirs.to(device, torch.float32)
            theirs = theirs if root is None else theirs * root
            self._add(state, seen.expert, "delta", "pooled_delta", (theirs - x).t() @ x)

    def _keeps(self, state: State, expert: int) -> bool:
        first, end = self.experts or (0, state["tokens"].shape[0])
        return first <= expert < end

    def _add(self, state: State, expert: int, key: str, pooled: str, product: Tensor) -> None:
        if self.pooled:
            state[pooled] += product
        if self._keeps(state, expert):
            state[key][expert - (self.experts or (0, 0))[0]] += product


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


def with_rounding(x: Tensor, rounding: Rounding | None) -> Tensor:
    """x [..., c] as a matrix with rounded inputs multiplies it. rounding: (bits, clip), None = as it is."""
    return x if rounding is None else rounded_activations(x, *rounding)


def _columns(site: MoESite) -> dict[Projection, int]:
    return {"gate_up": site.hidden, "down": site.width}


def _inputs(seen: ExpertObservation, which: Projection) -> Tensor:
    return seen.inputs if which == "gate_up" else seen.intermediate
