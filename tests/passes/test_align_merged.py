"""align.router behind merges: a merged expert is to get what its members got together; where that is undefined, no."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import engine
import families
import layers
import planted
import pytest
import torch
from safetensors.torch import load_file, save_file

from moecompress.arch.surgery import keep_experts, stands_for
from moecompress.passes.align_router import AlignRouter
from moecompress.passes.merge_hc_smoe import MergeHCSMoE
from moecompress.passes.merge_m_smoe import MergeMSMoE
from moecompress.stream.model import open_model

IDS = engine.random_ids(24, 32)


def with_ids(folder: Path) -> dict[str, Any]:
    save_file({"ids": IDS}, folder / "ids.safetensors")
    return {"source": "tokens", "files": [str(folder / "ids.safetensors")], "samples": 24, "length": 32}


def test_planted_copies_leave_nothing_to_repair(bench_a: Path, tmp_path: Path) -> None:
    path = planted.permuted_duplicates(bench_a, tmp_path / "model")
    at = layers.at_layer(path, engine.random_ids(12, 64, vocabulary=4096), tmp_path, index=1)
    _, merged = at.process(MergeHCSMoE(keep=0.5, router="representative"))
    assert stands_for(merged) == tuple((i, i + 16) for i in range(16))
    for method in ("ridge", "topk_mse"):
        said = at.process(AlignRouter(method=method), merged)[0].data["router"]
        assert said["kl"][0] < 1e-9 and said["change"] < 1e-3
        assert said["agreement"][0] == 0.5  # the four clusters chosen, of the eight experts that a token uses now


def test_a_cluster_is_to_get_the_probability_of_all_members(tmp_path: Path) -> None:
    """Three experts under equal rows become one: with a bias the optimum is the row that was, and log 3 for it."""
    path = families.save_tiny("gpt_oss", tmp_path / "model", torch.float32)
    file = path / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if ".router." in name]:
        tensors[name][[1, 2]] = tensors[name][0].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    at = layers.at_layer(path, IDS, tmp_path, index=3, batch_tokens=512)
    rest = [0, 3, 4, 5, 6, 7]
    kept = keep_experts(at.model.facts.layers[3], at.weights, rest)
    apart = AlignRouter(strength=1e-6)
    assert at.process(apart, kept)[0].data["router"]["kl"][0] < 1e-9  # as pruned: the others' choice is as it was
    merged = replace(kept, merged=((0, 1, 2), *((i,) for i in rest[1:])))
    decision, after = at.process(apart, merged)
    said = decision.data["router"]
    assert said["accepted"] and said["kl"][0] > 0.01 and said["kl"][1] < 1e-6
    matrix, bias = (after.tensors[f"mlp.router.{name}"] for name in ("weight", "bias"))
    assert engine.difference(matrix, kept.tensors["mlp.router.weight"]) < 1e-3  # type: ignore[arg-type]
    moved = bias - kept.tensors["mlp.router.bias"]  # type: ignore[operator]
    assert moved[0] - moved[1:] == pytest.approx(torch.full((5,), math.log(3)), abs=1e-3)


@pytest.mark.parametrize("router", ["representative", "mean"])
def test_behind_a_merge_routers_come_nearer_to_the_original(
    router: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.reload_here(monkeypatch)
    path = families.save_tiny("qwen3_moe", tmp_path / "model", torch.float32)
    passes: list[Any] = [
        {"merge.hc_smoe": {"keep": 4, "router": router}},
        {"align.router": {}},
        {"quantize.rtn": {"group_size": 16}},
    ]
    done = engine.command("run", engine.write_recipe(tmp_path, path, passes, calibration=with_ids(tmp_path)))
    assert done.code == 0, done.err
    rows = engine.read_json(tmp_path / "out" / "moecompress" / "report.json")["layers"]
    said = [row["router"]["aligned"][0] for row in rows]
    assert all(one["accepted"] and one["kl"][1] < 0.75 * one["kl"][0] for one in said)
    assert all(0 < one["agreement"][0] < one["agreement"][1] < 1 for one in said)


def test_clusters_follow_merges_and_removals(tmp_path: Path) -> None:
    at = layers.at_layer(families.save_tiny("qwen3_moe", tmp_path / "model"), IDS[:8], tmp_path)
    facts = at.model.facts.layers[0]
    _, once = at.process(MergeHCSMoE(keep=5, router="representative"))
    assert sorted(i for cluster in stands_for(once) for i in cluster) == list(range(8)) and len(once.experts) == 5
    assert all(own in cluster for own, cluster in zip(once.source_ids, stands_for(once), strict=True))
    left = keep_experts(MergeHCSMoE(keep=5, router="representative").reshape(at.model.facts).layers[0], once, [1, 3])
    assert stands_for(left) == (stands_for(once)[1], stands_for(once)[3])
    assert stands_for(keep_experts(facts, at.weights, [2, 5])) == ((2,), (5,))


def test_where_outputs_do_not_add_up_it_is_refused(tmp_path: Path) -> None:
    path = families.save_tiny("deepseek_v3", tmp_path / "model")
    facts = MergeHCSMoE(keep=4, router="representative").reshape(open_model(path).facts)
    for method, options in (("ridge", {}), ("topk_mse", {}), ("kl_clip", {"router_bits": 8})):
        told = AlignRouter(method=method, **options).check(facts)  # type: ignore[arg-type]
        assert len(told) == 1 and "sigmoid scoring" in told[0] and "before the merge" in told[0]
    assert AlignRouter(method="kl_logits").check(facts) == []
    assert AlignRouter().check(MergeHCSMoE(keep=8, router="representative").reshape(open_model(path).facts)) == []
    passes: list[Any] = [{"merge.hc_smoe": {"keep": 4, "router": "mean"}}, {"align.router": {}}]
    done = engine.command("plan", engine.write_recipe(tmp_path, path, passes, calibration=with_ids(tmp_path)))
    assert done.code == 2 and "no output stands for several" in done.out + done.err
    softmax = families.save_tiny("qwen3_moe", tmp_path / "softmax")
    for step in (MergeHCSMoE(keep=4, router="representative"), MergeMSMoE(keep=4, router="representative")):
        assert AlignRouter().check(step.reshape(open_model(softmax).facts)) == []


def test_sigmoid_routers_are_tuned_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Judged against the shares of all members, which sums of sigmoids have, too."""
    engine.reload_here(monkeypatch)
    path = families.save_tiny("dots1", tmp_path / "model", torch.float32)
    step = {"align.router": {"method": "kl_logits", "steps": 4, "lr": 1e-3, "batch": 4}}
    passes: list[Any] = [{"merge.hc_smoe": {"keep": 0.5, "router": "mean"}}, step]
    done = engine.command("run", engine.write_recipe(tmp_path, path, passes, calibration=with_ids(tmp_path)))
    assert done.code == 0, done.err
    rows = engine.read_json(tmp_path / "out" / "moecompress" / "report.json")["layers"]
    assert all(math.isfinite(v) and v > 0 for row in rows for v in row["router"]["aligned"][0]["kl"])
