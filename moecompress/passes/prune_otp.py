"""prune.otp: online top-any pruning. A small network per layer learns how many experts each token needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from moecompress.experts import materialise
from moecompress.gate import Gate, Relaxation
from moecompress.numerics.gating import (
    MASK_ROUTER,
    mask_logits,
    mask_router,
    shift_to_share,
    slot_order,
    weighing_router,
)
from moecompress.numerics.grids import is_absent
from moecompress.passes.base import Decision, LayerContext, Scope
from moecompress.passes.gating import Gating, site_of, with_gate
from moecompress.stats.routing import TokenSample
from moecompress.stream.layers import experts_of
from moecompress.stream.streams import final_logits
from moecompress.stream.train import GATE, TrainContext, forward_backward
from moecompress.types import ExpertWeights, LayerFacts, LayerWeights, ModelFacts, TokenBatch

_MEMORY = 0.9  # of the running mean of kept shares
_SEEDS = 1 << 62
_SHIFT_TOKENS = 1024  # per layer on which the final share is met


class PruneOTP(Gating):
    """OTP (2510.10962, MC#): a mask router per layer chooses among the candidates "keep the first n experts".

    Its input is what enters the experts and the routing weights by falling size. It is trained on the model as the
    passes before left it: the softmax over candidates, with Gumbel noise and a falling temperature, weighs the experts
    (straight through in the later steps); the loss is the KL divergence of the predictions from those without pruning,
    plus a penalty on the share of experts kept, whose weight follows the difference to `target`. Nothing else is
    trained. At inference the largest output decides, per token and without noise: what was drawn with noise then uses
    other shares, so that the outputs are finally shifted, alike for all layers, to meet `target` (`exact`).

    The paper does not give the network's size, schedule, optimiser or penalty: they are ours, and so is the shift.
    """

    name: ClassVar[str] = "prune.otp"
    paper: ClassVar[str] = "2510.10962"
    scope: ClassVar[Scope] = Scope.TRAIN

    target: float = Field(0.75, gt=0, le=1, description="mean share of a token's experts that are used")
    steps: int = Field(300, ge=1, description="training steps")
    batch: int = Field(8, ge=1, description="calibration sequences per step")
    learning_rate: float = Field(3e-3, gt=0, description="of AdamW, falling to 0 along a cosine")
    width: int | None = Field(None, ge=1, description="hidden units of a mask router: 64, or 16 for two experts")
    temperature: tuple[float, float] = Field(
        (4.0, 0.1), description="of the relaxation, from the first to the last step"
    )
    straight_through: float = Field(0.5, ge=0, le=1, description="share of the steps before the choice itself is used")
    keep_all: float = Field(0.97, gt=0, lt=1, description="probability of keeping all experts at the beginning")
    start: Literal["keep_all", "weights"] = Field(
        "keep_all", description="begin by keeping all, or at `target` with the routing weights alone (few steps)"
    )
    penalty_rate: float = Field(0.05, gt=0, description="how fast the penalty's weight follows the kept share")
    exact: bool = Field(True, description="shift the outputs at the end so that calibration tokens use `target`")
    teacher: Literal["compressed", "original"] = Field(
        "compressed", description="whose predictions are learned: of the model before this pass, or of the source"
    )
    seed: int = Field(0, ge=0, description="of the first weights, the order of sequences and the noise")

    def added_bytes(self, layer: LayerFacts) -> int:
        site = layer.site
        if site is None:
            return 0
        width = self.units(site.top_k)
        return 4 * (width * (site.hidden + site.top_k) + site.top_k * width + site.top_k)

    def units(self, slots: int) -> int:
        """Hidden units of a mask router over `slots` experts."""
        return self.width or (16 if slots <= 2 else 64)

    @property
    def needs_data(self) -> bool:
        return True

    def check(self, facts: ModelFacts) -> list[str]:
        slots = max((layer.site.top_k for layer in facts.moe_layers if layer.site is not None), default=0)
        narrow = self.start == "weights" and self.units(slots) < slots - 1
        return super().check(facts) + ([f"width: start: weights needs {slots - 1} units"] if narrow else [])

    def measure(self, context: LayerContext) -> Mapping[str, Mapping[str, Tensor]]:
        sample = context.statistics[TokenSample.name]
        order = slot_order(sample["ids"], sample["weights"])
        ranked = sample["weights"].gather(-1, order)
        return {"routing": {"ranked": ranked, "hidden": sample["hidden"][:_SHIFT_TOKENS].clone()}}

    def decide(self, context: TrainContext) -> Decision:
        """Train; `share`: kept over all layers in the last steps, by layer; `penalty`: its weight at the end."""
        training = _Training(self, context)
        for step in range(self.steps):
            loss, share = training.step(step)
            if (step + 1) % max(1, self.steps // 10) == 0:
                context.note(f"{self.name}: step {step + 1} of {self.steps}, loss {loss:.4f}, experts used {share:.3f}")
        shift = training.shift() if self.exact else 0.0
        data = {
            "layers": {str(index): {"renormalise": value} for index, value in training.renormalise.items()},
            "share": {str(index): value for index, value in training.shares.items()},
            "penalty": training.penalty,
            "shift": shift,
        }
        return Decision(data, {f"{index}.{name}": leaf.detach() for (index, name), leaf in training.leaves.items()})

    def apply(self, context: LayerContext, decision: Decision) -> LayerWeights:
        values = decision.data["layers"].get(str(context.weights.index))
        if values is None:
            return context.weights
        tensors = {name: decision.tensors[f"{context.weights.index}.{GATE}{name}"] for name in MASK_ROUTER}
        return with_gate(context, Gate("mask_router", values["renormalise"], tensors))


@dataclass(frozen=True)
class _Moment:
    """Where the schedule is at one step."""

    temperature: float
    straight_through: bool
    learning_rate: float

    @classmethod
    def of(cls, step: PruneOTP, number: int) -> _Moment:
        done = number / max(1, step.steps - 1)
        first, last = step.temperature
        rate = step.learning_rate * 0.5 * (1 + math.cos(math.pi * number / step.steps))
        return cls(first * (last / first) ** done, number >= step.straight_through * step.steps, rate)


class _Training:
    """Leaves, optimiser and penalty between steps."""

    def __init__(self, step: PruneOTP, context: TrainContext) -> None:
        self._step, self._context = step, context
        name = step.calibration if step.calibration in context.tokens else next(iter(context.tokens))
        self._run = context.tokens[name]
        self._rows = self._batches(len(self._run.tokens.ids), self._run.tokens.heldout)
        self.renormalise = {
            index: step.renormalises(found["routing"]["ranked"]) for index, found in sorted(context.statistics.items())
        }
        self.leaves: dict[tuple[int, str], Tensor] = {}
        for index in self.renormalise:
            site = site_of(context.model.facts, index)
            generator = context.generator(index)
            width, ranked = step.units(site.top_k), context.statistics[index]["routing"]["ranked"]
            if step.start == "weights":
                made = weighing_router(site.hidden, site.top_k, width, float(ranked.sum(-1).mean()), generator)
            else:
                made = mask_router(site.hidden, site.top_k, width, step.keep_all, generator)
            self.leaves |= {(index, f"{GATE}{name}"): value.requires_grad_(True) for name, value in made.items()}
        self._optimiser = torch.optim.AdamW(list(self.leaves.values()), lr=step.learning_rate, weight_decay=0.0)
        if step.start == "weights":
            self.shift()
        self.penalty, self._mean = 0.0, 1.0 if step.start == "keep_all" else step.target
        self.shares: dict[int, float] = {}
        self._weights = self._held() if context.resident else context.weights

    def _batches(self, count: int, heldout: tuple[int, ...]) -> Iterator[list[int]]:
        """Sequences of every step: all in a new random order, again and again."""
        rows = torch.tensor([row for row in range(count) if row not in heldout])
        generator, waiting = self._context.generator(), list[int]()
        while True:
            while len(waiting) < self._step.batch:
                waiting += rows[torch.randperm(len(rows), generator=generator)].tolist()
            yield waiting[: self._step.batch]
            waiting = waiting[self._step.batch :]

    def _held(self) -> Callable[[int], LayerWeights]:
        """All layers with their experts expanded once, for models that fit into memory."""
        kept = {index: _expanded(self._context.weights(index)) for index in range(len(self._context.model.layers))}
        return lambda index: kept[index]

    def step(self, number: int) -> tuple[float, float]:
        """One step: (loss with its penalty, share of experts kept)."""
        moment = _Moment.of(self._step, number)
        rows = next(self._rows)
        batch = TokenBatch(self._run.tokens.ids[rows], tuple(rows))
        wanted = self._teacher(rows)

        def loss(logits: Tensor, _batch: TokenBatch) -> Tensor:
            found = logits.log_softmax(-1)
            return (wanted.exp() * (wanted - found)).sum(-1).mean()

        value, gradients = forward_backward(
            self._context.model,
            lambda index: self._relaxed(index, number, moment),
            loss,
            self.leaves,
            batch,
            resident=self._context.resident,
            term=self._term,
        )
        for key, leaf in self.leaves.items():
            leaf.grad = gradients[key]
        nn.utils.clip_grad_norm_(list(self.leaves.values()), 1.0)
        for group in self._optimiser.param_groups:
            group["lr"] = moment.learning_rate
        self._optimiser.step()
        share = sum(self.shares.values()) / len(self.shares)
        self._mean = _MEMORY * self._mean + (1 - _MEMORY) * share
        self.penalty = max(0.0, self.penalty + self._step.penalty_rate * (self._mean - self._step.target))
        return value, share

    def shift(self) -> float:
        """Shift every layer's outputs so that the sampled tokens use the target; returns by how much per slot."""
        outputs, starts = [], []
        for index in self.renormalise:
            found = self._context.statistics[index]["routing"]
            tensors = {name: self.leaves[index, f"{GATE}{name}"].detach() for name in MASK_ROUTER}
            hidden = found["hidden"]
            outputs.append(mask_logits(hidden, found["ranked"][: len(hidden)], tensors))
            starts.append(tensors["start"])
        by = shift_to_share(outputs, self._step.target)
        for start in starts:
            start -= by * torch.arange(len(start))
        return by

    def _teacher(self, rows: list[int]) -> Tensor:
        found = final_logits(self._context.model, self._run, self._step.teacher, rows)
        return torch.cat([logits.log_softmax(-1) for _, logits in found])

    def _relaxed(self, index: int, number: int, moment: _Moment) -> LayerWeights:
        weights = self._weights(index)
        if index not in self.renormalise:
            return weights
        draw = torch.randint(_SEEDS, (), generator=self._context.generator(f"{index}/{number}"))
        relaxation = Relaxation(moment.temperature, moment.straight_through, int(draw))
        return replace(weights, gate=Gate("mask_router", self.renormalise[index], relaxation=relaxation))

    def _term(self, index: int, layer: nn.Module) -> Tensor:
        """This layer's part of the penalty; the share it keeps is noted."""
        kept: Any = experts_of(layer, site_of(self._context.model.facts, index).experts).kept
        share: Tensor = kept.mean()
        self.shares[index] = float(share.detach())
        return self.penalty * share / len(self.renormalise)


def _expanded(weights: LayerWeights) -> LayerWeights:
    def dense(expert: ExpertWeights) -> ExpertWeights:
        if is_absent(expert):
            return expert
        gate_up, down = (materialise(value, torch.float32) for value in (expert.gate_up, expert.down))
        return replace(expert, gate_up=gate_up, down=down)

    return weights.with_experts(tuple(dense(expert) for expert in weights.experts))
