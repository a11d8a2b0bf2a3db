"""prune.neurons: narrower experts: the neurons that add least to an expert's output go."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from moecompress.numerics.neurons import expert_of, neurons_of
from moecompress.passes.base import Decision, LayerContext, Pass
from moecompress.stats.base import Statistic
from moecompress.stats.moments import ExpertHessian
from moecompress.types import ExpertWeights, LayerFacts, LayerWeights, ModelFacts, MoESite, Stream

Keep = Annotated[int, Field(ge=1, strict=True)] | Annotated[float, Field(gt=0, le=1, strict=True)]


class PruneNeurons(Pass):
    """Every expert keeps the same number of neurons: those with the largest sum over its tokens of
    g^2 a_k^2 |w_k|^2, a_k being what column w_k of `down` receives and g the routing weight: the squared error of the
    block's output if neuron k alone went (HEAPr, 2509.22299, with the identity for the loss's curvature).

    compensate: `down` is fitted again to what the expert gave with all its neurons, by least squares on its tokens.
    The configuration has to say the width of routed experts alone: the plan refuses where shared experts follow it.
    """

    name: ClassVar[str] = "prune.neurons"
    paper: ClassVar[str] = "2509.22299"
    changes: ClassVar[frozenset[str]] = frozenset({"experts"})
    propagate: ClassVar[Stream] = "original"
    transforms_experts: ClassVar[bool] = True
    expensive: ClassVar[bool] = True

    keep: Keep = Field(0.75, description="neurons that stay in every expert: a fraction (0.75), or their number (96)")
    multiple: int = Field(8, ge=1, description="a fraction is rounded to a multiple of this")
    weighting: Literal["none", "affinity"] = Field("affinity", description="affinity: tokens count by g^2")
    compensate: bool = Field(True, description="fit `down` again to the outputs with all neurons")
    damp: float = Field(0.01, gt=0, description="added to the diagonal in that fit, as a share of its mean")
    calibration: str = Field("default", description="name of the calibration set that neurons are judged on")

    def needs(self) -> tuple[Statistic, ...]:
        return (ExpertHessian("down", self.weighting, 2 if self.weighting == "affinity" else 1, pooled=True),)

    def kept(self, site: MoESite) -> int:
        """How many neurons stay."""
        if isinstance(self.keep, int):
            return self.keep
        return min(site.width, max(1, round(self.keep * site.width / self.multiple)) * self.multiple)

    def check(self, facts: ModelFacts) -> list[str]:
        sites = [layer.site for layer in facts.moe_layers if layer.site is not None]
        if len({site.width for site in sites}) > 1:
            return ["layers have experts of different widths"]
        if self.kept(sites[0]) > sites[0].width:
            return [f"keep: {self.keep}, the experts have {sites[0].width} neurons"]
        return []

    def reshape(self, facts: ModelFacts) -> ModelFacts:
        layers = (
            replace(layer, site=replace(layer.site, width=self.kept(layer.site))) if layer.site else layer
            for layer in facts.layers
        )
        return replace(facts, layers=tuple(layers))

    def decide(self, context: Any) -> Decision:
        """neurons: int64 [E, I'], ascending; layer: share of the scores that goes."""
        site = context.layer.site
        if site is None or self.kept(site) == site.width:
            return Decision({})
        scores = torch.stack([self._scores(context, number) for number in range(site.num_experts)])
        index = scores.argsort(dim=1, descending=True, stable=True)[:, : self.kept(site)].sort(dim=1).values
        lost = 1 - scores.gather(1, index).sum() / scores.sum().clamp_min(torch.finfo(torch.float64).tiny)
        return Decision({"layer": {"neurons_lost": float(lost)}}, {"neurons": index})

    def _scores(self, context: LayerContext, number: int) -> Tensor:
        """float64 [I]. An expert without tokens is judged by what all experts of the layer receive."""
        site = context.layer.site
        assert site is not None
        neurons = neurons_of(context.weights.experts[number], site.gated, site.concatenated)
        return self._hessian(context, number).diagonal().double() * neurons.outputs.double().square().sum(1)

    def _hessian(self, context: LayerContext, number: int) -> Tensor:
        found = context.statistics[self.needs()[0].name]
        return found["hessian"][number] if int(found["tokens"][number]) else found["pooled"]

    def process(self, context: LayerContext) -> tuple[Decision, LayerWeights]:
        decision = self.decide(context)
        if self.compensate and decision.tensors:
            decision = Decision(decision.data, {**decision.tensors, "down": self._fitted(context, decision)})
        return decision, self.apply(context, decision)

    def _fitted(self, context: LayerContext, decision: Decision) -> Tensor:
        """float32 [E, H, I']: `down` over the remaining neurons with the least squared error of the output."""
        site = context.layer.site
        assert site is not None
        made = []
        for number, index in enumerate(decision.tensors["neurons"]):
            hessian = self._hessian(context, number).double()
            neurons = neurons_of(context.weights.experts[number], site.gated, site.concatenated)
            inner = hessian[index][:, index]
            inner = inner + self.damp * inner.diagonal().mean().clamp_min(1e-12) * torch.eye(len(index))
            gone = torch.ones(site.width, dtype=torch.bool)
            gone[index] = False
            cross = hessian[index][:, gone] @ neurons.outputs.double()[gone]
            made.append((neurons.outputs.double()[index] + torch.linalg.solve(inner, cross)).T.float())
        return torch.stack(made)

    def apply(self, context: LayerContext, decision: Decision) -> LayerWeights:
        site, weights = context.layer.site, context.weights
        if site is None or not decision.tensors:
            return weights
        experts = []
        for number, expert in enumerate(weights.experts):
            neurons = neurons_of(expert, site.gated, site.concatenated).take(decision.tensors["neurons"][number])
            made = expert_of(neurons, expert, site.gated, site.concatenated)
            experts.append(replace(made, down=decision.tensors["down"][number]) if self.compensate else made)
        return weights.with_experts(tuple(experts))

    def restored(self, layer: LayerFacts, decision: Decision, number: int, expert: ExpertWeights) -> ExpertWeights:
        """The expert with neurons of zeros in the places of those that went."""
        site = layer.site
        if site is None or not decision.tensors:
            return expert
        made = neurons_of(expert, site.gated, site.concatenated)
        index = decision.tensors["neurons"][number]
        full = (None if part is None else part.new_zeros(site.width, *part.shape[1:]) for part in made)
        inputs, bias, outputs = (
            None if whole is None or part is None else whole.index_copy(0, index, part)
            for whole, part in zip(full, made, strict=True)
        )
        assert inputs is not None and outputs is not None
        return expert_of(type(made)(inputs, bias, outputs), expert, site.gated, site.concatenated)
