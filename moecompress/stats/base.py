"""What a statistic is: raw sums over observations, with a declared way to join the sums of two parts of the data.

A statistic never stores a mean: raw sums make the result independent of batch size and order, let two halves of the
data be merged, and let a run be resumed. Its state belongs to the caller, who may keep it on any device; observations
are moved to the state's device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from moecompress.types import MoESite

State = dict[str, Tensor]
Reduce = Literal["sum", "min", "max", "concat"]


@dataclass(frozen=True)
class RoutingObservation:
    """Inputs and routing of one call of a layer's experts.

    hidden: [T, H]. ids: int64 [T, K], E = skipped slot. weights: [T, K], what multiplies each expert's output.
    logits: [T, E] before the top-k, or None where the family has none. rows: int64 [T], unique position of each token
    in the token set.
    """

    hidden: Tensor
    ids: Tensor
    weights: Tensor
    logits: Tensor | None
    rows: Tensor


@dataclass(frozen=True)
class ExpertObservation:
    """What one expert received and made in one call: n of the call's tokens, in ascending order of rows.

    rows: int64 [n], weights: [n], outputs: [n, H] before the routing weight. inputs: [n, H], intermediate: [n, I]: as
    gate_up and down multiply them, turned and rounded where the expert does so. original_inputs,
    original_intermediate: the same tokens in the original stream, through the same expert; only when a statistic asks
    for pairs.
    """

    expert: int
    rows: Tensor
    weights: Tensor
    inputs: Tensor
    intermediate: Tensor
    outputs: Tensor
    original_inputs: Tensor | None = None
    original_intermediate: Tensor | None = None


@dataclass(frozen=True)
class LinearObservation:
    """What one Linear of the layer received in one call: inputs [n, in], training tokens only.

    same_as: another Linear that received this very tensor before, or None. gates: [n], what multiplies the output of
    the shared expert that this Linear is part of; None where nothing does, or nobody asked.
    """

    name: str
    inputs: Tensor
    same_as: str | None
    gates: Tensor | None = None


@dataclass(frozen=True)
class BlockObservation:
    """One call of the experts as a whole, training tokens only.

    residual: [T, H], what the norm before the experts reads. routed: [T, H], what the routed experts made together.
    contributions: float64 [T, E], routing weight times norm of the expert's output, 0 where it was not chosen.
    """

    residual: Tensor
    routed: Tensor
    contributions: Tensor


@dataclass(frozen=True)
class RouterObservation:
    """What the matrix of one layer's router received in one call, and what it makes of it beside what it should.

    rows: int64 [n]. inputs: [n, C], with a last column of ones where the router has a bias. given: [n, R], its outputs
    before any scoring. wanted: [n, R], those of the original model for the same tokens. chosen: int64 [n, K], the
    experts that the original model chose, among the R; R = one that is no longer there.
    """

    rows: Tensor
    inputs: Tensor
    given: Tensor
    wanted: Tensor
    chosen: Tensor


class Statistic(Protocol):
    """A frozen dataclass that implements `init` and one or more of the observers.

    name: key of the result; includes the parameters that change what the numbers mean.
    depends_on: what a pass may not change (`Pass.changes`) without making the statistic stale.
    reduce: for every key of the state, how two states join.
    """

    @property
    def name(self) -> str: ...

    @property
    def depends_on(self) -> frozenset[str]: ...

    @property
    def reduce(self) -> Mapping[str, Reduce]: ...

    @property
    def all_experts(self) -> bool:
        """Whether `observe_expert` wants every token at every expert (routing weight 1) instead of the routed ones."""
        return False

    @property
    def paired(self) -> bool:
        """Whether `observe_expert` needs the original stream's inputs beside the compressed stream's."""
        return False

    @property
    def paired_intermediate(self) -> bool:
        """Whether a paired statistic also needs the original stream's intermediate, which costs an expert's forward."""
        return self.paired

    @property
    def linears(self) -> tuple[str, ...]:
        """Linear weights (names inside the layer) whose inputs `observe_linear` wants."""
        return ()

    @property
    def gated(self) -> Mapping[str, str]:
        """Linear of a shared expert -> weight of the one-row sigmoid gate behind it, where `gates` are wanted."""
        return {}

    @property
    def blocks(self) -> bool:
        """Whether `observe_block` wants calls of the experts as a whole, with the residual stream around them."""
        return False

    def observe_router(self, state: State, seen: RouterObservation) -> None:
        """Add what one call showed the router to `state` in place; nothing by default."""
        return

    def covers(self, other: Statistic) -> bool:
        """Whether who asked for `other` is served by the result of this one; both have the same name."""
        return self == other

    def init(self, site: MoESite) -> State:
        """An empty state with the keys of `reduce` in sorted order."""
        ...

    def observe_routing(self, state: State, seen: RoutingObservation) -> None:
        """Add one call to `state` in place; nothing by default."""
        return

    def observe_expert(self, state: State, seen: ExpertObservation) -> None:
        """Add one expert's part of a call to `state` in place; nothing by default."""
        return

    def observe_linear(self, state: State, seen: LinearObservation) -> None:
        """Add one Linear's inputs of a call to `state` in place; nothing by default."""
        return

    def observe_block(self, state: State, seen: BlockObservation) -> None:
        """Add one whole call of the experts to `state` in place; nothing by default."""
        return

    def state_bytes(self, site: MoESite) -> int:
        """Bytes of a full state: those of an empty one by default, which is right for everything but samples."""
        with torch.device("meta"):
            return sum(value.nbytes for value in self.init(site).values())

    def settle(self, state: State) -> None:
        """Bring a freshly concatenated state into its usual form, in place; nothing by default."""
        return

    def finalise(self, state: State) -> dict[str, Tensor]:
        """What passes read. By default the raw sums themselves, not copied."""
        return dict(state)


def merge(statistic: Statistic, a: State, b: State) -> State:
    """The state of having seen what `a` saw and what `b` saw; neither is changed.

    Associative and commutative up to the rounding of sums. Raises ValueError when the keys are not the statistic's.
    """
    for state in (a, b):
        if set(state) != set(statistic.reduce):
            raise ValueError(f"{statistic.name}: state keys {sorted(state)}; allowed: {sorted(statistic.reduce)}")
    merged = {key: _join(how, a[key], b[key].to(a[key].device)) for key, how in sorted(statistic.reduce.items())}
    statistic.settle(merged)
    return merged


def _join(how: Reduce, a: Tensor, b: Tensor) -> Tensor:
    if how == "sum":
        return a + b
    if how == "min":
        return torch.minimum(a, b)
    if how == "max":
        return torch.maximum(a, b)
    return torch.cat([a, b])
