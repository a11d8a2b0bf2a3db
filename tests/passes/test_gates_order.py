"""Gates on the trained demo model: at equal shares of experts used, choosing by token beats a fixed number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine
import pytest
import torch
from torch import Tensor

from moecompress.calib.sources import resolve_text
from moecompress.calib.tokenizer import load_tokenizer
from moecompress.calib.tokens import windows
from moecompress.gate import Gate
from moecompress.passes.prune_odp import PruneODP
from moecompress.stats.routing import TokenSample
from moecompress.stream.collect import Collector
from moecompress.stream.layers import call_layer, experts_of, filled_layer
from moecompress.stream.model import StreamModel, open_model
from moecompress.stream.outer import outer_weights
from moecompress.stream.prelude import logits, record

COUNT = Gate("count", True, count=3)


@pytest.fixture(scope="module")
def model(bench_a: Path) -> StreamModel:
    return open_model(bench_a)


@pytest.fixture(scope="module")
def ids(bench_a: Path) -> Tensor:
    """Real text, int64 [12, 96]."""
    tokenizer: Any = load_tokenizer(bench_a)
    text = resolve_text("python-stdlib:heldout")[:60_000]
    return windows(torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]), 96, 12)


@pytest.fixture(scope="module")
def statistics(model: StreamModel, ids: Tensor, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """What prune.odp keeps of every layer."""
    collectors = {layer.index: Collector(layer.site, [TokenSample(4096)]) for layer in model.facts.moe_layers}
    engine.through_layers(model, engine.token_run(model, ids, tmp_path_factory.mktemp("run")), collectors=collectors)
    step = PruneODP()
    return {i: step.measure(SimpleNamespace(statistics=found.finished())) for i, found in collectors.items()}  # type: ignore[arg-type]


def predicted(model: StreamModel, ids: Tensor, gates: Mapping[int, Gate]) -> tuple[Tensor, float]:
    """log p [N, T, V], and the mean share of experts used."""
    shares = []
    with torch.no_grad(), outer_weights(model.skeleton, model.layers_name, model.read_outer):
        hidden, calls = record(model.skeleton, model.layers, ids)
        for index, call in enumerate(calls):
            site = model.facts.layers[index].site
            assert site is not None
            with filled_layer(model, replace(model.read_layer(index), gate=gates.get(index))) as layer:
                hidden = call_layer(layer, hidden, call)
                kept = experts_of(layer, site.experts).kept
                shares.append(1.0 if kept is None else float(kept.mean()))
        return logits(model.skeleton, model.layers, ids, hidden).log_softmax(-1), sum(shares) / len(shares)


def divergence(wanted: Tensor, found: Tensor) -> float:
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


@pytest.mark.parametrize("renormalise", [True, False])
def test_ratios_lose_less_than_a_fixed_number(
    renormalise: bool, model: StreamModel, ids: Tensor, statistics: dict[int, Any]
) -> None:
    wanted, _ = predicted(model, ids, {})
    fixed, share = predicted(model, ids, dict.fromkeys(statistics, replace(COUNT, renormalise=renormalise)))
    assert share == pytest.approx(0.75)
    losses = [divergence(wanted, fixed)]
    for pool in ("layer", "model"):
        step = PruneODP(quantile=1 / 3, protect=0, pool=pool, renormalise=renormalise)
        found = step.decide(SimpleNamespace(statistics=statistics)).data["layers"]  # type: ignore[arg-type]
        by_ratio, share = predicted(model, ids, {int(i): step._gate(values, 0) for i, values in found.items()})
        assert share == pytest.approx(0.75, abs=0.01)  # a third of three slots, on the tokens that thresholds are from
        assert (len({values["threshold"] for values in found.values()}) == 1) == (pool == "model")
        losses.append(divergence(wanted, by_ratio))
    assert losses == sorted(losses, reverse=True)
