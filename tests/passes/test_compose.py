"""Fewer experts in one recipe with everything else: what is collected, where, and on which experts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engine
import families
import pytest
import torch
from pruned import execute, generates

from moecompress import context, sweep
from moecompress.stream.collect import Collector


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    engine.reload_here(monkeypatch)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, str, int, tuple[str, ...]]]]:
    """Every run of a layer of the calibration set: layer, stream, experts, statistics filled."""
    seen: list[tuple[int, str, int, tuple[str, ...]]] = []
    real = sweep.run_layer

    def run_layer(
        model: Any, weights: Any, run: Any, stream: str, *, collector: Collector | None = None, **more: Any
    ) -> Any:
        if run.tokens.name != "probe" and collector is not None:
            names = tuple(sorted(item.name for item in collector.statistics))
            seen.append((weights.index, stream, len(weights.experts), names))
        return real(model, weights, run, stream, collector=collector, **more)

    for module in (sweep, context):
        monkeypatch.setattr(module, "run_layer", run_layer)
    yield seen


def test_statistics_are_collected_again_exactly_where_experts_went(runs: Any, tmp_path: Path) -> None:
    source = families.save_tiny("qwen3_moe", tmp_path / "model", torch.float32)
    passes = [
        {"prune.reap": {"keep": 6}},
        {"prune.gate": {"keep": 1.0}},
        {"merge.uncurl": {"keep": 4}},
        {"quantize.gptq": {"bits": 4, "group_size": 16}},
    ]
    execute(tmp_path, source, passes)
    first = [run for run in runs if run[0] == 0]
    report = ("routing_counts", "token_sample")
    assert first == [
        (0, "original", 8, ("expert_activity", *report)),  # once for pruning and the report
        (0, "original", 6, ("expert_activity",)),  # for the pass after it
        (0, "original", 6, ("co_activation", "router_gram", "routing_counts")),  # its activity is still right
        (0, "compressed", 4, ("expert_hessian.gate_up.0-4",)),  # of the merged experts
        (0, "compressed", 4, ("expert_hessian.down.0-4",)),
        (0, "compressed", 4, ()),  # the result
    ]
    assert [run[1:] for run in runs if run[0] == 3] == [run[1:] for run in first]


@pytest.mark.parametrize("router", ["representative", "mean"])
def test_prune_merge_smooth_allocate_align_quantize(router: str, tmp_path: Path) -> None:
    source = families.save_tiny("qwen3_moe", tmp_path / "model", torch.float32)
    passes = [
        {"prune.reap": {"keep": 6}},
        {"merge.uncurl": {"keep": 4, "router": router}},
        {"smooth.awq": {"group_size": 16, "clip": False}},
        {"allocate.global": {"bits": [2, 4], "budget": "3 bits"}},
        {"align.router": {}},
        {"quantize.gptq": {"group_size": 16}},
    ]
    out = execute(tmp_path, source, passes, engine.random_ids(16, 24))
    for row in engine.read_json(out / "moecompress" / "report.json")["layers"]:
        assert (row["experts_after"], row["router"]["aligned"][0]["method"]) == (4, "ridge")
        assert {e["bits"]["down"] for e in row["experts"] if e["action"] == "quantized"} <= {2, 4}
        assert all(e["error"] is None or e["error"] < 1 for e in row["experts"] if e["action"] == "quantized")
    generates(out)


def test_a_router_whose_ids_share_experts_is_aligned_before(tmp_path: Path) -> None:
    source = families.save_tiny("qwen3_moe", tmp_path / "model")
    passes = [{"merge.hc_smoe": {"keep": 6}}, {"align.router": {}}]
    done = engine.command("plan", engine.write_recipe(tmp_path, source, passes))
    assert done.code == 2 and "share experts" in done.out + done.err
