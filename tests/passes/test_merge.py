"""Merging of experts: clusters, router rules, shared experts, DERN; whole runs down to what transformers loads."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine
import families
import planted
import pytest
import torch
from pruned import IDS, execute, generates, kept_experts, stored
from torch import Tensor

from moecompress.load import load
from moecompress.passes.merge_hc_smoe import MergeHCSMoE
from moecompress.passes.merge_m_smoe import MergeMSMoE
from moecompress.passes.merge_uncurl import MergeUncurl
from moecompress.stream.model import open_model
from moecompress.types import MoESite

METHODS = ("uncurl", "hc_smoe", "m_smoe")
E = 6


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    engine.reload_here(monkeypatch)


def evidence(planted_labels: list[int], use: list[int], largest: list[float] | None = None) -> Any:
    """Statistics of six experts that fall into clusters."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor(planted_labels)
    logits = torch.randn(300, 6, generator=generator, dtype=torch.float64)[:, labels]
    logits = logits + 0.2 * torch.randn(300, E, generator=generator, dtype=torch.float64)
    means = 3 * torch.randn(6, 8, generator=generator, dtype=torch.float64)[labels]
    pairs = torch.zeros(E, E, dtype=torch.int64)
    pairs[0, 1] = pairs[1, 0] = 30
    return {
        "routing_counts": {"tokens": torch.tensor(use), "total": torch.tensor(100)},
        "expert_activity": {"max_output": torch.tensor(largest or [1.0] * E)},
        "router_gram": {"gram": logits.T @ logits, "tokens": torch.tensor(300)},
        "mean_outputs": {"mean": means},
        "co_activation": {"pairs": pairs},
    }


def decided(step: Any, known: Any, top_k: int = 2, groups: int = 1) -> dict[str, Any]:
    site = MoESite("mlp.experts", "mlp.gate", E, top_k, 8, 4, groups=groups, top_groups=groups)
    layer = SimpleNamespace(site=site, index=0, shapes={})
    context = SimpleNamespace(
        statistics=known, facts=SimpleNamespace(moe_layers=(layer,)), layer=layer, weights=SimpleNamespace(index=0)
    )
    return dict(step.decide(context).data)


@pytest.mark.parametrize("method", [MergeUncurl, MergeHCSMoE])
def test_a_planted_cluster_is_found_and_its_most_used_expert_leads(method: Any) -> None:
    data = decided(method(keep=3), evidence([0, 0, 1, 2, 0, 2], [5, 9, 7, 1, 2, 1]))
    assert data["kept"] == [1, 2, 3] and data["clusters"] == {"1": [0, 1, 4], "2": [2], "3": [3, 5]}
    assert data["weights"] == pytest.approx([5 / 16, 9 / 16, 1, 0.5, 2 / 16, 0.5])
    assert data["experts"]["4"] == {"importance": 2.0, "action": "merged into 1"}
    assert data["layer"]["pairs"] == 0.3  # 30 of 100 tokens chose both experts 0 and 1


def test_each_joins_the_most_used_expert_routed_like_it() -> None:
    data = decided(MergeMSMoE(keep=3), evidence([0, 0, 1, 2, 0, 2], [5, 9, 7, 1, 2, 3]))
    assert data["kept"] == [0, 1, 2]  # the three most used, whoever is like whom


def test_super_experts_are_merged_with_nobody() -> None:
    largest = [1.0, 1.0, 1.0, 1.0, 90.0, 1.0]
    known = evidence([0, 0, 1, 2, 0, 2], [5, 9, 7, 1, 2, 1], largest)
    data = decided(MergeUncurl(keep=4), known)
    assert data["clusters"]["4"] == [4] and data["experts"]["4"]["protected"] == "super expert"
    assert data["clusters"]["1"] == [0, 1]
    assert 4 in decided(MergeUncurl(keep=3, protect=()), known)["clusters"]["1"]


