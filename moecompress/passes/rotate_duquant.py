"""rotate.duquant: experts turn what they receive, so that no channel sticks out, and hold their matrices turned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from moecompress.errors import RecipeError, message
from moecompress.numerics.duquant import duquant
from moecompress.numerics.turn import turned, without_turns
from moecompress.passes.base import Decision, LayerContext, Pass
from moecompress.passes.sampled import intermediate, routed_rows
from moecompress.passes.smoothing import dense
from moecompress.stats.base import Statistic
from moecompress.stats.routing import TokenSample
from moecompress.types import PROJECTIONS, ExpertWeights, LayerFacts, LayerWeights, ModelFacts, Projection, Turn


class RotateDuQuant(Pass):
    """DuQuant (2406.01721) at the inputs of gate and up and of down: rotation, zigzag permutation, rotation.

    T = R1 P R2 is orthogonal, so x W^T = (x T)(W T)^T: exact in full precision. x T is computed while the model runs,
    by the experts themselves; the router and everything else read x as before. An expert's turn is made from the
    tokens routed to it (from all sampled tokens where there are none). It rounds nothing: a `quantize.*` pass with
    `activation_bits` follows; only the native format keeps the turns.
    """

    name: ClassVar[str] = "rotate.duquant"
    paper: ClassVar[str] = "2406.01721"
    changes: ClassVar[frozenset[str]] = frozenset({"experts"})
    transforms_experts: ClassVar[bool] = True

    block: int = Field(128, ge=2, description="channels that are mixed with each other; divides both input sizes")
    steps: int = Field(256, ge=1, le=4096, description="greedy steps of a rotation; the best of them is kept")
    permute: bool = Field(True, description="zigzag permutation and a second rotation")
    projections: tuple[Projection, ...] = Field(PROJECTIONS, min_length=1, description="whose inputs are turned")
    share: Literal["expert", "layer"] = Field(
        "expert", description="expert: a turn of its own for each (EAQuant); layer: one for all experts of a layer"
    )
    rows: int = Field(128, ge=1, description="sampled tokens per turn: those with the largest values")
    tokens: int = Field(1024, ge=1, description="sampled tokens per layer")
    seed: int = Field(0, ge=0, description="of the random part of the rotations")
    calibration: str = Field("default", description="the calibration set to use")

    @property
    def turns_inputs(self) -> bool:
        return True

    def needs(self) -> tuple[Statistic, ...]:
        return (TokenSample(self.tokens),)

    def check(self, facts: ModelFacts) -> list[str]:
        problems = []
        for layer in facts.moe_layers:
            assert layer.site is not None
            sizes = {"gate_up": layer.site.hidden, "down": layer.site.width}
            wrong = {name: sizes[name] for name in self.projections if sizes[name] % self.block}
            if wrong:
                fits = [b for b in (16, 32, 64, 128, 256) if not any(sizes[name] % b for name in self.projections)]
                found = ", ".join(f"{size} inputs of {name}" for name, size in wrong.items())
                works = ", ".join(map(str, fits)) or "none of 16..256"
                problems.append(f"block {self.block} does not divide the {found} (works: {works})")
        return problems[:1]

    def decide(self, context: LayerContext) -> Decision:
        """Tensors, n = experts or 1: `<projection>.first|second` [n, b, b], `.order` int32 [n, c]; `peaks` as data."""
        if context.layer.site is None:
            return Decision({})
        data: dict[str, Any] = {"peaks": {}}
        tensors: dict[str, Tensor] = {}
        for projection in self.projections:
            groups = [[e] for e in range(len(context.weights.experts))]
            if self.share == "layer":
                groups = [[e for group in groups for e in group]]
            made = [self._turn(context, projection, group) for group in groups]
            data["peaks"][projection] = [peaks for _, peaks in made]
            for part in Turn.__dataclass_fields__:
                values = [getattr(turn, part) for turn, _ in made]
                if values[0] is not None:
                    tensors[f"{projection}.{part}"] = torch.stack(values)
        return Decision(data, tensors)

    def apply(self, context: LayerContext, decision: Decision) -> LayerWeights:
        weights = context.weights
        if context.layer.site is None:
            return weights
        experts = list(weights.experts)
        for projection in self.projections:
            turns = _turns(decision.tensors, projection)
            for number, expert in enumerate(experts):
                turn = turns[number if len(turns) > 1 else 0]
                value = expert.projection(projection)
                if not isinstance(value, Tensor) or expert.turn(projection) is not None:
                    found = "has codes or is turned already"
                    where = f"layer {weights.index} expert {number} {projection}"
                    raise RecipeError(message(where, found, then="rotate once, before quantizing"))
                experts[number] = expert.with_projection(projection, turned(dense(value), turn)).with_turn(
                    projection, turn
                )
        return weights.with_experts(tuple(experts))

    def restored(self, layer: LayerFacts, decision: Decision, number: int, expert: ExpertWeights) -> ExpertWeights:
        return without_turns(expert)

    def _turn(self, context: LayerContext, projection: Projection, group: list[int]) -> tuple[Turn, list[float]]:
        """The turn of these experts' inputs and the peaks on the way."""
        sample = context.statistics["token_sample"]
        seen = [self._received(context, sample, projection, number) for number in group]
        x = torch.cat(seen)
        if not len(x):
            x = torch.cat([self._received(context, sample, projection, number, everywhere=True) for number in group])
        x = x if len(x) else x.new_zeros(1, x.shape[1])
        largest = x.abs().amax(1).argsort(descending=True, stable=True)[: self.rows]
        generator = context.generator(group[0] + len(context.weights.experts) * PROJECTIONS.index(projection))
        return duquant(x[largest], self.block, self.steps, self.permute, generator)

    def _received(
        self,
        context: LayerContext,
        sample: Mapping[str, Tensor],
        projection: Projection,
        number: int,
        everywhere: bool = False,
    ) -> Tensor:
        """What a matrix of one expert receives for its sampled tokens, or for all of them."""
        inputs = sample["hidden"].float() if everywhere else routed_rows(sample, number)
        expert = context.weights.experts[number]
        return inputs if projection == "gate_up" else intermediate(context, expert, inputs)


def _turns(tensors: Mapping[str, Tensor], projection: Projection) -> list[Turn]:
    """The turns of a decision, one object per row."""
    first = tensors[f"{projection}.first"]
    order, second = (tensors.get(f"{projection}.{part}") for part in ("order", "second"))
    return [
        Turn(first[n], None if order is None else order[n], None if second is None else second[n])
        for n in range(len(first))
    ]
