"""allocate.pmq and allocate.global: measured errors are the definition, budgets hold in the file, quantizers obey."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import engine
import families
import numpy as np
import pytest
import torch
from engine import calibrated_recipe as recipe
from engine import finished_run as run
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from moecompress.calib.tokens import heldout_rows
from moecompress.errors import RecipeError
from moecompress.load import load
from moecompress.passes.allocate_global import AllocateGlobal, Measured
from moecompress.passes.allocate_pmq import AllocatePMQ
from moecompress.passes.base import ModelContext
from moecompress.passes.quantize_rtn import QuantizeRTN
from moecompress.passes.quantizer import Quantizer
from moecompress.plan import make_plan
from moecompress.recipe import load_recipe
from moecompress.stream.model import open_model

SIZES = {"hidden_size": 64, "moe_intermediate_size": 32}
WEIGHTS = 3 * 64 * 32  # of one expert
GPTQ: dict[str, Any] = {"quantize.gptq": {"group_size": 32}}
LIGHT = {"weighting": "none", "bits": [1, 2, 3]}
RTN: dict[str, Any] = {"quantize.rtn": {"group_size": 32}}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    engine.reload_here(monkeypatch)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    save_file({"ids": engine.random_ids(16, 24, seed=3)}, folder / "ids.safetensors")
    return families.save_tiny("qwen3_moe", folder / "model", torch.bfloat16, **SIZES)


def widths(out: Path) -> list[list[tuple[int, int]]]:
    """(gate_up, down) bits of every expert of every layer, from the report."""
    rows = engine.read_json(out / "moecompress" / "report.json")["layers"]
    return [[(e["bits"]["gate_up"], e["bits"]["down"]) for e in row["experts"]] for row in rows]


def tensors(out: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in sorted(out.glob("*.safetensors")) for name, value in load_file(path).items()}


def mean_bits(found: list[list[tuple[int, int]]]) -> float:
    flat = [expert for layer in found for expert in layer]
    return sum(2 * a + b for a, b in flat) / (3 * len(flat))  # gate_up has twice the weights of down


def test_global_mixes_widths_within_the_budget_and_the_file_is_as_planned(source: Path, tmp_path: Path) -> None:
    passes = ({"allocate.global": {"budget": "2.5 bits", "sequences": 4}}, GPTQ)
    plan = make_plan(load_recipe(recipe(tmp_path / "plan", source, *passes)))
    assert plan.problems == () and plan.output == "native"
    assert any(action.startswith("quantize as allocated") for action in plan.actions.values())
    out = run(tmp_path / "a", source, *passes)
    found = widths(out)
    assert len({width for layer in found for width in layer}) > 1
    assert 2.4 < mean_bits(found) <= 2.5
    report = engine.read_json(out / "moecompress" / "report.json")
    assert report["size"]["output_bytes"] == pytest.approx(plan.estimate.output_bytes, rel=0.01)
    assert report["size"]["expert_bits_per_weight"] == pytest.approx(mean_bits(found) + 16 / 32, rel=1e-6)
    importance = [e["importance"] for row in report["layers"] for e in row["experts"]]
    assert all(value is not None and value > 0 for value in importance)
    assert len({tuple(e["importance"] for e in row["experts"]) for row in report["layers"]}) == len(report["layers"])
    model = load(out)
    assert torch.isfinite(model(input_ids=engine.random_ids(1, 8)).logits).all()


@pytest.mark.parametrize("quantizer", [GPTQ, RTN])
def test_one_width_everywhere_is_the_uniform_recipe(quantizer: dict[str, Any], source: Path, tmp_path: Path) -> None:
    ((name, keys),) = quantizer.items()
    allocated = run(tmp_path / "a", source, {"allocate.global": {"bits": [3], "budget": "3 bits"}}, quantizer)
    output = {"format": "native"}
    uniform = run(tmp_path / "b", source, {name: {**keys, "bits": 3}}, output=output)
    first, second = tensors(allocated), tensors(uniform)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_pmq_gives_every_layer_the_same_budget_and_both_highest_widths(source: Path, tmp_path: Path) -> None:
    out = run(tmp_path, source, {"allocate.pmq": {"budget": "2 bits"}}, RTN)
    for layer in widths(out):
        assert all(up == down for up, down in layer)
        assert sum(up for up, _ in layer) <= 2 * len(layer)
        assert {2, 3} <= {up for up, _ in layer}


def test_a_budget_in_stored_bits_holds_in_the_file(source: Path, tmp_path: Path) -> None:
    out = run(tmp_path, source, {"allocate.global": {"budget": "3.1 bpw", **LIGHT}}, RTN)
    report = engine.read_json(out / "moecompress" / "report.json")
    assert 3.0 < report["size"]["expert_bits_per_weight"] <= 3.1


def test_a_budget_in_bytes_holds_for_the_whole_output(source: Path, tmp_path: Path) -> None:
    passes = ({"allocate.global": {"budget": "1 KiB", **LIGHT}}, RTN)
    (problem,) = make_plan(load_recipe(recipe(tmp_path / "plan", source, *passes))).problems
    least = int(problem.split("budget is '")[1].split(" B")[0])
    out = run(tmp_path / "run", source, {"allocate.global": {"budget": f"{least + 8000} B", **LIGHT}}, RTN)
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert 0.6 * (least + 8000) < size <= least + 8000  # headers are reserved in full, which tells in a tiny model
    assert len({width for layer in widths(out) for width in layer}) > 1


@pytest.mark.parametrize("keys", [{"per_layer_uniform": True}, {"per_layer": True, "granularity": "expert"}])
def test_one_width_per_layer_and_the_same_budget_per_layer(keys: Any, source: Path, tmp_path: Path) -> None:
    found = widths(run(tmp_path, source, {"allocate.global": {"budget": "2.5 bits", **LIGHT, **keys}}, RTN))
    assert mean_bits(found) <= 2.5
    for layer in found:
        assert all(up == down for up, down in layer)
        assert len(set(layer)) == 1 if "per_layer_uniform" in keys else mean_bits([layer]) <= 2.5


def test_a_quantizer_without_bits_takes_the_allocation() -> None:
    step: Quantizer = QuantizeRTN(group_size=32)

    class Context:
        allocation = {"gate_up": [1, 8], "down": [2, 4]}
        weights = type("Weights", (), {"experts": (0, 1), "index": 0})

    context: Any = Context()
    assert [step.scheme_for(context, e, name).bits for e in (0, 1) for name in ("gate_up", "down")] == [1, 2, 8, 4]
    assert step.scheme_for(context, 0, "gate_up").binary
    assert step.scheme_for(context, None, "self_attn.q_proj.weight").bits == 4
    assert QuantizeRTN(bits=3).scheme_for(context, 1, "gate_up").bits == 3
    context.weights.experts = (0, 1, 2)
    with pytest.raises(RecipeError, match="allocate after pruning"):
        step.scheme_for(context, 0, "gate_up")


@pytest.mark.parametrize(
    ("passes", "text"),
    [
        (({"allocate.global": {"budget": "0.5 bits"}}, RTN), "nearest feasible budget is '1 bits'"),
        (({"allocate.global": {"budget": "1.2 bpw"}}, RTN), "nearest feasible budget is '1.5 bpw'"),
        (({"allocate.global": {"budget": "9 KiB"}}, RTN), "nearest feasible budget is '"),
        (({"allocate.global": {"budget": "2 bits"}},), "no later quantize"),
        (
            ({"allocate.global": {"budget": "2 bits"}}, {"quantize.rtn": {"bits": 2, "group_size": 32}}),
            "no later quant",
        ),
        (({"allocate.pmq": {"budget": "2 bits"}}, {"allocate.pmq": {"budget": "2 bits"}}, RTN), "a second allocation"),
        (({"allocate.global": {"budget": "2 pounds"}}, RTN), "'2 pounds' is not a budget; allowed: '2.5 bits'"),
        (({"allocate.global": {"budget": "2 bits", "bits": [2, 2]}}, RTN), "names a width twice"),
        (({"allocate.global": {"budget": "2 bits", "bits": [5]}}, RTN), "bits"),
    ],
)
def test_what_cannot_be_is_refused_before_the_work(passes: Any, text: str, source: Path, tmp_path: Path) -> None:
    done = engine.command("run", recipe(tmp_path, source, *passes))
    assert done.code == 2 and text in done.err, done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("budget", ["1.05 bits", "1.55 bpw", "SMALL"])
def test_a_budget_below_pmqs_two_widths_names_the_nearest_that_works(budget: str, source: Path, tmp_path: Path) -> None:
    """`plan` says it, and takes what it names."""

    def problems(text: str) -> tuple[str, ...]:
        (tmp_path / text).mkdir()
        path = recipe(tmp_path / text, source, {"allocate.pmq": {"budget": text}}, RTN)
        return make_plan(load_recipe(path)).problems

    if budget == "SMALL":
        (problem,) = problems("1 KiB")
        budget = f"{int(problem.split(chr(39))[-2].removesuffix(' B')) + 8} B"
    (problem,) = problems(budget)
    assert "the two highest widths need 1.375" in problem, problem
    near = problem.split("budget is '")[1].split("'")[0]
    assert near.split()[1] == budget.split()[1] and problems(near) == ()


def test_the_portable_format_refuses_mixed_widths(source: Path, tmp_path: Path) -> None:
    passes = ({"allocate.global": {"budget": "2 bits"}}, RTN)
    done = engine.command("run", recipe(tmp_path, source, *passes, output={"format": "portable"}))
    assert done.code == 2 and "experts get different widths" in done.err


def test_keys() -> None:
    assert AllocateGlobal(budget="2 bits", bits=(4, 1, 2)).bits == (1, 2, 4)
    assert AllocatePMQ(budget="2 bits").rule == "released"
    with pytest.raises(ValidationError, match="allowed: one of them"):
        AllocateGlobal(budget="2 bits", per_layer=True, per_layer_uniform=True)


def test_pruned_experts_are_not_paid_for(source: Path, tmp_path: Path) -> None:
    passes = ({"prune.random": {"keep": 0.5}}, {"allocate.global": {"budget": "2.5 bits", **LIGHT}}, RTN)
    plan = make_plan(load_recipe(recipe(tmp_path / "plan", source, *passes)))
    report = engine.read_json(run(tmp_path / "run", source, *passes) / "moecompress" / "report.json")
    kept = [e["bits"] for row in report["layers"] for e in row["experts"] if e["bits"]["down"] is not None]
    assert len(kept) * 2 == sum(row["experts_before"] for row in report["layers"])
    assert 2.4 < mean_bits([[(bits["gate_up"], bits["down"]) for bits in kept]]) <= 2.5
    assert report["size"]["output_bytes"] == pytest.approx(plan.estimate.output_bytes, rel=0.01)


def test_an_expert_of_no_bits_is_left_out_everywhere(source: Path, tmp_path: Path) -> None:
    """0 bits: nothing is stored, no token is sent there, and the loaded model is the streamed one."""
    passes = ({"allocate.global": {"budget": "1 bits", "bits": [0, 2, 4], "weighting": "none"}}, RTN)
    plan = make_plan(load_recipe(recipe(tmp_path / "plan", source, *passes)))
    out = run(tmp_path / "run", source, *passes)
    found = widths(out)
    gone = [sum(pair == (0, 0) for pair in layer) for layer in found]
    assert sum(gone) > 0 and all((up == 0) == (down == 0) for layer in found for up, down in layer)
    assert mean_bits(found) <= 1
    report = engine.read_json(out / "moecompress" / "report.json")
    planned = plan.estimate.output_bytes  # how many scales go is not known before
    assert 0.9 * planned < report["size"]["output_bytes"] <= planned
    rows = [expert for row in report["layers"] for expert in row["experts"] if expert["bits"]["down"] == 0]
    assert len(rows) == sum(gone) and all(row["action"] == "pruned" and row["error"] == 1 for row in rows)
    assert any(row["use"]["experts"] < row["use"]["experts_before"] for row in report["layers"])
    block = engine.read_json(out / "config.json")["quantization_config"]
    assert block["format_version"] == 2
    from moecompress.stream.model import open_model

    ids = engine.random_ids(2, 8, seed=1)
    model: Any = load(out, dtype=torch.float32)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    assert engine.difference(logits, engine.streamed_logits(open_model(out), ids, tmp_path / "hidden")) < 1e-5
    stored = model.state_dict()  # whoever ran the experts gives their records back as they are in the file
    assert all(torch.equal(stored[name], value) for name, value in tensors(out).items() if ".rec" in name)
    done = engine.command("export", out, "--format", "container", "--out", tmp_path / "container")
    assert done.code == 0, done.err


def test_rounding_a_layer_tells_what_its_errors_count(source: Path, tmp_path: Path) -> None:
    keys = {"budget": "2.5 bits", "bits": [2, 3], "weighting": "kl", "sequences": 2}
    out = run(tmp_path, source, {"allocate.global": keys}, RTN)
    allocation = engine.read_json(out / "moecompress" / "report.json")["allocation"]
    assert allocation["name"] == "allocate.global" and allocation["budget"] == "2.5 bits"
    assert 0 < allocation["predicted_kl"] < 1 and mean_bits(widths(out)) <= 2.5


def test_the_budget_curve_falls_and_says_what_cannot_be(source: Path, tmp_path: Path) -> None:
    passes = ({"allocate.global": {"budget": "2.5 bits", "sequences": 2}}, RTN)
    path = recipe(tmp_path / "sweep", source, *passes)
    done = engine.command("plan", path, "--sweep", "0.5:3.5:1", "--json")
    assert done.code == 0, done.err
    rows = json.loads(done.out)
    assert [row["budget"] for row in rows] == ["0.5 bits", "1.5 bits", "2.5 bits", "3.5 bits"]
    assert "nearest feasible budget is '1 bits'" in rows[0]["problem"]
    costs = [row["predicted_kl"] for row in rows[1:]]
    assert costs == sorted(costs, reverse=True) and costs[0] > 2 * costs[-1] > 0
    assert all(row["mean_bits"] <= float(row["budget"].split()[0]) for row in rows[1:])
    assert not (tmp_path / "sweep" / "out").exists() and len(list((tmp_path / "sweep").iterdir())) == 1
    out = run(tmp_path / "run", source, *passes)
    report = engine.read_json(out / "moecompress" / "report.json")["allocation"]
    assert report["predicted_kl"] == pytest.approx(rows[2]["predicted_kl"])  # the run decides on the same statistics
    curve = [row["predicted_kl"] for row in report["curve"]]
    assert len(curve) == 12 and curve == sorted(curve, reverse=True)
    text = engine.command("plan", path, "--sweep", "2:2:1").out
    assert "predicted KL" in text and "2 bits" in text


@pytest.mark.parametrize("text", ["", "1:2", "2:1:1", "1:2:0", "a:b:c", "0:1:1", "1:9:0.001"])
def test_a_sweep_that_is_none_is_refused(text: str, source: Path, tmp_path: Path) -> None:
    passes = ({"allocate.global": {"budget": "2.5 bits"}}, RTN)
    done = engine.command("plan", recipe(tmp_path, source, *passes), "--sweep", text)
    assert done.code == 2 and "FIRST:LAST:STEP" in done.err


def test_a_sweep_needs_an_allocation(source: Path, tmp_path: Path) -> None:
    done = engine.command("plan", recipe(tmp_path, source, RTN), "--sweep", "1:2:1")
    assert done.code == 2 and "no allocate.* pass" in done.err


def test_tied_layers_are_the_best_of_all_tied_choices(source: Path) -> None:
    """per_layer_uniform against trying every width for every layer."""
    facts = open_model(source).facts
    rng = np.random.default_rng(0)
    bits = (1, 2, 3, 4)
    sites = [layer.site for layer in facts.moe_layers]
    experts = sites[0].num_experts  # type: ignore[union-attr]
    costs = {i: np.sort(rng.lognormal(0, 2, (experts, 3, 4)))[..., ::-1] for i in range(len(sites))}
    costs = {i: np.ascontiguousarray(value) for i, value in costs.items()}
    measured = Measured(costs, {i: torch.ones(experts) for i in costs}, 100)
    for budget in (1.5, 2.25, 3.75):
        step = AllocateGlobal(bits=bits, budget=f"{budget} bits", per_layer_uniform=True)
        context = ModelContext(
            facts, {}, lambda *_: torch.Generator(), lambda _: {}, lambda *_: {}, QuantizeRTN(group_size=32)
        )
        found = step.divided(context, measured).data
        whole = {i: value[:, 2].sum(0) for i, value in costs.items()}
        choices = [
            c for c in itertools.product(range(4), repeat=len(costs)) if sum(bits[j] for j in c) <= budget * len(c)
        ]
        best = min(sum(whole[i][j] for i, j in enumerate(c)) for c in choices)
        assert found["predicted_cost"] == pytest.approx(best, rel=1e-9) and found["gap"] < 1e-6
        chosen = [set(row["bits"]["gate_up"] + row["bits"]["down"]) for row in found["layers"].values()]
        assert all(len(widths) == 1 for widths in chosen) and found["mean_bits"] <= budget


W4: dict[str, Any] = {"quantize.rtn": {"bits": 4, "group_size": 32}}
HELDOUT: dict[str, list[dict[str, Any]]] = {
    "fisher": [{"allocate.global": {"budget": "2.5 bits", "sequences": 8}}, RTN],
    "kl": [{"allocate.global": {"budget": "2.5 bits", "sequences": 8, "weighting": "kl"}}, RTN],
    "pmq": [{"allocate.pmq": {"budget": "2 bits"}}, GPTQ],
    "odp": [W4, {"prune.odp": {"pool": "model"}}],
    "otp": [
        {"quantize.rtn": {"bits": 4, "group_size": 32}},
        {"prune.otp": {"steps": 3, "batch": 4, "width": 4, "teacher": "original"}},
    ],
}


@pytest.mark.parametrize("name", HELDOUT)
def test_nothing_is_decided_on_held_out_sequences(name: str, source: Path, tmp_path: Path) -> None:
    """Other text in the held-out rows gives the same file, byte for byte; in the others it does not."""
    ids = load_file(source.parent / "ids.safetensors")["ids"][:8]
    (row,) = heldout_rows(8, 0.125)
    made = []
    for number, changed in enumerate([(), (row,), ((row + 1) % 8,)]):
        folder = tmp_path / str(number)
        (folder / "source").mkdir(parents=True)
        (folder / "source" / "model").symlink_to(source)
        other = ids.clone()
        other[list(changed)] = engine.random_ids(len(changed), ids.shape[1], seed=9)
        save_file({"ids": other}, folder / "source" / "ids.safetensors")
        made.append(tensors(run(folder / "run", folder / "source" / "model", *HELDOUT[name])))
    first, heldout, trained = made
    assert all(torch.equal(value, heldout[key]) for key, value in first.items())
    assert name in ("odp", "pmq") or any(not torch.equal(value, trained[key]) for key, value in first.items())
