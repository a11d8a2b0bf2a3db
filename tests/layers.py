"""One layer of a checkpoint taken through a pass as the engine does it, without a whole run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine
import torch
from torch import Tensor

from moecompress.context import layer_context
from moecompress.passes.base import Decision, LayerContext, Pass
from moecompress.stats.base import Statistic
from moecompress.stream.collect import Collector
from moecompress.stream.layers import filled_layer
from moecompress.stream.model import StreamModel, open_model
from moecompress.stream.streams import TokenRun, run_layer
from moecompress.types import LayerWeights


@dataclass(frozen=True)
class AtLayer:
    """A model with its token runs just before layer `index`; both streams hold the same unless told otherwise."""

    model: StreamModel
    run: TokenRun
    probe: TokenRun
    index: int

    @property
    def weights(self) -> LayerWeights:
        return self.model.read_layer(self.index)

    def context(self, step: Pass, weights: LayerWeights, module: Any, statistics: Any) -> LayerContext:
        job = SimpleNamespace(
            model=self.model,
            tokens={"default": self.run, "probe": self.probe},
            report_set="default",
            position=lambda _: 0,  # no allocation before
            moved=False,
            quantizer_after=lambda _: None,
        )
        return layer_context(job, step, module, weights, statistics)  # type: ignore[arg-type]

    def process(
        self, step: Pass, weights: LayerWeights | None = None, decision: Decision | None = None
    ) -> tuple[Decision, LayerWeights]:
        """`step` on this layer: decided and applied, or only applied when a decision is given."""
        weights = weights or self.weights
        finished = self.collect(step.needs(), weights)
        with filled_layer(self.model, weights) as module:
            context = self.context(step, weights, module, finished)
            if decision is None:
                return step.process(context)
            return decision, step.apply(context, decision)

    def collect(self, wanted: tuple[Statistic, ...], weights: LayerWeights | None = None) -> dict[str, Any]:
        """Finished statistics of the layer on the compressed stream."""
        collector = Collector(self.model.facts.layers[self.index].site, wanted, self.run.tokens.heldout)
        run_layer(self.model, weights or self.weights, self.run, "compressed", collector=collector, write=False)
        return collector.finished()

    def output(self, weights: LayerWeights) -> Tensor:
        """The layer's output on all tokens of the compressed stream."""
        run_layer(self.model, weights, self.run, "compressed")
        store = self.run.store("compressed", self.index + 1)
        return store.read(0, store.shape[0])

    def error(self, after: LayerWeights) -> float:
        """|output after - output before|^2 / |output before|^2."""
        wanted = self.output(self.weights).double()
        return float((self.output(after).double() - wanted).square().sum() / wanted.square().sum())


def at_layer(path: Path, ids: Tensor, folder: Path, index: int = 0, *, batch_tokens: int = 256) -> AtLayer:
    """The checkpoint at `path`, its layers before `index` run on ids [N, T]."""
    model = open_model(path)
    runs = []
    for name, rows in (("run", ids), ("probe", engine.random_ids(1, 16))):
        run = engine.token_run(
            model, rows, folder / name, batch_tokens=batch_tokens, streams=("original", "compressed")
        )
        for before in range(index):
            for stream in ("original", "compressed"):
                run_layer(model, model.read_layer(before), run, stream)  # type: ignore[arg-type]
        runs.append(run)
    return AtLayer(model, runs[0], runs[1], index)


def same_codes(first: LayerWeights, second: LayerWeights) -> bool:
    """Whether all experts' codes and scales are equal bit for bit."""
    return all(
        torch.equal(getattr(a.projection(p), part), getattr(b.projection(p), part))  # type: ignore[arg-type]
        for a, b in zip(first.experts, second.experts, strict=True)
        for p in ("gate_up", "down")
        for part in ("codes", "scales")
    )
