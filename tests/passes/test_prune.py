"""Expert pruning: scores against their formulas, which experts stay, and whole runs down to what transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine
import families
import planted
import pytest
import torch
from pruned import IDS, execute, kept_experts, stored
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from stock import run_stock
from torch import Tensor

from moecompress.evaluate import evaluate_dir
from moecompress.layerstore import load_layer, save_layer
from moecompress.load import load
from moecompress.passes.prune_ean import PruneEAN
from moecompress.passes.prune_easy_ep import PruneEasyEP
from moecompress.passes.prune_frequency import PruneFrequency
from moecompress.passes.prune_gate import PruneGate
from moecompress.passes.prune_random import PruneRandom
from moecompress.passes.prune_reap import PruneREAP
from moecompress.passes.prune_score import PruneScore
from moecompress.passes.pruning import Pruning
from moecompress.passes.shrinking import chosen, super_experts
from moecompress.stream.model import open_model
from moecompress.types import LayerWeights, MoESite

METHODS = [PruneFrequency, PruneGate, PruneEAN, PruneREAP, PruneScore, PruneEasyEP, PruneRandom]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    engine.reload_here(monkeypatch)


def site(experts: int, top_k: int = 2, groups: int = 1, top_groups: int = 1) -> MoESite:
    return MoESite("mlp.experts", "mlp.gate", experts, top_k, 8, 4, groups=groups, top_groups=top_groups)


def statistics(experts: int = 8, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """Made-up sums; expert 3 never saw a token."""
    generator = torch.Generator().manual_seed(seed)
    powers = torch.rand(experts, 3, 3, generator=generator, dtype=torch.float64) * 10
    powers[:, 0, 0] = torch.randint(1, 50, (experts,), generator=generator).double()
    powers[3] = 0
    activity = {
        "powers": powers,
        "max_output": torch.ones(experts),
        "probability": torch.rand(experts, generator=generator, dtype=torch.float64),
    }
    return {"expert_activity": activity, "token_contributions": {"score": torch.rand(experts, generator=generator)}}


def context(known: dict[str, dict[str, Tensor]], place: MoESite | None = None) -> Any:
    experts = known["expert_activity"]["powers"].shape[0]
    layer = SimpleNamespace(site=place or site(experts), index=0, shapes={})
    return SimpleNamespace(
        statistics=known,
        facts=SimpleNamespace(moe_layers=(layer,)),
        layer=layer,
        weights=SimpleNamespace(experts=[None] * experts),
        generator=lambda: torch.Generator().manual_seed(5),
    )


def test_scores_are_their_formulas() -> None:
    known = statistics()
    powers = known["expert_activity"]["powers"]
    count = powers[:, 0, 0].clamp_min(1)
    wanted = {
        PruneFrequency(): powers[:, 0, 0],
        PruneGate(): powers[:, 1, 0],
        PruneEAN(): powers[:, 0, 1],
        PruneREAP(): powers[:, 1, 1] / count,
        PruneScore(): powers[:, 0, 1] / count,
        PruneScore(b=0.5, alpha=2, beta=1): powers[:, 2, 1] / count.sqrt(),
        PruneScore(b=1.0, alpha=1, beta=1): powers[:, 1, 1] / count,
        PruneEasyEP(): known["token_contributions"]["score"],
    }
    for step, scores in wanted.items():
        found = step.scores(context(known))
        torch.testing.assert_close(found, scores)
        assert step.decide(context(known)).data["kept"] == sorted(scores.argsort(descending=True)[:6].tolist())


def test_a_rare_specialist_is_kept_by_the_mean_and_lost_by_the_count() -> None:
    known = statistics()
    powers = known["expert_activity"]["powers"]
    powers[:, 0, 0], powers[:, 1, 1] = 40.0, 20.0
    powers[5, 0, 0], powers[5, 1, 1] = 2.0, 19.0  # two tokens, to which it matters more than anybody
    assert 5 in PruneREAP(keep=2).decide(context(known)).data["kept"]
    assert 5 not in PruneFrequency(keep=7).decide(context(known)).data["kept"]


@pytest.mark.parametrize("step", [method(keep=0.5) for method in METHODS])
def test_seeing_all_tokens_twice_changes_no_choice(step: Any) -> None:
    known = statistics()
    twice = {name: {key: 2 * value for key, value in part.items()} for name, part in known.items()}
    twice["expert_activity"]["max_output"] = known["expert_activity"]["max_output"]
    assert step.decide(context(twice)).data["kept"] == step.decide(context(known)).data["kept"]


def test_ties_go_to_the_likelier_and_then_to_the_first() -> None:
    known = statistics()
    known["expert_activity"]["powers"][:] = 0
    known["expert_activity"]["probability"] = torch.tensor([1.0, 2, 3, 3, 2, 1, 0, 0]).double()
    assert PruneREAP(keep=3).decide(context(known)).data["kept"] == [1, 2, 3]


def test_importance_and_removal_are_noted_per_expert() -> None:
    known = statistics()
    known["expert_activity"]["max_output"][3] = 11.0  # never better than the others, but a super expert
    data = PruneFrequency(keep=0.5).decide(context(known)).data
    assert 3 in data["kept"] and len(data["kept"]) == 4
    assert data["experts"]["3"] == {"importance": 0.0, "protected": "super expert"}
    assert {int(i) for i, note in data["experts"].items() if note.get("action") == "pruned"} == set(range(8)) - set(
        data["kept"]
    )
    assert 3 not in PruneFrequency(keep=0.5, protect=()).decide(context(known)).data["kept"]


def test_super_experts_are_told_by_the_largest_output() -> None:
    largest = torch.tensor([1.0, 0.0, 2.0, 30.0, 1.0, 500.0])
    assert super_experts({"expert_activity": {"max_output": largest}}) == [5, 3]
    for nothing in (torch.ones(6), torch.zeros(6)):
        assert super_experts({"expert_activity": {"max_output": nothing}}) == []
    assert super_experts({}) == []


def test_groups_keep_equally_many() -> None:
    assert chosen([7, 6, 5, 4, 3, 2, 1, 0], 4, 2) == [2, 3, 6, 7]
    assert chosen([7, 6, 5, 4, 3, 2, 1, 0], 4, 1) == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("step", "place", "kept", "problem"),
    [
        (PruneREAP(keep=0.75), site(8), 6, None),
        (PruneREAP(keep=6), site(8), 6, None),
        (PruneREAP(keep=1.0), site(8), 8, None),
        (PruneREAP(keep=9), site(8), 9, "the model has 8 experts"),
        (PruneREAP(keep=1), site(8), 1, "1 experts stay, every token uses 2: keep more, or set top_k: lower"),
        (PruneREAP(keep=1, top_k="lower"), site(8), 1, None),
        (PruneREAP(keep=0.6), site(16, 2, 4, 2), 8, None),  # 9.6 to what four groups allow: 2 or 3 in each
        (PruneREAP(keep=10), site(16, 2, 4, 2), 10, "does not divide by the router's 4 groups"),
        (PruneREAP(keep=4), site(16, 2, 4, 2), 4, "1 experts stay in each of 4 groups"),
        (PruneREAP(keep=8), site(16, 6, 4, 2), 8, "too few for 6 experts per token"),
        (PruneREAP(keep=10, group_policy="ungroup"), site(16, 2, 4, 2), 10, None),
    ],
)
def test_how_many_stay(step: Pruning, place: MoESite, kept: int, problem: str | None) -> None:
    assert step.kept(place) == kept
    layer = SimpleNamespace(site=place, shapes={}, index=0)
    found = step.check(SimpleNamespace(moe_layers=(layer,), layers=(layer,)))  # type: ignore[arg-type]
    assert found == [] if problem is None else problem in found[0]


@pytest.mark.parametrize("options", [{"keep": 0}, {"keep": 1.5}, {"keep": -2}, {"protect": ["all"]}, {"alpha": 3}])
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(options))):
        PruneScore(**options)


def test_keeping_all_changes_nothing(tmp_path: Path) -> None:
    source = families.save_tiny("qwen3_moe", tmp_path / "model")
    out = execute(tmp_path, source, [{"prune.reap": {"keep": 1.0}}])
    before = load_file(source / "model.safetensors")
    after = stored(out)
    assert before.keys() == after.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    assert engine.read_json(out / "config.json") == engine.read_json(source / "config.json")


@pytest.mark.parametrize("method", ["frequency", "reap", "easy_ep"])
def test_permuted_experts_are_judged_alike(method: str, tmp_path: Path, bench_a: Path) -> None:
    ids = engine.random_ids(2, 48, vocabulary=1000)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1)).tolist()
    other = planted.permuted_experts(bench_a, tmp_path / "permuted", order)
    passes = [{f"prune.{method}": {"keep": 0.5}}]
    first, second = (
        kept_experts(execute(tmp_path / "a", bench_a, passes, ids)),
        kept_experts(execute(tmp_path / "b", other, passes, ids)),
    )
    assert [sorted(order[i] for i in kept) for kept in second] == first


def test_stock_transformers_loads_and_generates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = []
    for model_type in ("qwen3_moe", "deepseek_v3", "gpt_oss", "ernie4_5_moe", "minimax_m2"):
        (folder := tmp_path / model_type).mkdir()
        source = families.save_tiny(model_type, folder / "model", torch.float32)
        outputs.append(execute(folder, source, [{"prune.easy_ep": {"keep": 6}}]))
        assert "quantization_config" not in engine.read_json(outputs[-1] / "config.json")
        report = engine.read_json(outputs[-1] / "moecompress" / "report.json")
        for row in report["layers"]:
            removed = [e for e in row["experts"] if e["action"] == "pruned"]
            assert (row["experts_before"], row["experts_after"], len(removed)) == (8, 6, 2)
            assert all(e["bits"] == {"gate_up": None, "down": None} and e["importance"] is not None for e in removed)
    monkeypatch.undo()  # a process of its own again
    for out, found in run_stock(outputs, IDS, tmp_path).items():
        assert any(value.shape[0] == 6 for name, value in found.items() if name.endswith("down_proj"))
        torch.testing.assert_close(found["logits"], engine.own_logits(out, IDS), rtol=1e-5, atol=1e-5)
        model = engine.own_model(out)
        with torch.no_grad():
            assert model.generate(IDS[:1, :8], max_new_tokens=3, min_new_tokens=3, pad_token_id=0).shape == (1, 11)


def test_evaluation_does_not_compare_numbers_of_other_experts(tmp_path: Path, bench_a: Path) -> None:
    ids = engine.random_ids(2, 32, vocabulary=1000)
    out = execute(tmp_path, bench_a, [{"prune.reap": {"keep": 0.75}}], ids)
    text = tmp_path / "text.txt"
    text.write_text("Numbers and words, again and again. " * 60)
    found = evaluate_dir(out, [str(text)], bench_a, length=32, windows=2)
    assert found["router_agreement"] == [None] * 4 and found["kl"]["text"] > 0


def test_every_spelling_of_the_count_is_written(tmp_path: Path) -> None:
    """`num_local_experts` wins over `num_experts` in transformers 5, other programs read the latter."""
    source = families.save_tiny("qwen3_moe", tmp_path / "model")
    config = engine.read_json(execute(tmp_path, source, [{"prune.random": {"keep": 5}}]) / "config.json")
    assert config["num_local_experts"] == config["num_experts"] == 5 and config["num_experts_per_tok"] == 2


def test_the_plan_knows_the_sizes_and_the_manifest_the_fate_of_every_tensor(tmp_path: Path) -> None:
    source = families.save_tiny("deepseek_v3", tmp_path / "model")
    out = execute(tmp_path, source, [{"prune.frequency": {"keep": 6}}])
    kept = dict(zip((1, 2, 3), kept_experts(out), strict=True))
    rows = engine.read_json(out / "moecompress" / "manifest.json")["tensors"]
    made, before = stored(out), load_file(source / "model.safetensors")
    for layer, experts in kept.items():
        for number in range(8):
            key = f"model.layers.{layer}.mlp.experts.{number}.down_proj.weight"
            if number in experts:
                new = key.replace(f"experts.{number}.", f"experts.{experts.index(number)}.")
                assert rows[key]["outputs"] == [new] and torch.equal(made[new], before[key])
            else:
                assert (rows[key]["action"], rows[key]["outputs"]) == ("drop", [])
    report = engine.read_json(out / "moecompress" / "report.json")
    size, shared = report["size"], [name for name in before if "shared_experts" in name]
    assert all(torch.equal(made[name], before[name]) for name in shared) and shared
    assert size["output_bytes"] == sum(value.nbytes for value in made.values())
    assert sum(part["output_bytes"] for part in size["components"].values()) == size["output_bytes"]
    assert size["expert_bits_per_weight"] == 12


@pytest.mark.parametrize("kind", ["native", "portable", "dense"])
def test_pruned_and_quantized_in_one_recipe(kind: str, tmp_path: Path) -> None:
    source = families.save_tiny("qwen3_moe", tmp_path / "model")
    passes = [{"prune.reap": {"keep": 5}}, {"quantize.rtn": {"bits": 4, "group_size": 16}}]
    out = execute(tmp_path, source, passes, output={"format": kind})
    rows = engine.read_json(out / "moecompress" / "manifest.json")["tensors"]
    for layer, kept in enumerate(kept_experts(out)):
        name = "model.layers.{}.mlp.experts.{}.gate_proj.weight"
        assert [i for i in range(8) if rows[name.format(layer, i)]["action"] != "drop"] == kept
    report = engine.read_json(out / "moecompress" / "report.json")
    bits = {e["bits"]["down"] for e in report["layers"][0]["experts"]}
    assert bits == ({None, 16} if kind == "dense" else {None, 4})
    size = report["size"]
    assert sum(part["output_bytes"] for part in size["components"].values()) == size["output_bytes"]  # as planned
    with torch.no_grad():
        assert load(out).generate(IDS[:1, :8], max_new_tokens=2, min_new_tokens=2, pad_token_id=0).shape == (1, 10)


@pytest.mark.parametrize("smooth_first", [True, False])
def test_scales_folded_before_or_after_are_told_apart_in_the_report(smooth_first: bool, tmp_path: Path) -> None:
    """Errors of 8-bit experts are tiny only if every expert is compared with the one it was, its scales taken back."""
    source = families.save_tiny("qwen3_moe", tmp_path / "model", torch.float32)
    smooth, prune = {"smooth.awq": {"group_size": 16, "clip": False}}, {"prune.random": {"keep": 4}}
    first = [smooth, prune] if smooth_first else [prune, smooth]
    out = execute(tmp_path, source, [*first, {"quantize.rtn": {"bits": 8, "group_size": 16}}])
    rows = [e for row in engine.read_json(out / "moecompress" / "report.json")["layers"] for e in row["experts"]]
    kept = [e for e in rows if e["action"] != "pruned"]
    assert len(kept) == 16 and all(e["action"] == "quantized" and e["weight_error"] < 1e-3 for e in kept)
    assert any(e["id"] > 3 for e in kept) and all(e["error"] is None or e["error"] < 1e-3 for e in kept)


def test_pruned_twice_keeps_the_numbers_of_the_source(tmp_path: Path) -> None:
    source = families.save_tiny("mixtral", tmp_path / "model")
    passes = [{"prune.reap": {"keep": 6}}, {"prune.random": {"keep": 4}}]
    out = execute(tmp_path, source, passes)
    once = execute(tmp_path / "once", source, passes[:1])
    assert all(set(two) < set(one) and len(two) == 4 for one, two in zip(kept_experts(once), kept_experts(out)))  # noqa: B905
    assert engine.read_json(out / "config.json")["num_local_experts"] == 4


def test_groups_can_be_given_up(tmp_path: Path) -> None:
    source = families.save_tiny("deepseek_v3", tmp_path / "model")
    out = execute(tmp_path, source, [{"prune.ean": {"keep": 5, "group_policy": "ungroup"}}])
    config = engine.read_json(out / "config.json")
    assert (config["n_group"], config["topk_group"], config["n_routed_experts"]) == (1, 1, 5)


def test_fewer_experts_per_token_on_request(tmp_path: Path) -> None:
    source = families.save_tiny("olmoe", tmp_path / "model")
    out = execute(tmp_path, source, [{"prune.gate": {"keep": 1, "top_k": "lower"}}])
    assert engine.read_json(out / "config.json")["num_experts_per_tok"] == 1


def test_layers_for_multi_token_prediction_go_with_a_warning(tmp_path: Path) -> None:
    source = families.save_tiny("deepseek_v3", tmp_path / "model")
    tensors, config = load_file(source / "model.safetensors"), engine.read_json(source / "config.json")
    extra = {
        name.replace("layers.3.", "layers.4."): value.clone() for name, value in tensors.items() if "layers.3." in name
    }
    save_file(tensors | extra, source / "model.safetensors", {"format": "pt"})
    (source / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    out = execute(tmp_path, source, [{"prune.reap": {"keep": 6}}])
    assert engine.read_json(out / "config.json")["num_nextn_predict_layers"] == 0
    rows = engine.read_json(out / "moecompress" / "manifest.json")["tensors"]
    assert {rows[name]["action"] for name in extra} == {"drop"}
    warnings = engine.read_json(out / "moecompress" / "report.json")["warnings"]
    assert any("multi-token prediction" in line and str(len(extra)) in line for line in warnings)


def test_an_fp8_source_gives_what_its_expanded_twin_gives(tmp_path: Path) -> None:
    source = families.save_tiny("deepseek_v3", tmp_path / "model")
    engine.make_fp8(source, tmp_path / "dense", 16)
    outs = [execute(tmp_path / f"out-{p.name}", p, [{"prune.reap": {"keep": 6}}]) for p in (source, tmp_path / "dense")]
    first, second = (stored(out) for out in outs)
    assert first.keys() == second.keys() and all(torch.equal(first[name], value) for name, value in second.items())
    assert engine.read_json(outs[0] / "config.json")["n_routed_experts"] == 6


def test_the_plan_says_what_stays_of_every_tensor(tmp_path: Path) -> None:
    source = families.save_tiny("mixtral", tmp_path / "model")
    passes = [{"prune.random": {"keep": 6, "protect": []}}, {"quantize.rtn": {"bits": 4, "group_size": 16}}]
    done = engine.command("plan", engine.write_recipe(tmp_path, source, passes))
    assert done.code == 0 and "96  keep 6 of 8 experts, quantize 4-bit symmetric, group 16" in done.out
    assert "4  keep 6 of 8 experts\n" in done.out  # the routers


def test_random_needs_no_data_when_nothing_is_protected(tmp_path: Path) -> None:
    source = families.save_tiny("olmoe", tmp_path / "model")
    recipe = engine.write_recipe(tmp_path, source, [{"prune.random": {"keep": 6}}])
    assert "no calibration" in engine.command("run", recipe).err
    recipe = engine.write_recipe(tmp_path, source, [{"prune.random": {"keep": 6, "protect": []}}])
    assert engine.command("run", recipe).code == 0
    kept = kept_experts(tmp_path / "out")
    assert len({tuple(layer) for layer in kept}) > 1  # every layer draws for itself


@pytest.mark.parametrize("model_type", ["flex_olmo", "qwen4_exp_text", "deepseek_v4"])
def test_what_cannot_be_done_is_told_by_the_plan(model_type: str, tmp_path: Path) -> None:
    source = families.save_tiny(model_type, tmp_path / "model")
    done = engine.command("plan", engine.write_recipe(tmp_path, source, [{"prune.easy_ep": {"keep": 6}}]))
    assert "prune.easy_ep" in done.out + done.err
    assert any(word in done.out + done.err for word in ("residual stream", "native"))


def test_a_pruned_layer_can_be_kept_at_a_barrier(tmp_path: Path) -> None:
    model = open_model(families.save_tiny("qwen3_moe", tmp_path / "model"))
    original = model.read_layer(0)
    experts = tuple(original.experts[i].with_projection("down", original.experts[i].down * 2) for i in (1, 4, 7))  # type: ignore[operator]
    weights = LayerWeights(0, original.tensors, experts, (1, 4, 7), merged=((0, 1), (4,), (3, 7)))
    save_layer(tmp_path / "layer.safetensors", original, weights)
    found = load_layer(tmp_path / "layer.safetensors", original)
    assert found is not None and found.sources == (1, 4, 7) and found.merged == weights.merged
    assert engine.same_layer(found, weights)
    assert all(a.gate_up is original.experts[i].gate_up for a, i in zip(found.experts, (1, 4, 7), strict=True))


@pytest.mark.parametrize("step", METHODS)
def test_every_method_is_described(step: Any) -> None:
    made = step()
    assert made.name.startswith("prune.") and made.paper and made.propagate == "original" and made.removes_experts
