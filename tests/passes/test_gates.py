"""prune.top_k, .odp and .otp: whole runs agree with the loaded model, dropped experts are never read, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import engine
import families
import pytest
import torch
from engine import calibrated_recipe as recipe
from engine import finished_run as run
from safetensors.torch import save_file

import moecompress
from moecompress.errors import CheckpointError, UnsupportedModel
from moecompress.experts import Experts
from moecompress.gate import Gate
from moecompress.numerics.gating import mask_router
from moecompress.passes.prune_otp import PruneOTP
from moecompress.passes.prune_top_k import PruneTopK
from moecompress.plan import make_plan
from moecompress.recipe import load_recipe
from moecompress.types import ExpertWeights

RTN: dict[str, Any] = {"quantize.rtn": {"bits": 4, "group_size": 32}}
IDS = engine.random_ids(2, 12, seed=5)
SMALL = {"num_experts_per_tok": 4}
GATES: dict[str, dict[str, Any]] = {
    "top_k": {"prune.top_k": {}},
    "odp": {"prune.odp": {"quantile": 0.6, "protect": 0.1}},
    "otp": {
        "prune.otp": {"steps": 8, "batch": 4, "target": 0.5, "learning_rate": 0.2, "penalty_rate": 5.0, "width": 4}
    },
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    engine.reload_here(monkeypatch)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    save_file({"ids": engine.random_ids(16, 24, seed=3)}, folder / "ids.safetensors")
    return families.save_tiny("qwen3_moe", folder / "model", torch.bfloat16, **SMALL)


@pytest.fixture(scope="module")
def outputs(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One finished run per gate on the same quantized model, and one without."""
    with pytest.MonkeyPatch.context() as patch:
        engine.reload_here(patch)
        root = tmp_path_factory.mktemp("outputs")
        made = {name: run(root / name, source, RTN, gate) for name, gate in GATES.items()}
        return made | {"none": run(root / "none", source, RTN, output={"format": "native"})}


def routed(model: Any) -> list[list[torch.Tensor]]:
    """What every call of every experts module sent where: a list of ids [T, K] per module, filled while it runs."""
    seen: list[list[torch.Tensor]] = []
    for module in model.modules():
        if isinstance(module, Experts):
            calls: list[torch.Tensor] = []
            seen.append(calls)

            def note(*args: Any, before: Any = module.dispatch, calls: Any = calls) -> Any:
                found = before(*args)
                calls.append(found[0])
                return found

            module.dispatch = note  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize("name", GATES)
def test_loaded_streamed_and_stepwise_agree(name: str, outputs: dict[str, Path], tmp_path: Path) -> None:
    from moecompress.stream.model import open_model

    model: Any = moecompress.load(outputs[name], dtype=torch.float32)
    seen = routed(model)
    with torch.no_grad():
        found = model(input_ids=IDS, use_cache=False).logits
    streamed = engine.streamed_logits(open_model(outputs[name]), IDS, tmp_path)
    assert engine.difference(found, streamed) < 1e-5
    plain: Any = moecompress.load(outputs["none"], dtype=torch.float32)
    with torch.no_grad():
        assert engine.difference(plain(input_ids=IDS, use_cache=False).logits, found) > 1e-3
    kept = torch.stack([(calls[0] < 8).float().mean() for calls in seen])
    assert bool((kept < 1).any()) and bool((kept >= 0.25).all())
    if name == "odp":
        return  # protection looks at whole sequences: decoding step by step has nothing to compare
    with torch.no_grad():
        step, cache = [], None
        for position in range(IDS.shape[1]):
            out = model(input_ids=IDS[:, position : position + 1], past_key_values=cache, use_cache=True)
            step.append(out.logits)
            cache = out.past_key_values
    assert engine.difference(torch.cat(step, 1), found) < 1e-4


@pytest.mark.parametrize("name", GATES)
def test_generation_uses_the_gate(name: str, outputs: dict[str, Path]) -> None:
    model: Any = moecompress.load(outputs[name])
    seen = routed(model)
    out = model.generate(IDS[:1, :4], max_new_tokens=4, do_sample=False)
    assert out.shape == (1, 8) and all(len(calls) == 4 for calls in seen)
    assert any(bool((ids == 8).any()) for calls in seen for ids in calls)