def test_groups_merge_within_themselves() -> None:
    data = decided(MergeUncurl(keep=4), evidence([0, 0, 1, 0, 0, 1], [5, 9, 7, 1, 2, 1]), groups=2)
    assert data["clusters"] == {"1": [0, 1], "2": [2], "4": [3, 4], "5": [5]}
    shared = decided(
        MergeUncurl(keep=2, router="expert_map"), evidence([0, 0, 1, 0, 0, 1], [5, 9, 7, 1, 2, 1]), groups=2
    )
    assert shared["clusters"] == {"1": [0, 1, 3, 4], "2": [2, 5]}  # the router stays, so groups do not matter


def test_the_first_layer_can_be_pruned_by_use() -> None:
    data = decided(MergeUncurl(keep=3, first_layer="frequency"), evidence([0, 0, 0, 1, 1, 2], [5, 9, 7, 1, 2, 1]))
    assert data["clusters"] == {"0": [0], "1": [1], "2": [2]} and data["experts"]["4"]["action"] == "pruned"
    with pytest.raises(ValueError, match="first_layer"):
        MergeUncurl(first_layer="frequency", router="expert_map")
    with pytest.raises(ValueError, match="expert_map"):
        MergeMSMoE(counts="global", router="mean")


@pytest.mark.parametrize("router", ["representative", "mean", "expert_map"])
@pytest.mark.parametrize("method", METHODS)
def test_merging_nothing_changes_nothing(method: str, router: str, tmp_path: Path) -> None:
    source = families.save_tiny("qwen3_moe", tmp_path / "model")
    out = execute(tmp_path, source, [{f"merge.{method}": {"keep": 1.0, "router": router}}])
    before, after = stored(source), stored(out)
    assert before.keys() == after.keys() and all(torch.equal(after[name], value) for name, value in before.items())


def test_planted_copies_merge_without_loss(tmp_path: Path, bench_a: Path) -> None:
    """Every expert twice, in another order of neurons: half of them can go, and with the map nothing changes."""
    double = planted.permuted_duplicates(bench_a, tmp_path / "double")
    ids = engine.random_ids(2, 64, vocabulary=1000)
    wanted = engine.own_logits(bench_a, ids)
    out = execute(tmp_path, double, [{"merge.uncurl": {"keep": 0.5, "router": "expert_map"}}], ids)
    report = engine.read_json(out / "moecompress" / "report.json")
    for row in report["layers"]:
        merged = {(e["id"], e["action"]) for e in row["experts"] if e["action"].startswith("merged")}
        assert merged == {(i + 16, f"merged into {i}") for i in range(16)}
    with torch.no_grad():
        found = load(out, dtype=torch.float32)(input_ids=ids, use_cache=False).logits
    assert engine.difference(found, wanted) < 0.02  # weights are rounded to bfloat16 once
    size = report["size"]
    assert sum(part["output_bytes"] for part in size["components"].values()) == size["output_bytes"]


