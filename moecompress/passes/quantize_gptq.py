"""quantize.gptq: round column by column against the second moments of each matrix's real inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from moecompress.arch.sites import shared_gates
from moecompress.errors import CalibrationError, CoverageError, message
from moecompress.numerics.gptq import GPTQResult, gptq
from moecompress.numerics.grids import round_to_nearest
from moecompress.numerics.hqq import hqq
from moecompress.passes.base import Decision, LayerContext, input_columns, selected_linears
from moecompress.passes.quantizer import Quantizer
from moecompress.stats.linears import LinearHessian
from moecompress.stats.moments import ExpertHessian, Weighting
from moecompress.types import LayerFacts, LayerWeights, ModelFacts, Projection, QuantizedTensor, Scheme

Fallback = Literal["shrink", "rtn", "hqq", "error"]
Pool = Mapping[str, Tensor | None]  # "": sum of x x^T over all experts, "_delta": the paired sum
_STAGES = (("attention",), ("shared_experts", "dense_mlp"))  # Linears before the experts, in the order of the data


class QuantizeGPTQ(Quantizer):
    """GPTQ (2210.17323) on routed experts: each expert against the tokens it really receives.

    gate and up share one Hessian. Every step of a layer sees what the steps before it left behind: the layers before,
    then attention, then gate and up, then down; with `activation_bits` it sees its inputs rounded. An expert with fewer
    than `min_tokens` tokens gets the fallback and is listed in the report; `shrink` tops its Hessian up with the pooled
    mean over all experts' tokens, so that no tokens at all means the pooled Hessian.
    """

    name: ClassVar[str] = "quantize.gptq"
    paper: ClassVar[str] = "2210.17323"
    expensive: ClassVar[bool] = True
    trial_hessian: ClassVar[bool] = True

    grid: Literal["minmax", "mse"] = Field("mse", description="min-max range, or the range with the least error")
    order: Literal["none", "act", "gar"] = Field(
        "gar", description="column order: as stored; by size of the inputs; by size inside groups, then of groups"
    )
    static_groups: bool = Field(False, description="find all scales before rounding (needed by `act` with groups)")
    damping: float = Field(0.01, ge=0, le=1, description="share of the mean diagonal added to the Hessian's diagonal")
    weighting: Weighting = Field(
        "none", description="affinity: weigh tokens by their routing weight, a shared expert's by its own gate (AGQ)"
    )
    power: Literal[1, 2] = Field(1, description="exponent of the routing weight: 1 as published, 2 the output error")
    target_inputs: Literal["compressed", "original"] = Field(
        "compressed", description="original: aim at the outputs on the uncompressed model's inputs (GPTAQ)"
    )
    sequential: bool = Field(True, description="round gate and up first and let down see what they became")
    all_experts: bool = Field(False, description="statistics of every token at every expert; routing itself is kept")
    min_tokens: int | None = Field(
        None, ge=0, description="tokens below which an expert falls back; default: the matrix's input columns"
    )
    fallback: Fallback = Field("shrink", description="what happens to an expert with fewer tokens")
    expert_group: int | None = Field(
        None, ge=1, description="experts whose Hessians are in memory at once; default: all of a layer"
    )
    calibration: str = Field("default", description="the calibration set to use")

    @model_validator(mode="after")
    def _consistent(self) -> QuantizeGPTQ:
        if self.all_experts and self.weighting != "none":
            raise ValueError("all_experts has tokens without a routing weight; allowed: weighting: none with it")
        return self

    @property
    def needs_data(self) -> bool:
        return True

    @property
    def pairs_streams(self) -> bool:
        return self.target_inputs == "original"

    def check(self, facts: ModelFacts) -> list[str]:
        problems = super().check(facts)
        grouped = {n for n in input_columns(facts, self.targets).values() if self.group_size not in (-1, n)}
        if self.order == "act" and grouped and not self.static_groups:
            problems.append(
                f"order: act mixes columns of different groups of {self.group_size} "
                "(works: order: gar, static_groups: true, or group_size: -1)"
            )
        return problems

    def statistics_bytes(self, layer: LayerFacts) -> int:
        site, linears = layer.site, 0
        for roles in _STAGES:
            chosen = [n for n in selected_linears(layer, self.targets) if layer.roles[n] in roles]
            linears = max(linears, sum(4 * layer.shapes[name][1] ** 2 for name in chosen))
        if site is None or "routed_experts" not in self.targets:
            return linears
        end = min(self.expert_group or site.num_experts, site.num_experts)
        factors = 5 * 8 * max(site.hidden, site.width) ** 2  # one expert's factorisation in float64
        stages = [
            [self._statistic(p, (0, end), pooled=True).state_bytes(site) for p in stage]
            for stage in self._projections()
        ]
        return max(linears, *(sum(stage) for stage in stages)) + factors

    def lighter(self, facts: ModelFacts, excess: int) -> QuantizeGPTQ:
        if self.expert_group is not None or not facts.moe_layers or "routed_experts" not in self.targets:
            return self
        experts = max(layer.site.num_experts for layer in facts.moe_layers if layer.site is not None)
        smallest, two, whole = (
            max(step.statistics_bytes(layer) for layer in facts.moe_layers)
            for step in (self.model_copy(update={"expert_group": n}) for n in (1, 2, experts))
        )
        fitting = 1 + (whole - excess - smallest) // max(1, two - smallest)
        return self.model_copy(update={"expert_group": min(experts, max(1, fitting))})

    def process(self, context: LayerContext) -> tuple[Decision, LayerWeights]:
        """Statistics, rounding and the record of how it went, one step of the layer after the other."""
        said: dict[str, Any] = {"bits": self.bits, "experts": {}, "linears": {}, "losses": {}}
        return Decision(said), self._work(context, said, replay=False)

    def apply(self, context: LayerContext, decision: Decision) -> LayerWeights:
        """The same work again, with the decision's fallbacks."""
        return self._work(context, {**decision.data, "losses": {}, "linears": {}}, replay=True)

    def _work(self, context: LayerContext, said: dict[str, Any], *, replay: bool) -> LayerWeights:
        weights = context.weights
        for roles in _STAGES:
            names = [
                name for name in selected_linears(context.layer, self.targets) if context.layer.roles[name] in roles
            ]
            weights = self._linears(context, weights, names, said["linears"])
        if context.layer.site is None or "routed_experts" not in self.targets:
            return weights
        for stage in self._projections():
            weights = self._experts(context, weights, stage, said, replay)
        return weights

    def _projections(self) -> tuple[tuple[Projection, ...], ...]:
        return (("gate_up",), ("down",)) if self.sequential else (("gate_up", "down"),)

    def _linears(
        self, context: LayerContext, weights: LayerWeights, names: list[str], said: dict[str, Any]
    ) -> LayerWeights:
        dense = {name: value for name in names if isinstance(value := weights.tensors[name], Tensor)}
        if not dense:
            return weights
        columns = tuple((name, int(value.shape[1])) for name, value in dense.items())
        known = shared_gates(context.layer) if self.weighting == "affinity" else {}
        gates = tuple((name, known[name]) for name in dense if name in known)
        wanted = LinearHessian(columns, self.input_rounding, gates, self.power)
        hessians = context.collect((wanted,), weights)[wanted.name]
        made = {}
        for name, value in dense.items():
            where = f"layer {weights.index} {name}"
            result = self._gptq(where, value, self.scheme, hessians[name], None, context.scale_dtype)
            made[name] = result.q
            said[name] = {"damping": result.damping, "loss": result.loss}
        return weights.with_tensors(made)

    def _experts(
        self,
        context: LayerContext,
        weights: LayerWeights,
        stage: tuple[Projection, ...],
        said: dict[str, Any],
        replay: bool,
    ) -> LayerWeights:
        """Round these projections of all experts, one group of experts in memory at a time."""
        before, experts = weights, list(weights.experts)
        pooled: dict[str, Tensor] = {}
        size = self.expert_group or len(experts)
        for first in range(0, len(experts), size):
            span = (first, min(first + size, len(experts)))
            wanted = [self._statistic(projection, span, pooled=first == 0) for projection in stage]
            found = context.collect(wanted, before)
            for statistic in wanted:
                sums = found[statistic.name]
                pooled |= {f"{statistic.which}.{key}": sums[key] for key in ("pooled", "pooled_delta") if key in sums}
                pool = {key: pooled.get(f"{statistic.which}.pooled{key}") for key in ("", "_delta")}
                if any(e.turn(statistic.which) is not experts[0].turn(statistic.which) for e in experts):
                    pool = {}  # experts receive inputs in bases of their own
                for index, inputs in self._inputs(sums, pool, span):
                    value = experts[index].projection(statistic.which)
                    if isinstance(value, Tensor):
                        where = f"layer {weights.index} expert {index} {statistic.which}"
                        q = self._expert(context, where, value, inputs, said, (index, statistic.which), replay)
                        experts[index] = experts[index].with_projection(statistic.which, q)
        return weights.with_experts(tuple(experts))

    def _statistic(self, which: Projection, span: tuple[int, int], *, pooled: bool) -> ExpertHessian:
        return ExpertHessian(
            which, self.weighting, self.power, span, self.all_experts, self.pairs_streams, pooled, self.input_rounding
        )

    def _inputs(self, found: Mapping[str, Tensor], pool: Pool, span: tuple[int, int]) -> Iterator[tuple[int, Inputs]]:
        """(expert, what it received) for the experts of a group; a thin expert's sums topped up for `shrink`."""
        total = int(found["tokens"].sum())
        for index in range(*span):
            hessian = found["hessian"][index - span[0]]
            delta = found["delta"][index - span[0]] if "delta" in found else None
            tokens = int(found["tokens"][index])
            needed = hessian.shape[0] if self.min_tokens is None else self.min_tokens
            share = max(0, needed - tokens) / max(1, total)
            yield index, Inputs(tokens, needed, total, hessian, delta, share, pool)

    def _expert(
        self,
        context: LayerContext,
        where: str,
        weight: Tensor,
        inputs: Inputs,
        said: dict[str, Any],
        key: tuple[int, Projection],
        replay: bool,
    ) -> QuantizedTensor:
        index, projection = str(key[0]), key[1]
        scheme = self.scheme_for(context, *key)
        note = said["experts"].get(index, {})
        fallback = note.get("fallback") if replay else (self.fallback if inputs.tokens < inputs.needed else None)
        if fallback == "error":
            raise CoverageError(
                message(
                    where,
                    f"{inputs.tokens} calibration tokens",
                    f"at least {inputs.needed} (min_tokens)",
                    "add calibration samples, set all_experts: true, or another fallback (shrink, rtn, hqq)",
                )
            )
        if fallback == "shrink" and (inputs.pool.get("") is None or not inputs.pooled_tokens):
            fallback = "rtn"  # no token reached any expert, or the pool mixes bases
        if fallback is not None and not replay:
            said["experts"][index] = {"fallback": fallback}
        if fallback == "rtn":
            return round_to_nearest(weight.float(), scheme, grid=self.grid, scale_dtype=context.scale_dtype)
        if fallback == "hqq":
            return hqq(weight.float(), scheme, grid=self.grid, scale_dtype=context.scale_dtype)
        hessian, delta = (inputs.hessian, inputs.delta) if fallback is None else inputs.shrunk()
        result = self._gptq(where, weight, scheme, hessian, delta, context.scale_dtype)
        said["losses"].setdefault(index, {})[projection] = {"damping": result.damping, "loss": result.loss}
        return result.q

    def trial(self, weight: Tensor, bits: int, hessian: Tensor | None, scale_dtype: torch.dtype) -> QuantizedTensor:
        assert hessian is not None
        return self._gptq("trial", weight, self.scheme_at(bits), hessian, None, scale_dtype).q

    def _gptq(
        self,
        where: str,
        weight: Tensor,
        scheme: Scheme,
        hessian: Tensor,
        delta: Tensor | None,
        scale_dtype: torch.dtype,
    ) -> GPTQResult:
        try:
            return gptq(
                weight.float(),
                hessian,
                scheme,
                grid=self.grid,
                order=self.order,
                static_groups=self.static_groups,
                damping=self.damping,
                scale_dtype=scale_dtype,
                delta=delta,
            )
        except ValueError as error:  # the shapes and options were checked: only the inputs' sums can be at fault
            raise CalibrationError(message(where, str(error), then="look for overflowing activations")) from error


@dataclass(frozen=True)
class Inputs:
    """What one expert's matrix received: its tokens, how many it needs, the sums over them, and the layer's pool.

    share: how much of the pool's sums (over `pooled_tokens` tokens) stands for the missing tokens.
    """

    tokens: int
    needed: int
    pooled_tokens: int
    hessian: Tensor
    delta: Tensor | None
    share: float
    pool: Pool

    def shrunk(self) -> tuple[Tensor, Tensor | None]:
        """Hessian and delta as if the missing tokens had been average tokens of the layer's experts."""
        pooled, pooled_delta = self.pool[""], self.pool["_delta"]
        assert pooled is not None
        delta = None if self.delta is None or pooled_delta is None else self.delta + self.share * pooled_delta
        return self.hessian + self.share * pooled, delta
