"""rotate.duquant: exact on every family, through native files and loaded models; planted outliers stop hurting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import engine
import exact
import families
import layers
import planted
import pytest
import torch
from safetensors.torch import load_file, save_file

from moecompress.errors import CheckpointError, RecipeError
from moecompress.layerstore import load_layer, save_layer
from moecompress.load import load
from moecompress.numerics.turn import turn_matrix, turned
from moecompress.passes.quantize_gptq import QuantizeGPTQ
from moecompress.passes.quantize_rtn import QuantizeRTN
from moecompress.passes.rotate_duquant import RotateDuQuant
from moecompress.stream.model import open_model
from moecompress.types import Turn

IDS = engine.random_ids(4, 24)
TURN = {"block": 16, "steps": 8}


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Of the median token: a tie in the router broken the other way moves single tokens."""
    return float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median())


@pytest.mark.parametrize("model_type", engine.STREAMED)
def test_every_family_keeps_its_output(model_type: str, tmp_path: Path) -> None:
    """Turned experts in the streamed layer against plain ones, and the turned matrices in float64."""
    path = families.save_tiny(model_type, tmp_path / "model", torch.float32)
    index = open_model(path).facts.moe_layers[-1].index
    at = layers.at_layer(path, IDS, tmp_path, index=index)
    step = RotateDuQuant(**TURN)
    assert step.check(at.model.facts) == []
    decision, after = at.process(step)
    assert at.error(after) < 1e-10
    assert len({id(expert.gate_up_turn) for expert in after.experts}) == len(after.experts)
    wide = exact.widened(at.weights)
    expert, turn = wide.experts[1], after.experts[1].down_turn
    assert isinstance(expert.down, torch.Tensor) and turn is not None
    x = torch.randn(5, expert.down.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exactly = Turn(*(_orthogonal(part) for part in (turn.first,)), turn.order, _orthogonal(turn.second))
    found = turned(x, exactly) @ turned(expert.down, exactly).t()
    torch.testing.assert_close(found, x @ expert.down.t(), rtol=1e-10, atol=1e-10)
    back = step.restored(at.model.facts.layers[index], decision, 1, after.experts[1])
    torch.testing.assert_close(back.down, at.weights.experts[1].down, rtol=1e-4, atol=1e-5)


def _orthogonal(rotation: Any) -> torch.Tensor:
    """The same rotation to float64's precision: what is stored is rounded to float32."""
    u, _, v = torch.linalg.svd(rotation.double())
    return u @ v


def recipe(folder: Path, source: Path, *passes: Any, **output: Any) -> Path:
    folder.mkdir()
    tokens = folder / "ids.safetensors"
    save_file({"input_ids": engine.random_ids(8, 32).int()}, tokens)
    calibration = {"source": "tokens", "files": [str(tokens)], "samples": 8, "length": 32}
    return engine.write_recipe(folder, source, list(passes), calibration=calibration, output=output or {})


def run(folder: Path, source: Path, *passes: Any, **output: Any) -> Path:
    done = engine.command("run", recipe(folder, source, *passes, **output))
    assert done.code == 0, done.err
    return folder / "out"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits.float()


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "nemotron_h", "deepseek_v3"])
@pytest.mark.parametrize("share", ["expert", "layer"])
def test_native_files_and_loaded_models(
    model_type: str, share: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 bits in a turned basis: the loaded model is near the source, can be saved and loaded, and comes back dense."""
    engine.reload_here(monkeypatch)
    source = families.save_tiny(model_type, tmp_path / "model", torch.float32)
    rtn = {"quantize.rtn": {"bits": 8, "group_size": -1}}
    out = run(tmp_path / "run", source, {"rotate.duquant": {**TURN, "share": share}}, rtn)
    block = engine.read_json(out / "config.json")["quantization_config"]
    turns = [turn for module in block["experts"].values() for turn in module["turns"].values()]
    assert {turn["count"] for turn in turns} == {8 if share == "expert" else 1} and len(turns) % 2 == 0
    model = load(out)
    found, wanted = logits(model), engine.own_logits(source, IDS)
    assert difference(found, wanted) < 0.05
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), found)
    assert difference(logits(load(out, dequantize=True)), found) < 1e-4
    streamed = engine.streamed_logits(open_model(out), IDS, tmp_path / "hidden")
    assert difference(streamed, found) < 1e-5
    half = load(out, dtype=torch.bfloat16)
    leaf = next(p for name, p in half.named_parameters() if name.endswith("turn_down_first"))
    assert leaf.dtype == torch.uint8  # no loader rounds a rotation
    assert difference(logits(half), found) < 0.1


def test_dense_output_is_turned_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.reload_here(monkeypatch)
    source = families.save_tiny("qwen3_moe", tmp_path / "model", torch.float32)
    passes = ({"rotate.duquant": TURN}, {"quantize.rtn": {"bits": 4, "group_size": 16}})
    made = {kind: run(tmp_path / kind, source, *passes, format=kind) for kind in ("native", "dense")}
    dense = logits(engine.own_model(made["dense"]))
    assert difference(dense, logits(load(made["native"]))) < 1e-4
    done = engine.command("export", made["native"], "--format", "dense", "--out", tmp_path / "exported")
    assert done.code == 0, done.err
    assert difference(logits(engine.own_model(tmp_path / "exported")), dense) < 1e-4
    done = engine.command("export", made["native"], "--format", "portable", "--out", tmp_path / "no")
    assert done.code == 2 and "turn their inputs" in done.err


def test_w4a4_is_really_rounded_after_turning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reload check compares the loaded model with the streamed one; activations at 4 bits change the result."""
    engine.reload_here(monkeypatch)
    source = families.save_tiny("qwen2_moe", tmp_path / "model", torch.float32)
    made = {}
    for bits in (4, None):
        rounding = {} if bits is None else {"activation_bits": bits}
        step = {"quantize.gptq": {"bits": 4, "group_size": -1, "min_tokens": 0, **rounding}}
        made[bits] = logits(load(run(tmp_path / str(bits), source, {"rotate.duquant": TURN}, step)))
    assert difference(made[4], made[None]) > 0.01


def test_what_does_not_understand_turns_is_refused_by_plan(tmp_path: Path) -> None:
    source = families.save_tiny("qwen3_moe", tmp_path / "model")
    awq = {"smooth.awq": {"group_size": 16}}
    rtn = {"quantize.rtn": {"bits": 4, "group_size": 16}}
    done = engine.command("plan", recipe(tmp_path / "a", source, {"rotate.duquant": TURN}, awq, rtn))
    assert done.code == 2 and "put it before rotate.duquant" in done.out + done.err
    done = engine.command("plan", recipe(tmp_path / "b", source, {"rotate.duquant": TURN}, rtn, format="portable"))
    assert done.code == 2 and "turn their inputs while they run" in done.out + done.err
    done = engine.command("plan", recipe(tmp_path / "c", source, {"rotate.duquant": {"block": 24}}, rtn))
    wanted = "block 24 does not divide the 64 inputs of gate_up, 32 inputs of down (works: 16, 32)"
    assert done.code == 2 and wanted in done.out + done.err


@pytest.fixture(scope="module")
def outliers(bench_a: Path, tmp_path_factory: pytest.TempPathFactory) -> layers.AtLayer:
    folder = tmp_path_factory.mktemp("outliers")
    path = planted.outlier_channels(bench_a, folder / "model", (3, 77), 32.0)
    return layers.at_layer(path, engine.random_ids(8, 96, vocabulary=4096), folder, index=1)


def test_planted_outlier_channels_stop_hurting(outliers: layers.AtLayer) -> None:
    """Peaks fall, and 4-bit inputs lose less; more with the permutation than without."""
    step = QuantizeRTN(bits=8, group_size=-1, activation_bits=4)
    plain = outliers.error(outliers.process(step)[1])
    errors = {}
    for permute in (False, True):
        decision, after = outliers.process(RotateDuQuant(block=32, steps=64, permute=permute))
        assert all(peaks[-1] < peaks[0] / 2 for peaks in decision.data["peaks"]["gate_up"])
        errors[permute] = outliers.error(outliers.process(step, after)[1])
    assert errors[True] < errors[False] < plain / 2


def test_gptq_sees_what_turned_experts_receive(outliers: layers.AtLayer) -> None:
    _, after = outliers.process(RotateDuQuant(block=32, steps=16))
    options = {"bits": 3, "group_size": 32, "min_tokens": 0}
    errors = [outliers.error(outliers.process(kind(**options), after)[1]) for kind in (_rtn, QuantizeGPTQ)]
    assert errors[1] < 0.8 * errors[0]


def _rtn(min_tokens: int, **options: Any) -> QuantizeRTN:
    return QuantizeRTN(**options)


def test_a_thin_expert_with_a_basis_of_its_own_is_rounded_to_nearest(outliers: layers.AtLayer) -> None:
    _, after = outliers.process(RotateDuQuant(block=32, steps=4))
    decision, _ = outliers.process(QuantizeGPTQ(bits=4, group_size=32, min_tokens=10**6), after)
    assert {note["fallback"] for note in decision.data["experts"].values()} == {"rtn"}


def test_a_decision_is_replayed_and_a_kept_layer_read_back(outliers: layers.AtLayer, tmp_path: Path) -> None:
    step = RotateDuQuant(block=32, steps=8, share="layer")
    decision, after = outliers.process(step)
    _, again = outliers.process(step, decision=decision)
    assert engine.same_layer(_plain(after), _plain(again))
    save_layer(tmp_path / "kept.safetensors", outliers.weights, after)
    kept = load_layer(tmp_path / "kept.safetensors", outliers.weights)
    assert kept is not None and engine.same_layer(_plain(kept), _plain(after))
    assert len({id(expert.down_turn) for expert in kept.experts}) == 1
    assert torch.equal(turn_matrix(kept.experts[3].down_turn, 128), turn_matrix(after.experts[0].down_turn, 128))  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="turned already"):
        outliers.process(step, after)


def _plain(weights: Any) -> Any:
    """The layer's matrices as they are stored, without turns."""
    experts = tuple(e.with_turn("gate_up", None).with_turn("down", None) for e in weights.experts)
    return weights.with_experts(experts)


@pytest.mark.parametrize(("leaf", "text"), [("first", "is no rotation"), ("order", "is no permutation")])
def test_damaged_turns_are_refused_at_load(
    leaf: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.reload_here(monkeypatch)
    source = families.save_tiny("mixtral", tmp_path / "model", torch.float32)
    rtn = {"quantize.rtn": {"bits": 4, "group_size": 16}}
    out = run(tmp_path / "run", source, {"rotate.duquant": TURN}, rtn)
    (file,) = [f for f in out.glob("*.safetensors") if any("layers.1.mlp.experts" in name for name in load_file(f))]
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(f"turn_down_{leaf}"))
    tensors[name].fill_(1)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=text):
        load(out)
    config = json.loads((out / "config.json").read_text())
    for module in config["quantization_config"]["experts"].values():
        module["turns"]["down"]["block"] = 5
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="blocks of 5 in 48 columns"):
        load(out)
