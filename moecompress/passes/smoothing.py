"""What passes share that move scales in and out of experts: where that is possible, how it is done and taken back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moecompress.arch.sites import NormFold
from moecompress.errors import message
from moecompress.numerics.grids import dequantize
from moecompress.passes.base import Decision
from moecompress.stream.fold import scaled_inputs, up_rows
from moecompress.types import ExpertWeights, LayerFacts, LayerWeights, ModelFacts, MoESite, QuantizedTensor


def smoothing_problems(facts: ModelFacts, *, shared: bool, experts: bool) -> list[str]:
    """Why scales cannot be moved as asked: the reasons of the first layer that has some."""
    for layer in facts.moe_layers:
        reasons = []
        if shared and (reason := facts.fold_problem(layer.index)) is not None:
            reasons.append(reason)
        if experts and not facts.linear_up(layer.index):
            found = "this family's activation is not linear in the up projection"
            where = f"layer {layer.index}: smoothing between up and down"
            reasons.append(message(where, found, then="set experts: false"))
        if reasons:
            return reasons
    return []


def fold_data(fold: NormFold) -> dict[str, Any]:
    """A fold as a decision keeps it."""
    return {"norm": fold.norm, "offset": fold.offset, "readers": list(fold.readers)}


def smoothed(
    weights: LayerWeights, site: MoESite, data: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> LayerWeights:
    """The layer with a decision's scales: `shared` [H] out of the norm of `data`, `experts` [E, I] out of up."""
    if "shared" in tensors:
        fold = NormFold(data["norm"], data["offset"], tuple(data["readers"]))
        weights = scaled_inputs(weights, fold, tensors["shared"])
    return scaled_between(weights, site, tensors["experts"]) if "experts" in tensors else weights


def unsmoothed(layer: LayerFacts, decision: Decision, number: int, expert: ExpertWeights) -> ExpertWeights:
    """Expert `number` as it would be without a decision's scales, matrices dense."""
    assert layer.site is not None
    one = LayerWeights(layer.index, {}, (replace(expert, gate_up=dense(expert.gate_up), down=dense(expert.down)),))
    if "experts" in decision.tensors:
        one = scaled_between(one, layer.site, 1 / decision.tensors["experts"][number][None])
    expert = one.experts[0]
    if "shared" in decision.tensors:
        assert isinstance(expert.gate_up, Tensor)
        expert = replace(expert, gate_up=expert.gate_up / decision.tensors["shared"])
    return expert


def scaled_between(weights: LayerWeights, site: MoESite, scales: Tensor) -> LayerWeights:
    """Up rows and their biases divided by scales [E, I], down columns multiplied: the same experts."""
    rows, experts = up_rows(site), []
    for expert, scale in zip(weights.experts, scales, strict=True):
        gate_up, down = dense(expert.gate_up).clone(), dense(expert.down)
        gate_up[rows] /= scale.to(gate_up)[:, None]
        bias = expert.gate_up_bias
        if bias is not None:
            bias = dense(bias).clone()
            bias[rows] /= scale.to(bias)
        experts.append(replace(expert, gate_up=gate_up, down=down * scale.to(down), gate_up_bias=bias))
    return weights.with_experts(tuple(experts))


def dense(weight: Tensor | QuantizedTensor) -> Tensor:
    """The matrix in float32 at least."""
    if isinstance(weight, Tensor):
        return weight if weight.dtype == torch.float64 else weight.float()
    return dequantize(weight)
