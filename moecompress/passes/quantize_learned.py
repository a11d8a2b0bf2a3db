"""quantize.learned: rounding and scales learned by reconstructing the output of the whole expert block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from moecompress.dispatch import received
from moecompress.errors import CalibrationError, CoverageError, RecipeError, message
from moecompress.numerics.block import BlockSample, Moments, gptq_expert, own_outputs, pooled_moments, routed
from moecompress.numerics.grids import round_to_nearest
from moecompress.numerics.learned import Decay, Learned, Optimizer, Rounding, Schedule, learn_block
from moecompress.numerics.packing import pack_codes, unpack_codes
from moecompress.numerics.rounding import LearnedMatrix
from moecompress.passes.base import Decision, LayerContext
from moecompress.passes.quantizer import Quantizer
from moecompress.passes.smoothing import dense
from moecompress.stats.base import Statistic
from moecompress.stats.routing import TokenSample
from moecompress.types import (
    PROJECTIONS,
    ExpertWeights,
    LayerFacts,
    LayerWeights,
    ModelFacts,
    QuantizedTensor,
    Scheme,
)

JUDGES = 16  # one token in so many chooses among the checks and is not learned from


class QuantizeLearned(Quantizer):
    """Learned rounding of routed experts (SignRound, 2309.05516), reconstructing the block's output.

    Inputs are those of the compressed model, the target is the original experts' output on them plus what the layers
    before have lost already (`repair`), so that the layer's output comes back to the original model's.
    """

    name: ClassVar[str] = "quantize.learned"
    paper: ClassVar[str] = "2309.05516"
    changes: ClassVar[frozenset[str]] = frozenset({"experts"})
    expensive: ClassVar[bool] = True
    needs_block_error: ClassVar[bool] = True

    start: Literal["gptq", "mse"] = Field(
        "gptq", description="codes to start from: GPTQ, or nearest on searched scales"
    )
    steps: int = Field(200, ge=0, description="updates per layer; 0 = the start itself")
    batch: int = Field(4096, ge=1, description="tokens per update")
    optimizer: Optimizer = Field("adam", description="adam, or the sign of the gradient as in the paper")
    rounding: Rounding = Field(
        "soft", description="soft: weights settle on codes one after the other; straight: rounded in every step (paper)"
    )
    rate: float = Field(5e-3, gt=0, description="first step of the rounding offsets, in codes; falls to 0")
    scale_rate: float = Field(3e-4, ge=0, description="first step of the scale factors; falls to 0; 0 = scales stay")
    decay: Decay = Field("cosine", description="how the steps fall to 0")
    reach: float = Field(1.5, gt=0, description="largest rounding offset in codes; the paper's is 0.5")
    weighting: Literal["affinity", "none"] = Field(
        "affinity", description="affinity: the block's output as routed; none: every expert's own output, gates aside"
    )
    repair: bool | None = Field(
        None,
        description="also make up for what earlier layers have lost (affinity weighting only); left out: where the "
        "experts' output is added to the layer's as it is, or scaled",
    )
    keep_best: bool = Field(True, description="keep the best of ten checks on tokens that are not learned from")
    samples: int = Field(65536, ge=2, description="calibration tokens kept per layer, float32 inputs in memory")
    min_tokens: int = Field(256, ge=0, description="an expert with fewer tokens in the sample falls back")
    fallback: Literal["shrink", "rtn", "error"] = Field(
        "shrink", description="shrink: smaller steps and a start pulled to the layer's mean; rtn: nearest, not learned"
    )
    calibration: str = Field("default", description="name of the token set")
    seed: int = Field(0, ge=0, description="of the token sample, the split and the batches")

    @model_validator(mode="after")
    def _experts_alone(self) -> QuantizeLearned:
        if self.targets != ("routed_experts",):
            raise ValueError("targets: only routed_experts have a block to learn from; quantize.gptq takes the others")
        return self

    def check(self, facts: ModelFacts) -> list[str]:
        problems = super().check(facts)
        apart = [layer.index for layer in facts.moe_layers if not facts.expert_gain(layer.index)]
        if self.repair and apart:
            problems.append(
                f"repair: layer {apart[0]} does not add its experts' output to its own as it is (a norm, or several "
                "residual streams, are between), so what it lacks cannot be told (works: repair: false)"
            )
        return problems

    def gain(self, context: LayerContext) -> float | None:
        """What the experts' output counts in the layer's output; None where nothing is repaired."""
        if self.repair is False or self.weighting == "none":
            return None
        return context.facts.expert_gain(context.layer.index) or None

    def needs(self) -> tuple[Statistic, ...]:
        return (TokenSample(self.samples, self.seed),)

    def statistics_bytes(self, layer: LayerFacts) -> int:
        """The sample, its copy with targets, and per expert weight: float32 value, offset, moments, codes."""
        site = layer.site
        if site is None:
            return 0
        weights = site.num_experts * (site.gate_up_rows * site.hidden + site.hidden * site.width)
        each = 12 + (8 if self.optimizer == "adam" else 0)
        slots = site.top_k if self.weighting == "none" else 1
        return super().statistics_bytes(layer) + self.samples * site.hidden * 4 * (1 + 2 * slots) + each * weights

    def decide(self, context: LayerContext) -> Decision:
        """Learn the layer's codes and scales. Tensors: `<expert>.<projection>.codes|scales|zeros`, codes packed."""
        if not context.weights.experts:
            return Decision({"experts": {}})
        block = _Block(self, context)
        learned = block.learn()
        tensors: dict[str, Tensor] = {}
        for projection, matrices in zip(PROJECTIONS, learned.codes, strict=True):
            for expert, matrix in enumerate(matrices):
                tensors.update(_pack(f"{expert}.{projection}", matrix))
        data = {
            "kept_step": learned.best,
            "repaired": self.gain(context) is not None,
            "output_errors": [list(error) for error in learned.errors],
            "experts": block.notes(),
        }
        return Decision(data, tensors)

    def apply(self, context: LayerContext, decision: Decision) -> LayerWeights:
        """Put the decision's codes in place."""
        experts = list(context.weights.experts)
        for index, expert in enumerate(experts):
            for projection in PROJECTIONS:
                columns = expert.projection(projection).shape[1]
                scheme = self.scheme_for(context, index, projection)
                matrix = _unpack(decision.tensors, f"{index}.{projection}", scheme, columns)
                expert = expert.with_projection(projection, matrix)
            experts[index] = expert
        return context.weights.with_experts(tuple(experts))