def test_the_file_says_what_leaves_and_grows_as_planned(outputs: dict[str, Path], source: Path, tmp_path: Path) -> None:
    block = engine.read_json(outputs["otp"] / "config.json")["quantization_config"]
    assert block["format_version"] == 2 and len(block["gates"]) == 4
    assert {gate["kind"] for gate in block["gates"].values()} == {"mask_router"}
    plan = make_plan(load_recipe(recipe(tmp_path / "plan", source, RTN, GATES["otp"])))
    size = engine.read_json(outputs["otp"] / "moecompress" / "report.json")["size"]["output_bytes"]
    plain = engine.read_json(outputs["none"] / "moecompress" / "report.json")["size"]["output_bytes"]
    assert size == pytest.approx(plan.estimate.output_bytes, rel=0.01)
    assert size - plain == 4 * 4 * (4 * (64 + 4) + 4 * 4 + 4)
    assert "gates" not in engine.read_json(outputs["none"] / "config.json")["quantization_config"]


def test_dropped_experts_are_never_read() -> None:
    """Experts full of NaN whose pairs leave the dispatch do no harm, as multiplying by zero would."""
    experts = Experts()
    experts.has_gate, experts.act_fn = False, torch.nn.functional.silu
    good = ExpertWeights(torch.ones(4, 6), torch.ones(6, 4))
    bad = ExpertWeights(torch.full((4, 6), torch.nan), torch.full((6, 4), torch.nan))
    experts.weights = (good, bad)
    experts.gate = Gate("count", True, count=1)
    ids = torch.tensor([[1, 0]] * 5)
    out = experts(torch.ones(5, 6), ids, torch.tensor([[0.3, 0.7]] * 5))
    assert bool(out.isfinite().all())
    experts.gate = Gate("count", True, count=2)
    assert not bool(experts(torch.ones(5, 6), ids, torch.tensor([[0.3, 0.7]] * 5)).isfinite().any())


def test_what_stays_follows_the_familys_normalisation(tmp_path: Path) -> None:
    """deepseek_v2 does not normalise the weights of the chosen experts; deepseek_v3 does, times a factor."""
    for kind, wanted in (("deepseek_v2", False), ("deepseek_v3", True)):
        path = families.save_tiny(kind, tmp_path / kind, torch.bfloat16)
        (tmp_path / f"{kind}-run").mkdir()
        recipe_path = engine.write_recipe(tmp_path / f"{kind}-run", path, [{"prune.top_k": {"keep": 1}}])
        done = engine.command("run", recipe_path)  # without calibration
        assert done.code == 0, done.err
        block = engine.read_json(tmp_path / f"{kind}-run" / "out" / "config.json")["quantization_config"]
        assert {gate["renormalise"] for gate in block["gates"].values()} == {wanted}


def test_odp_takes_the_layers_whose_gate_costs_least(source: Path, tmp_path: Path) -> None:
    out = run(tmp_path, source, RTN, {"prune.odp": {"layers": 2, "protect": 0}})
    gates = engine.read_json(out / "config.json")["quantization_config"]["gates"]
    assert len(gates) == 2 and all(gate["protect"] == 0 for gate in gates.values())
    with pytest.raises(UnsupportedModel, match=r"prune\.otp"):
        moecompress.load(out, dequantize=True)
    done = engine.command("export", out, "--format", "dense", "--out", tmp_path / "dense")
    assert done.code == 2 and "experts per token" in done.err and not (tmp_path / "dense").exists()