def test_planted_copies_are_taken_over_by_dern(tmp_path: Path, bench_a: Path) -> None:
    double = planted.permuted_duplicates(bench_a, tmp_path / "double")
    ids = engine.random_ids(2, 64, vocabulary=1000)
    out = execute(tmp_path, double, [{"merge.dern": {"keep": 0.5, "protect": []}}], ids)
    tensors = stored(out)
    source = stored(double)
    for row in engine.read_json(out / "moecompress" / "report.json")["layers"]:
        kept = [e["id"] for e in row["experts"] if not e["action"].startswith("pruned")]
        assert row["notes"]["transferred_fraction"] == 1.0 or {i % 16 for i in kept} != set(range(16))
        both = [i for i in kept if i < 16 and (i + 16) not in kept]  # its copy was taken over
        for expert in both:
            for part in planted.PARTS:
                name = f"model.layers.{row['layer']}.mlp.experts.{{}}.{part}.weight"
                new, old = tensors[name.format(kept.index(expert))], source[name.format(expert)]
                assert part != "gate_proj" or torch.allclose(new.float(), old.float(), rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("router", ["representative", "mean", "expert_map"])
def test_router_rules(method: str, router: str, tmp_path: Path) -> None:
    source = families.save_tiny("deepseek_v3", tmp_path / "model", torch.float32)
    out = execute(tmp_path, source, [{f"merge.{method}": {"keep": 6, "router": router}}])
    kept, before = kept_experts(out), stored(source)
    made = open_model(out)
    for place, facts in enumerate(made.facts.moe_layers):
        rows = made.read_layer(facts.index).tensors["mlp.gate.weight"]
        bias = made.read_layer(facts.index).tensors["mlp.gate.e_score_correction_bias"]
        old = before[f"{facts.name}.mlp.gate.weight"]
        assert isinstance(rows, Tensor) and isinstance(bias, Tensor)
        assert len(kept[place]) == 6
        if router == "expert_map":
            assert torch.equal(rows, old) and len(bias) == 8
            experts = made.read_layer(facts.index).experts
            assert len(experts) == 8 and len({id(e.gate_up) for e in experts}) == 6
        elif router == "representative":
            assert torch.equal(rows, old[torch.tensor(kept[place])])
        else:
            assert rows.shape == (6, 64) and bias.shape == (6,)
            alone = [n for n, i in enumerate(kept[place]) if torch.equal(rows[n], old[i])]
            assert 4 <= len(alone) < 6  # two or four experts are in clusters of more than one
    assert engine.read_json(out / "moecompress" / "report.json")["format"] == (
        "native" if router == "expert_map" else "dense"
    )
    streamed = engine.streamed_logits(made, IDS, tmp_path / "hidden")
    with torch.no_grad():
        whole = load(out, dtype=torch.float32)(input_ids=IDS, use_cache=False).logits
    assert engine.difference(streamed, whole) < 1e-4
    generates(out)


@pytest.mark.parametrize(
    "model_type", ["gpt_oss", "mixtral", "minimax_m2", "nemotron_h", "deepseek_v4", "inkling_text"]
)
@pytest.mark.parametrize("method", ["uncurl", "dern"])
def test_other_families(model_type: str, method: str, tmp_path: Path) -> None:
    """Interleaved rows and biases, no gate, biases on the block, hash layers, routers with rows of shared experts."""
    source = families.save_tiny(model_type, tmp_path / "model", torch.float32)
    options: dict[str, Any] = {"threshold": 0.0} if method == "dern" else {"router": "expert_map"}
    out = execute(tmp_path, source, [{f"merge.{method}": {"keep": 6, **options}}])
    assert all(len(kept) in (6, 8) for kept in kept_experts(out))
    generates(out)


def test_m_smoe_over_the_model(tmp_path: Path) -> None:
    source = families.save_tiny("qwen3_moe", tmp_path / "model")
    out = execute(tmp_path, source, [{"merge.m_smoe": {"keep": 0.5, "counts": "global"}}])
    counts = [len(kept) for kept in kept_experts(out)]
    assert sum(counts) == 16 and min(counts) >= 1 and len(set(counts)) > 1
    generates(out)


@pytest.mark.parametrize(
    "later",
    [
        [{"quantize.gptq": {"bits": 4, "group_size": 16}}],
        [{"smooth.awq": {"group_size": 16, "clip": False}}, {"quantize.rtn": {"bits": 8, "group_size": 16}}],
        [{"allocate.global": {"bits": [2, 4], "budget": "3 bits"}}, {"quantize.gptq": {"group_size": 16}}],
    ],
    ids=["gptq", "awq", "global"],
)
@pytest.mark.parametrize("router", ["representative", "expert_map"])
def test_merged_among_other_passes(router: str, later: list[Any], tmp_path: Path) -> None:
    source = families.save_tiny("qwen3_moe", tmp_path / "model", torch.float32)
    passes = [{"prune.reap": {"keep": 6}}, {"merge.uncurl": {"keep": 4, "router": router}}, *later]
    out = execute(tmp_path, source, passes)
    for row in engine.read_json(out / "moecompress" / "report.json")["layers"]:
        assert len([e for e in row["experts"] if e["action"] == "quantized"]) == row["experts_after"] == 4
        assert len([e for e in row["experts"] if e["action"] == "pruned"]) == 2
    generates(out)


def test_experts_shared_once_cannot_be_removed_again(tmp_path: Path) -> None:
    source = families.save_tiny("qwen3_moe", tmp_path / "model")
    passes = [{"merge.hc_smoe": {"keep": 6}}, {"prune.reap": {"keep": 4}}]
    done = engine.command("plan", engine.write_recipe(tmp_path, source, passes))
    assert done.code == 2 and "already share experts" in done.out + done.err
    passes = [{"merge.hc_smoe": {"keep": 6}}]
    done = engine.command("plan", engine.write_recipe(tmp_path, source, passes, output={"format": "dense"}))
    assert done.code == 2 and "share experts" in done.out + done.err


@pytest.mark.parametrize("retain", ["gate", "reap"])
def test_dern_says_when_it_only_prunes(retain: str, tmp_path: Path) -> None:
    source = families.save_tiny("qwen3_moe", tmp_path / "model", torch.float32)
    plain = execute(tmp_path / "plain", source, [{f"prune.{retain}": {"keep": 6}}])
    out = execute(tmp_path / "dern", source, [{"merge.dern": {"keep": 6, "threshold": 0.95, "retain": retain}}])
    for row in engine.read_json(out / "moecompress" / "report.json")["layers"]:
        assert row["notes"] == {"transferred_fraction": 0.0, "plain_pruning": True}
    one, two = stored(plain), stored(out)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("guard", [True, False])
def test_dern_takes_neurons_over(guard: bool, tmp_path: Path) -> None:
    source = families.save_tiny("qwen3_moe", tmp_path / "model", torch.float32)
    options = {"keep": 6, "threshold": 0.1, "guard": guard, "router_update": "none" if guard else "rows"}
    out = execute(tmp_path, source, [{"merge.dern": options}])
    for row in engine.read_json(out / "moecompress" / "report.json")["layers"]:
        notes = row["notes"]
        assert 0 < notes["transferred_fraction"] <= 1
        if guard:
            assert notes["plain_pruning"] == (notes["error_merged"] > notes["error_pruned"])
        else:
            assert notes["plain_pruning"] is False and any(e["action"] == "changed" for e in row["experts"])
    generates(out)


def test_shared_experts_are_exported_as_copies(tmp_path: Path) -> None:
    source = families.save_tiny("qwen3_moe", tmp_path / "model", torch.float32)
    out = execute(tmp_path, source, [{"merge.hc_smoe": {"keep": 5}}])
    done = engine.command("export", out, "--format", "dense", "--out", tmp_path / "dense")
    assert done.code == 0, done.err
    assert "quantization_config" not in engine.read_json(tmp_path / "dense" / "config.json")
    wanted = engine.streamed_logits(open_model(out), IDS, tmp_path / "hidden")
    assert engine.difference(engine.own_logits(tmp_path / "dense", IDS), wanted) < 1e-5


def test_pruned_codes_are_exported_under_their_new_numbers(tmp_path: Path) -> None:
    source = families.save_tiny("qwen3_moe", tmp_path / "model", torch.float32)
    passes = [{"prune.random": {"keep": 5}}, {"quantize.rtn": {"bits": 4, "group_size": 16}}]
    out = execute(tmp_path, source, passes, output={"format": "native"})
    assert any(kept != [0, 1, 2, 3, 4] for kept in kept_experts(out))
    for kind in ("dense", "portable"):
        done = engine.command("export", out, "--format", kind, "--out", tmp_path / kind)
        assert done.code == 0, done.err
    wanted = engine.streamed_logits(open_model(out), IDS, tmp_path / "hidden")
    assert engine.difference(engine.own_logits(tmp_path / "dense", IDS), wanted) < 1e-5


def test_uneven_layers_are_not_exported(tmp_path: Path) -> None:
    source = families.save_tiny("qwen3_moe", tmp_path / "model")
    out = execute(tmp_path, source, [{"prune.reap": {"keep": [8, 6, 4, 5]}}])
    done = engine.command("export", out, "--format", "dense", "--out", tmp_path / "dense")
    assert done.code == 2 and "uneven_layers: pad" in done.err
