"""Layers with numbers of experts of their own: a list or one budget for the model, down to what transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engine
import families
import pytest
import torch
from pruned import IDS, execute, generates, kept_experts

from moecompress.evaluate import evaluate_dir
from moecompress.load import load
from moecompress.passes.prune_reap import PruneREAP
from moecompress.stream.model import open_model


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    engine.reload_here(monkeypatch)


@pytest.mark.parametrize(
    ("model_type", "keep"),
    [
        ("qwen3_moe", [8, 6, 3, 5]),
        ("deepseek_v3", [4, 8, 6]),
        ("gpt_oss", [2, 8, 7, 4]),
        ("minimax_m2", [5, 4, 8, 6]),
        ("inkling_text", [8, 4, 6, 7]),
    ],
)
def test_a_list_gives_every_layer_its_number(model_type: str, keep: list[int], tmp_path: Path) -> None:
    """The run itself checks that transformers, with the layers resized, computes what the stream did."""
    source = families.save_tiny(model_type, tmp_path / "model", torch.float32)
    layers = len(open_model(source).facts.moe_layers)
    out = execute(tmp_path, source, [{"prune.reap": {"keep": keep[:layers]}}])
    assert [len(kept) for kept in kept_experts(out)] == keep[:layers]
    config, before = engine.read_json(out / "config.json"), engine.read_json(source / "config.json")
    block = config.pop("quantization_config")
    assert config == before and {module["num_experts"] for module in block["experts"].values()} == set(
        keep[:layers]
    ) - {8}
    size = engine.read_json(out / "moecompress" / "report.json")["size"]
    assert sum(part["output_bytes"] for part in size["components"].values()) == size["output_bytes"]  # as planned
    again = open_model(out)
    assert [layer.site.num_experts for layer in again.facts.moe_layers if layer.site] == keep[:layers]
    streamed = engine.streamed_logits(again, IDS, tmp_path / "hidden")
    with torch.no_grad():
        whole = load(out, dtype=torch.float32)(input_ids=IDS, use_cache=False).logits
    assert engine.difference(streamed, whole) < 1e-5
    generates(out)


def test_layers_that_look_experts_up_stay_whole(tmp_path: Path) -> None:
    source = families.save_tiny("deepseek_v4", tmp_path / "model")
    out = execute(tmp_path, source, [{"prune.reap": {"keep": 6}}])
    assert [len(kept) for kept in kept_experts(out)] == [8, 6, 6, 6]
    assert engine.read_json(out / "moecompress" / "report.json")["format"] == "native"
    generates(out)


def test_one_budget_for_the_model(tmp_path: Path, bench_a: Path) -> None:
    ids = engine.random_ids(2, 48, vocabulary=1000)
    passes = [{"prune.reap": {"keep": 0.5, "counts": "global"}}]
    out = execute(tmp_path, bench_a, passes, ids)
    kept = kept_experts(out)
    assert sum(map(len, kept)) == 32 and min(map(len, kept)) >= 4 and len(set(map(len, kept))) > 1
    rows = engine.read_json(out / "moecompress" / "report.json")["layers"]
    shares = []
    for row, stays in zip(rows, kept, strict=True):
        total = sum(e["importance"] for e in row["experts"])
        shares.append({e["id"]: e["importance"] / total for e in row["experts"]})
        assert all(e["bits"]["down"] is None for e in row["experts"] if e["id"] not in stays)
    for share, stays in zip(shares, kept, strict=True):
        assert min(share[i] for i in stays) > max((v for i, v in share.items() if i not in stays), default=0)
    best = min(min(share[i] for i in stays) for share, stays in zip(shares, kept, strict=True) if len(stays) > 4)
    lost = max(v for share, stays in zip(shares, kept, strict=True) for i, v in share.items() if i not in stays)
    assert best > lost  # ranked over all layers
    text = tmp_path / "text.txt"
    text.write_text("Numbers and words, again and again. " * 60)
    assert evaluate_dir(out, [str(text)], bench_a, length=32, windows=2)["kl"]["text"] > 0
    generates(out)


@pytest.mark.parametrize(
    "later",
    [
        [{"quantize.gptq": {"bits": 4, "group_size": 16}}],
        [{"smooth.awq": {"group_size": 16, "clip": False}}, {"quantize.rtn": {"bits": 8, "group_size": 16}}],
        [
            {"allocate.global": {"bits": [2, 4], "budget": "3 bits"}},
            {"quantize.gptq": {"group_size": 16}},
        ],
    ],
    ids=["gptq", "awq", "global"],
)
@pytest.mark.parametrize("keep", [{"keep": 0.5, "counts": "global"}, {"keep": [8, 4, 2, 6]}], ids=["budget", "list"])
def test_uneven_layers_among_other_passes(keep: dict[str, Any], later: list[Any], tmp_path: Path) -> None:
    source = families.save_tiny("qwen3_moe", tmp_path / "model", torch.float32)
    out = execute(tmp_path, source, [{"prune.reap": keep}, *later])
    rows = engine.read_json(out / "moecompress" / "report.json")["layers"]
    found = {row["layer"]: [e for e in row["experts"] if e["bits"]["down"] is not None] for row in rows}
    counts = [len(experts) for experts in found.values()]
    assert counts == keep["keep"] if isinstance(keep["keep"], list) else sum(counts) == 16
    assert all(e["action"] == "quantized" for experts in found.values() for e in experts)
    generates(out)


@pytest.mark.parametrize(
    ("options", "sections", "text"),
    [
        ({"keep": [6, 6, 6]}, {}, "3 entries for 4 layers"),
        ({"keep": [1, 6, 6, 6]}, {}, "1 experts stay"),
        ({"keep": [1, 6, 6, 6], "top_k": "lower"}, {}, "uneven layers cannot lower"),
        ({"keep": [0.5, 9, 6, 6]}, {}, "the model has 8 experts"),
        ({"keep": [6, 6, 6, 4], "counts": "global"}, {}, "counts: global with a list"),
        ({"keep": [6, 6, 6, 4]}, {"output": {"format": "dense"}}, "layers have different numbers of experts"),
        ({"keep": 6, "counts": "global"}, {"output": {"format": "portable"}}, "layers have different numbers"),
    ],
)
def test_impossible_lists_are_refused(
    options: dict[str, Any], sections: dict[str, Any], text: str, tmp_path: Path
) -> None:
    source = families.save_tiny("qwen3_moe", tmp_path / "model")
    done = engine.command("plan", engine.write_recipe(tmp_path, source, [{"prune.reap": options}], **sections))
    assert done.code == 2 and text in done.out + done.err


def test_groups_with_a_budget_for_the_model(tmp_path: Path) -> None:
    source = families.save_tiny("deepseek_v3", tmp_path / "model")
    out = execute(tmp_path, source, [{"prune.reap": {"keep": 0.75, "counts": "global"}}])
    for kept in kept_experts(out):
        assert len([i for i in kept if i < 4]) == len([i for i in kept if i >= 4]) >= 2
    assert sum(map(len, kept_experts(out))) == 18
    step = PruneREAP(keep=0.75, counts="global", group_policy="ungroup")
    assert "ungroup" in step.check(open_model(source).facts)[0]


@pytest.mark.parametrize("model_type", ["deepseek_v3", "minimax_m2", "gpt_oss", "glm4_moe", "afmoe"])
def test_empty_experts_make_a_plain_checkpoint_of_the_same_function(model_type: str, tmp_path: Path) -> None:
    source = families.save_tiny(model_type, tmp_path / "model", torch.float32)
    layers = len(open_model(source).facts.moe_layers)
    keep = {"keep": [6, 4, 4, 6][:layers]}
    outs = []
    for uneven in ("native", "pad"):
        passes = [{"prune.reap": {**keep, "uneven_layers": uneven}}]
        outs.append(execute(tmp_path / uneven, source, passes))
    logits = [engine.streamed_logits(open_model(out), IDS, tmp_path / f"{out.parent.name}-hidden") for out in outs]
    assert engine.difference(logits[1], logits[0]) < 1e-5
    report = engine.read_json(outs[1] / "moecompress" / "report.json")
    assert report["format"] == "dense" and "quantization_config" not in engine.read_json(outs[1] / "config.json")
    assert {layer.site.num_experts for layer in open_model(outs[1]).facts.moe_layers if layer.site} == {6}
    generates(outs[1])


def test_a_budget_for_the_model_can_be_padded_or_made_equal(tmp_path: Path) -> None:
    source = families.save_tiny("deepseek_v3", tmp_path / "model", torch.float32)
    whole = {"keep": 0.5, "counts": "global"}
    logits = []
    for uneven in ("native", "pad"):
        out = execute(tmp_path / uneven, source, [{"prune.reap": {**whole, "uneven_layers": uneven}}])
        logits.append(engine.streamed_logits(open_model(out), IDS, tmp_path / f"{uneven}-hidden"))
    assert engine.difference(logits[1], logits[0]) < 1e-5
    assert engine.read_json(out / "config.json")["n_routed_experts"] == 8
    out = execute(tmp_path / "equal", source, [{"prune.reap": {**whole, "uneven_layers": "uniformize"}}])
    assert [len(kept) for kept in kept_experts(out)] == [4, 4, 4]
    passes = [{"prune.reap": {"keep": [4, 8, 6], "uneven_layers": "uniformize"}}]
    assert [len(kept) for kept in kept_experts(execute(tmp_path / "list", source, passes))] == [6, 6, 6]


@pytest.mark.parametrize("model_type", ["qwen3_moe", "ernie4_5_moe"])
def test_padding_that_would_not_be_exact_is_refused(model_type: str, tmp_path: Path) -> None:
    source = families.save_tiny(model_type, tmp_path / "model")
    passes = [{"prune.reap": {"keep": 0.5, "counts": "global", "uneven_layers": "pad"}}]
    done = engine.command("plan", engine.write_recipe(tmp_path, source, passes))
    assert done.code == 2 and "no bias that keeps empty experts out" in done.out + done.err