def test_a_broken_gate_is_refused_by_name(outputs: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    from moecompress.stream.model import open_model

    broken = shutil.copytree(outputs["otp"], tmp_path / "broken")
    config = engine.read_json(broken / "config.json")
    name, gate = next(iter(config["quantization_config"]["gates"].items()))
    for key, value, text in (
        ("kind", "mask_ruter", "did you mean 'mask_router'"),
        ("width", 5, "mask_router.*uint8"),
        ("slots", 1, "slots"),
        ("threshold", 1.0, "threshold"),
    ):
        config["quantization_config"]["gates"][name] = gate | {key: value}
        (broken / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=text):
            open_model(broken)


@pytest.mark.parametrize(
    ("passes", "sections", "text"),
    [
        ((RTN, GATES["top_k"]), {"output": {"format": "portable"}}, "no stock loader"),
        ((RTN, GATES["otp"]), {"output": {"format": "dense"}}, "no stock loader"),
        ((RTN, GATES["top_k"], GATES["odp"]), {}, "a second pass of its kind"),
        ((GATES["top_k"], {"prune.random": {"keep": 0.5}}, RTN), {}, "remove experts first"),
        (({"prune.top_k": {"keep": 9}},), {}, "a token has 4 experts"),
        (({"prune.odp": {"layers": 9}},), {}, "the model has 4 with experts"),
        (({"prune.otp": {"target": 0}},), {}, "target"),
        (({"prune.otp": {"start": "weights", "width": 2}},), {}, "needs 3 units"),
    ],
)
def test_what_cannot_be_is_refused_before_the_work(
    passes: Any, sections: Any, text: str, source: Path, tmp_path: Path
) -> None:
    done = engine.command("run", recipe(tmp_path, source, *passes, **sections))
    assert done.code == 2 and text in done.err, done.err
    assert not (tmp_path / "out").exists()


def test_families_without_attention_or_with_scaled_weights_are_told(tmp_path: Path) -> None:
    for kind, step, text in (
        ("qwen3_next", {"prune.odp": {}}, "no softmax attention"),
        ("gemma4_text", {"prune.top_k": {}}, "learned scale of its expert"),
    ):
        path = families.save_tiny(kind, tmp_path / kind, torch.bfloat16)
        (tmp_path / f"{kind}-run").mkdir()
        problems = make_plan(load_recipe(engine.write_recipe(tmp_path / f"{kind}-run", path, [step]))).problems
        assert any(text in problem for problem in problems), problems


def test_a_lower_target_leaves_fewer_experts_and_only_gates_learn(source: Path, tmp_path: Path) -> None:
    shares = []
    for target in (1.0, 0.4):
        keys = {"steps": 30, "batch": 4, "target": target, "learning_rate": 0.05, "penalty_rate": 0.5}
        out = run(tmp_path / str(target), source, RTN, {"prune.otp": keys})
        model: Any = moecompress.load(out, dtype=torch.float32)
        seen = routed(model)
        with torch.no_grad():
            model(input_ids=IDS, use_cache=False)
        shares.append(float(torch.cat([ids.flatten() for calls in seen for ids in calls]).lt(8).float().mean()))
        plan = engine.read_json(out / "moecompress" / "manifest.json")["tensors"]
        assert all(row["action"] in ("copy", "quantize", "drop") for row in plan.values())
    assert shares[0] > 0.9 and shares[1] < shares[0] - 0.2, shares


@pytest.mark.parametrize("target", [0.5, 0.8])
def test_the_target_is_met_whatever_was_learned(target: float, source: Path, tmp_path: Path) -> None:
    """Two steps change nothing that the largest output would show: only the shift meets the target."""
    keys = {"steps": 2, "batch": 2, "target": target}
    for name, more in (("a", {}), ("b", {"start": "weights"}), ("c", {"exact": False})):
        out = run(tmp_path / name, source, RTN, {"prune.otp": {**keys, **more}})
        use = [row["use"] for row in engine.read_json(out / "moecompress" / "report.json")["layers"]]
        share = sum(one["experts"] / one["experts_before"] for one in use) / len(use)
        assert share == pytest.approx(1.0 if name == "c" else target, abs=0.1)  # of other sequences, 24 tokens


def test_keys() -> None:
    assert PruneOTP().units(2) == 16 and PruneOTP().units(4) == 64 and PruneOTP(width=8).units(4) == 8
    assert PruneTopK().keep is None and not PruneTopK().needs_data and PruneOTP().needs_data


def test_a_stored_layer_keeps_its_gate(source: Path, tmp_path: Path) -> None:
    from moecompress.layerstore import load_layer, save_layer
    from moecompress.stream.model import open_model

    original = open_model(source).read_layer(1)
    tensors = mask_router(64, 4, 8, 0.9, torch.Generator().manual_seed(0))
    gate = Gate("mask_router", True, tensors, threshold=0.25, protect=0.1)
    save_layer(tmp_path / "layer.safetensors", original, replace(original, gate=gate))
    found = load_layer(tmp_path / "layer.safetensors", original)
    assert found is not None and found.gate is not None
    assert replace(found.gate, tensors={}) == replace(gate, tensors={})
    assert found.gate.tensors.keys() == tensors.keys()
    assert all(torch.equal(value, tensors[name]) for name, value in found.gate.tensors.items())


def test_quantizers_after_a_gate_see_only_what_is_sent(source: Path, tmp_path: Path) -> None:
    """The reload check inside the run compares the loaded model with the stream that the quantizer saw."""
    out = run(tmp_path, source, {"prune.top_k": {"keep": 1}}, {"quantize.gptq": {"bits": 4, "group_size": 32}})
    report = engine.read_json(out / "moecompress" / "report.json")
    used = [(row["use"]["experts"], row["use"]["experts_before"]) for row in report["layers"]]
    assert all(pair == pytest.approx((1, 4)) for pair in used)
    ratio = [row["use"]["bytes"] / row["use"]["bytes_before"] for row in report["layers"]]
    assert ratio == pytest.approx([(4 + 16 / 32) / 16 / 4] * len(ratio))  # a quarter of the experts at 4.5 of 16 bits
