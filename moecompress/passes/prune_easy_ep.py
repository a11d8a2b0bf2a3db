"""prune.easy_ep: keep the experts that matter for one domain, judged on a few demonstrations (EASY-EP)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from moecompress.arch.quirks import NO_RESIDUAL
from moecompress.passes.base import LayerContext
from moecompress.passes.pruning import Pruning
from moecompress.stats.base import Statistic
from moecompress.stats.experts import TokenContributions
from moecompress.types import ModelFacts

Evidence = Mapping[str, Mapping[str, Tensor]]


class PruneEasyEP(Pruning):
    """Sum over tokens of routing weight x output norm x s_t (2504.06792), s_t = 1 - cos(x_t, x_t + routed output).

    s_t says how much the routed experts turn the residual stream of token t; shared experts play no part. The paper's
    tokens are prompts of the domain with the model's own answers; on such a domain it keeps 50 % of the experts with
    little loss, and other domains are lost.

    calibration: the names of several sets, one per domain, mix them: each domain's scores are divided by their sum in
    the layer and averaged, so that every domain counts alike, however long its demonstrations are. A super expert of
    any of them stays.
    """

    name: ClassVar[str] = "prune.easy_ep"
    paper: ClassVar[str] = "2504.06792"

    calibration: str | tuple[str, ...] = Field(  # type: ignore[assignment]
        "default", description="name of the calibration set that experts are judged on, or one name per domain"
    )

    def needs(self) -> tuple[Statistic, ...]:
        return (*super().needs(), TokenContributions())

    def check(self, facts: ModelFacts) -> list[str]:
        problems = super().check(facts)
        sites = [layer.site for layer in facts.moe_layers if layer.site is not None]
        if facts.model_type in NO_RESIDUAL:
            problems.append(f"{NO_RESIDUAL[facts.model_type]}; use prune.reap")
        elif any(site.hidden != facts.hidden_size for site in sites):
            problems.append("experts work on a projection of the residual stream; use prune.reap")
        return problems

    def _ranking(self, context: LayerContext) -> dict[str, Tensor]:
        if not isinstance(self.calibration, tuple):
            return super()._ranking(context)
        others = [context.collect(self.needs(), context.weights, name) for name in self.calibration[1:]]
        return super()._ranking(replace(context, statistics=_mixed([context.statistics, *others])))

    def scores(self, context: LayerContext) -> Tensor:
        return context.statistics["token_contributions"]["score"]


def _mixed(domains: Sequence[Evidence]) -> Evidence:
    """Statistics of several domains as of one: shares of the layer's scores and probabilities, largest outputs."""

    def share(name: str, key: str) -> Tensor:
        parts = [domain[name][key].double() for domain in domains]
        tiny = torch.finfo(torch.float64).tiny
        return torch.stack([part / part.sum().clamp_min(tiny) for part in parts]).mean(0)

    largest = torch.stack([domain["expert_activity"]["max_output"] for domain in domains]).amax(0)
    activity = {"max_output": largest, "probability": share("expert_activity", "probability")}
    return {"token_contributions": {"score": share("token_contributions", "score")}, "expert_activity": activity}
