"""prune.top_k: every token uses a smaller, fixed number of its experts."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from moecompress.gate import Gate
from moecompress.passes.base import Decision, LayerContext
from moecompress.passes.gating import Gating, with_gate
from moecompress.stats.routing import TokenSample
from moecompress.types import LayerWeights, ModelFacts, MoESite

Keep = Annotated[int, Field(ge=1, strict=True)] | Annotated[float, Field(gt=0, le=1, strict=True)]


class PruneTopK(Gating):
    """The plain baseline of dynamic pruning: the weakest expert (or more) of every token is left out."""

    name: ClassVar[str] = "prune.top_k"
    paper: ClassVar[str] = "baseline (top k - 1)"

    keep: Keep | None = Field(
        None, description="experts per token that stay, a fraction or their number; left out: all but one"
    )

    @property
    def needs_data(self) -> bool:
        return False  # random tokens show as well whether weights are normalised

    def count(self, site: MoESite) -> int:
        """Experts per token."""
        if isinstance(self.keep, int):
            return self.keep
        return site.top_k - 1 if self.keep is None else max(1, round(self.keep * site.top_k))

    def check(self, facts: ModelFacts) -> list[str]:
        problems = super().check(facts)
        sites = [layer.site for layer in facts.moe_layers if layer.site is not None]
        if not problems and any(self.count(site) > site.top_k for site in sites):
            problems.append(f"keep: {self.keep}, a token has {min(site.top_k for site in sites)} experts")
        return problems

    def decide(self, context: LayerContext) -> Decision:
        site = context.layer.site
        if site is None:
            return Decision({})
        weights = context.statistics[TokenSample.name]["weights"]
        return Decision({"count": self.count(site), "renormalise": self.renormalises(weights)})

    def apply(self, context: LayerContext, decision: Decision) -> LayerWeights:
        if context.layer.site is None:
            return context.weights
        return with_gate(context, Gate("count", decision.data["renormalise"], count=decision.data["count"]))