class _Block:
    """One layer's experts and token sample while the pass decides."""

    def __init__(self, step: QuantizeLearned, context: LayerContext) -> None:
        self.step, self.context = step, context
        self.experts = tuple(_float(expert, context.layer.index) for expert in context.weights.experts)
        self.gate_up = [dense(expert.gate_up) for expert in self.experts]
        self.down = [dense(expert.down) for expert in self.experts]
        found = context.statistics["token_sample"]
        hidden = found["hidden"].float()
        self.rows = found["rows"]
        self.sample = BlockSample(hidden, found["ids"], found["weights"].float(), torch.zeros_like(hidden))
        count = len(self.experts)
        self.tokens: list[int] = torch.bincount(found["ids"].flatten(), minlength=count + 1)[:count].tolist()
        self.few = [tokens < step.min_tokens for tokens in self.tokens]
        if step.fallback == "error" and any(self.few):
            self._refuse()

    def notes(self) -> dict[str, dict[str, Any]]:
        """Per expert: tokens in the sample, and the fallback where it applies."""
        return {
            str(expert): {"sampled_tokens": tokens, **({"fallback": self.step.fallback} if few else {})}
            for expert, (tokens, few) in enumerate(zip(self.tokens, self.few, strict=True))
        }

    def learn(self) -> Learned:
        step = self.step
        if self.rows.numel() < 2:
            raise CalibrationError(
                message(self._where(), "no calibration token reached the layer", "at least 2 tokens")
            )
        starts = self._starts()
        gate_up, down = (
            [
                LearnedMatrix(weight, start[side], reach=step.reach, rate=self._rate(expert))
                for expert, (weight, start) in enumerate(zip(weights, starts, strict=True))
            ]
            for side, weights in enumerate((self.gate_up, self.down))
        )
        generator = self.context.generator()
        order = torch.randperm(self.rows.numel(), generator=generator)
        judges = max(1, len(order) // JUDGES) if step.keep_best else 0
        train = self._with_target(order[judges:])
        judge = self._with_target(order[:judges]) if judges else None
        schedule = Schedule(
            step.steps, step.batch, step.optimizer, step.rate, step.scale_rate, step.decay, step.rounding
        )
        return learn_block(self._forward, gate_up, down, train, judge, schedule, generator)

    def _starts(self) -> list[tuple[QuantizedTensor, QuantizedTensor]]:
        """Codes of every expert before learning."""
        step, sample = self.step, self.sample
        if step.weighting == "none":
            sample = replace(sample, weights=torch.ones_like(sample.weights))
        columns = (self.gate_up[0].shape[1], self.down[0].shape[1])
        prior = None
        if step.start == "gptq" and step.fallback == "shrink" and any(self.few):
            prior = self._pooled(sample, columns)
        slots = {expert: (rows, at) for expert, rows, at in routed(sample.ids, len(self.experts))}
        none = torch.zeros(0, dtype=torch.int64)
        made = []
        for expert, (gate_up, down) in enumerate(zip(self.gate_up, self.down, strict=True)):
            schemes = self._scheme(expert, 0), self._scheme(expert, 1)
            if step.start == "mse" or (self.few[expert] and step.fallback == "rtn"):
                made.append((self._nearest(gate_up, schemes[0]), self._nearest(down, schemes[1])))
                continue
            rows, at = slots.get(expert, (none, none))
            inputs = received(self.experts[expert], "gate_up", sample.hidden[rows], schemes[0])
            gates = sample.weights[rows, at][:, None]
            lacking = max(0, step.min_tokens - self.tokens[expert])
            run, dtype = self._intermediate(expert), self.context.scale_dtype
            made.append(gptq_expert(gate_up, down, inputs, gates, run, schemes, dtype, prior, lacking))
        return made

    def _pooled(self, sample: BlockSample, columns: tuple[int, int]) -> Moments | None:
        """What stands for the tokens that an expert lacks; None where experts receive inputs in bases of their own."""
        first = self.experts[0]
        if any(e.turn(p) is not first.turn(p) for e in self.experts for p in PROJECTIONS):
            return None
        entered = replace(sample, hidden=received(first, "gate_up", sample.hidden, self._scheme(0, 0)))
        return pooled_moments(entered, self.gate_up, self._intermediate, columns)

    def _with_target(self, rows: Tensor) -> BlockSample:
        sample, count = self.sample.rows(rows), len(self.experts)
        if self.step.weighting == "none":
            return own_outputs(sample, lambda e, x: self.context.forward(self.experts[e], x), count)
        target, gain = sample.target, self.step.gain(self.context)
        if gain is not None:
            target = self.context.block_error(self.rows[rows]).reshape(target.shape).div_(gain)
        for expert, at, slots in routed(sample.ids, count):
            output = self.context.forward(self.experts[expert], sample.hidden[at]) * sample.weights[at, slots][:, None]
            target.scatter_add_(0, at[:, None].expand(-1, target.shape[1]), output)
        return replace(sample, target=target)

    def _forward(self, expert: int, gate_up: Tensor, down: Tensor, inputs: Tensor) -> Tensor:
        candidate = replace(self.experts[expert], gate_up=gate_up, down=down)
        return self.context.forward_rounded(candidate, inputs, self._scheme(expert, 0))

    def _intermediate(self, expert: int) -> Callable[[Tensor, Tensor], Tensor]:
        """(gate_up, what it receives) -> what down receives."""
        weights, scheme = self.experts[expert], self._scheme(expert, 1)
        bias = weights.gate_up_bias

        def run(gate_up: Tensor, inputs: Tensor) -> Tensor:
            projected = inputs @ gate_up.t()
            made = self.context.activate(projected if bias is None else projected + bias.float())
            return received(weights, "down", made, scheme)

        return run

    def _scheme(self, expert: int, side: int) -> Scheme:
        return self.step.scheme_for(self.context, expert, PROJECTIONS[side])

    def _nearest(self, weight: Tensor, scheme: Scheme) -> QuantizedTensor:
        return round_to_nearest(weight, scheme, grid="mse", scale_dtype=self.context.scale_dtype)

    def _rate(self, expert: int) -> float:
        """Few tokens make small steps: none at all for an expert that nobody visits."""
        if not self.few[expert]:
            return 1.0
        return 0.0 if self.step.fallback == "rtn" else self.tokens[expert] / self.step.min_tokens

    def _where(self) -> str:
        return f"quantize.learned, layer {self.context.layer.index}"

    def _refuse(self) -> None:
        few = [expert for expert, is_few in enumerate(self.few) if is_few]
        listed = ", ".join(f"expert {expert} has {self.tokens[expert]}" for expert in few[:5])
        then = "more calibration tokens or samples, a smaller min_tokens, or fallback: shrink"
        found = f"{len(few)} experts have few sampled tokens: {listed}"
        raise CoverageError(message(self._where(), found, f"at least min_tokens = {self.step.min_tokens}", then))


def _float(expert: ExpertWeights, layer: int) -> ExpertWeights:
    """The expert with float32 matrices. Raises RecipeError when an earlier pass has quantized it."""
    for projection in PROJECTIONS:
        weight = expert.projection(projection)
        if not isinstance(weight, Tensor):
            found, allowed = "the routed experts are already quantized", "one quantize pass for them"
            raise RecipeError(message(f"quantize.learned, layer {layer}", found, allowed, "remove one of the two"))
        expert = expert.with_projection(projection, weight.float())
    return expert


def _pack(name: str, matrix: QuantizedTensor) -> dict[str, Tensor]:
    packed = {f"{name}.codes": pack_codes(matrix.codes, matrix.scheme.bits), f"{name}.scales": matrix.scales}
    return packed if matrix.zeros is None else {**packed, f"{name}.zeros": matrix.zeros}


def _unpack(tensors: Mapping[str, Tensor], name: str, scheme: Scheme, columns: int) -> QuantizedTensor:
    codes = unpack_codes(tensors[f"{name}.codes"], scheme.bits, columns)
    return QuantizedTensor(codes, tensors[f"{name}.scales"], tensors.get(f"{name}.zeros"), scheme)
