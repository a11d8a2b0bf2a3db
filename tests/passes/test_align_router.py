"""align.router: planted routers are found again, what is no better is rolled back, and only the router changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engine
import families
import layers
import planted
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

from moecompress.arch.sites import router_matrix
from moecompress.errors import UnsupportedModel
from moecompress.load import load
from moecompress.numerics.activation import rounded_activations
from moecompress.numerics.grids import dequantize
from moecompress.passes.align_router import AlignRouter
from moecompress.passes.prune_frequency import PruneFrequency
from moecompress.passes.quantize_rtn import QuantizeRTN
from moecompress.passes.smooth_awq import SmoothAWQ
from moecompress.plan import cut_sweeps
from moecompress.stream.model import open_model
from moecompress.types import LayerWeights, QuantizedTensor

IDS = engine.random_ids(24, 32)
GATES = {
    "qwen3_moe": "mlp.gate.weight",
    "deepseek_v3": "mlp.gate.weight",
    "afmoe": "mlp.router.gate.weight",
    "gpt_oss": "mlp.router.weight",
    "gemma4_text": "router.proj.weight",
    "inkling_text": "mlp.gate.weight",
    "deepseek_v4": "mlp.gate.weight",
    "phimoe": "mlp.router.weight",
}
METHODS: dict[str, dict[str, Any]] = {"ridge": {}, "topk_mse": {"top": 1.5}}


def noised(value: Tensor, size: float, seed: int = 0) -> Tensor:
    return value + size * torch.randn(value.shape, generator=torch.Generator().manual_seed(seed)).to(value)


def with_noise(weights: LayerWeights, name: str, size: float = 0.1) -> LayerWeights:
    """The layer with another router: matrix and, where there is one, its bias."""
    names = [name] + [n for n in (name.removesuffix("weight") + "bias",) if n in weights.tensors]
    return weights.with_tensors({n: noised(weights.tensors[n], size) for n in names})  # type: ignore[arg-type]


def at_last(model_type: str, folder: Path, dtype: torch.dtype = torch.float32) -> layers.AtLayer:
    path = families.save_tiny(model_type, folder / "model", dtype)
    return layers.at_layer(path, IDS, folder, index=open_model(path).facts.moe_layers[-1].index, batch_tokens=512)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", GATES)
def test_a_perturbed_router_is_found_again(model_type: str, method: Any, tmp_path: Path) -> None:
    """The inputs are those of the original, so the optimum is the original's matrix, bias included."""
    at, name = at_last(model_type, tmp_path), GATES[model_type]
    step = AlignRouter(method=method, strength=1e-5, **METHODS[method])
    wrong = with_noise(at.weights, name)
    decision, after = at.process(step, wrong)
    said = decision.data["router"]
    assert said["accepted"] and said["kl"][1] < 0.01 * said["kl"][0] and said["agreement"][1] > said["agreement"][0]
    for key, value in decision.tensors.items():
        assert engine.difference(value, at.weights.tensors[key]) < 0.02  # type: ignore[arg-type]
    changed = {key for key in after.tensors if after.tensors[key] is not wrong.tensors[key]}
    assert changed == set(decision.tensors) >= {name} and after.experts is wrong.experts


@pytest.mark.parametrize("method", METHODS)
def test_scaled_inputs_have_a_known_optimum(method: Any, tmp_path: Path) -> None:
    """A norm that makes every channel s times larger is answered by a router divided by s."""
    at = at_last("qwen3_moe", tmp_path)
    norm, gate = "post_attention_layernorm.weight", "mlp.gate.weight"
    scale = torch.rand(64, generator=torch.Generator().manual_seed(1)) + 0.5
    before = at.weights.with_tensors({norm: at.weights.tensors[norm] * scale})  # type: ignore[operator]
    decision, _ = at.process(AlignRouter(method=method, strength=1e-6, **METHODS[method]), before)
    wanted = at.weights.tensors[gate] / scale  # type: ignore[operator]
    assert decision.data["router"]["accepted"]
    assert engine.difference(decision.tensors[gate], wanted) < 0.01


def test_equal_streams_keep_the_router(tmp_path: Path) -> None:
    at = at_last("qwen3_moe", tmp_path, torch.bfloat16)
    for method in METHODS:
        before = at.weights
        decision, after = at.process(AlignRouter(method=method), before)  # type: ignore[arg-type]
        said = decision.data["router"]
        assert said["kl"] == [0.0, 0.0] and said["change"] == 0.0 and not said["accepted"]
        assert not decision.tensors and after is before


def test_exact_transforms_before_it_change_nothing(bench_a: Path, tmp_path: Path) -> None:
    """Scales moved from the norm into the router: the targets are outputs, so there is nothing to repair."""
    ids = engine.random_ids(10, 64, vocabulary=4096)
    path = planted.outlier_channels(bench_a, tmp_path / "model", (3, 77), 32.0)
    at = layers.at_layer(path, ids, tmp_path, index=1)
    _, smoothed = at.process(SmoothAWQ(bits=3, group_size=32, experts=False))
    assert smoothed.tensors["mlp.gate.weight"] is not at.weights.tensors["mlp.gate.weight"]
    decision, _ = at.process(AlignRouter(), smoothed)
    assert decision.data["router"]["kl"][0] < 1e-9 and decision.data["router"]["change"] < 1e-3


@pytest.mark.parametrize("method", ["ridge", "kl_logits"])
def test_a_rotated_residual_stream_has_nothing_to_repair(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both streams are in the new basis then, and so is the router that gives the targets."""
    engine.reload_here(monkeypatch)
    path = families.save_tiny("qwen3_moe", tmp_path / "model", torch.float32)
    save_file({"ids": engine.random_ids(16, 24)}, tmp_path / "ids.safetensors")
    calibration = {"source": "tokens", "files": [str(tmp_path / "ids.safetensors")], "samples": 16, "length": 24}
    options = {"steps": 1, "lr": 1e-9} if method == "kl_logits" else {}
    passes: list[Any] = [{"rotate.hadamard": {}}, {"align.router": {"method": method, **options}}]
    done = engine.command("run", engine.write_recipe(tmp_path, path, passes, calibration=calibration))
    assert done.code == 0, done.err
    for row in engine.read_json(tmp_path / "out" / "moecompress" / "report.json")["layers"]:
        said = row["router"]["aligned"][0]
        assert max(said["kl"]) < 1e-8 and min(said["agreement"]) > 0.999 and said["change"] < 1e-3
        assert said["loss"] is None or said["loss"][0] < 1e-6


def drifted(at: layers.AtLayer, sequences: Any, size: float) -> None:
    """Noise in the compressed stream of these sequences."""
    store = at.run.store("compressed", at.index)
    for row in sequences:
        store.write(row, noised(store.read(row, row + 1), size, row))


def tilted(at: layers.AtLayer) -> None:
    """The compressed stream with other sizes of its channels: a drift that a router can answer."""
    store = at.run.store("compressed", at.index)
    store.write(0, store.read(0, 24) * (1 + 0.5 * torch.rand(64, generator=torch.Generator().manual_seed(2))))


def test_what_is_worse_on_judging_tokens_is_rolled_back(tmp_path: Path) -> None:
    at = at_last("qwen3_moe", tmp_path)
    drifted(at, (row for row in range(24) if row % 8), 1.0)  # the judging sequences have not drifted
    before = at.weights
    decision, after = at.process(AlignRouter(), before)
    said = decision.data["router"]
    assert not said["accepted"] and said["kl"][1] > said["kl"][0] and said["change"] > 0
    assert not decision.tensors and after is before


def test_a_gain_can_be_demanded(tmp_path: Path) -> None:
    at = at_last("qwen3_moe", tmp_path)
    tilted(at)
    decision, _ = at.process(AlignRouter(strength=0.1))
    before, after = decision.data["router"]["kl"]
    assert decision.data["router"]["accepted"] and 0 < after < before
    for share, accepted in ((0.99 * (1 - after / before), True), (1.01 * (1 - after / before), False)):
        assert at.process(AlignRouter(strength=0.1, min_gain=share))[0].data["router"]["accepted"] is accepted


def test_a_decision_replays(tmp_path: Path) -> None:
    at = at_last("gpt_oss", tmp_path, torch.bfloat16)
    tilted(at)
    decision, first = at.process(AlignRouter(strength=0.1))
    assert decision.tensors
    _, again = at.process(AlignRouter(), decision=decision)
    assert engine.same_layer(first, again) and all(v.dtype == torch.bfloat16 for v in decision.tensors.values())


def test_rows_of_the_experts_that_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After pruning the targets are the original outputs of the kept experts."""
    engine.reload_here(monkeypatch)
    path = families.save_tiny("qwen3_moe", tmp_path / "model", torch.float32)
    save_file({"ids": IDS}, tmp_path / "ids.safetensors")
    calibration = {"source": "tokens", "files": [str(tmp_path / "ids.safetensors")], "samples": 24, "length": 32}
    passes: list[Any] = [{"prune.frequency": {"keep": 0.5}}, {"align.router": {}}]
    done = engine.command("run", engine.write_recipe(tmp_path, path, passes, calibration=calibration))
    assert done.code == 0, done.err
    rows = engine.read_json(tmp_path / "out" / "moecompress" / "report.json")["layers"]
    said = [row["router"]["aligned"][0] for row in rows]
    assert said[0]["kl"][0] < 1e-12 and not said[0]["accepted"]  # what the first router reads has not changed
    assert any(one["accepted"] for one in said[1:]) and all(0 < one["agreement"][1] < 1 for one in said[1:])
    assert open_model(tmp_path / "out").read_layer(3).tensors["mlp.gate.weight"].shape == (4, 64)


def test_in_the_quantizers_loop_it_brings_tokens_back(
    bench_a: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two bits lead tokens astray; on held-out tokens every accepted router sends more of them the old way."""
    engine.reload_here(monkeypatch)
    source = {"source": "manifest", "manifest": "python-stdlib", "samples": 24, "length": 128, "heldout": 0.2}
    agreement = {}
    for name, first in {"plain": [], "aligned": [{"align.router": {}}]}.items():
        folder = tmp_path / name
        folder.mkdir()
        passes = [*first, {"quantize.rtn": {"bits": 2, "group_size": 32}}]
        done = engine.command("run", engine.write_recipe(folder, bench_a, passes, calibration=source))
        assert done.code == 0, done.err
        rows = engine.read_json(folder / "out" / "moecompress" / "report.json")["layers"]
        agreement[name] = [row["router"]["topk_agreement"] for row in rows]
        said = [one for row in rows for one in row["router"]["aligned"]]
        assert len(said) == (len(rows) if first else 0)
        assert all(one["judged_on"] == "held-out sequences" for one in said)
        assert [one["accepted"] for one in said] in ([], [False, True, True, True])  # nothing is lost before layer 0
        assert all(one["kl"][1] < one["kl"][0] for one in said if one["accepted"])
    assert all(a >= b for a, b in zip(agreement["aligned"], agreement["plain"], strict=True))
    assert sum(agreement["aligned"]) > sum(agreement["plain"]) + 0.02
    with torch.no_grad():
        assert bool(torch.isfinite(load(tmp_path / "aligned" / "out")(input_ids=IDS[:2]).logits).all())


def test_the_routing_after_it_is_what_later_statistics_see(tmp_path: Path) -> None:
    """Pruning by frequency after an alignment counts with the aligned router."""
    at = at_last("qwen3_moe", tmp_path)
    wrong = with_noise(at.weights, "mlp.gate.weight", 1.0)
    _, right = at.process(AlignRouter(strength=1e-5), wrong)
    step = PruneFrequency(keep=0.5)
    kept = {name: at.process(step, w)[0].data["kept"] for name, w in (("wrong", wrong), ("right", right))}
    assert kept["right"] == at.process(step)[0].data["kept"] != kept["wrong"]
    assert AlignRouter().changes == {"router"} and all("router" in item.depends_on for item in step.needs())


def test_options_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="top: method ridge has no such option"):
        AlignRouter(top=3)
    path = families.save_tiny("qwen3_moe", tmp_path / "model")
    facts = open_model(path).facts
    assert AlignRouter().check(facts) == [] and AlignRouter().needs_data
    assert AlignRouter(method="topk_mse").statistics_bytes(facts.layers[1]) > AlignRouter().statistics_bytes(
        facts.layers[1]
    )
    done = engine.command("plan", engine.write_recipe(tmp_path, path, [{"align.router": {}}]))
    assert done.code == 2 and "needs data" in done.out + done.err
    assert QuantizeRTN(bits=2).decides is QuantizeRTN(bits=2).scope


def source(model_type: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """A tiny checkpoint in `folder`, and a recipe's calibration with IDS."""
    save_file({"ids": IDS}, folder / "ids.safetensors")
    calibration = {"source": "tokens", "files": [str(folder / "ids.safetensors")], "samples": 24, "length": 32}
    return families.save_tiny(model_type, folder / "model"), calibration


CODED = ("qwen3_moe", "gpt_oss", "deepseek_v3", "hunyuan_v1_moe", "phimoe")


@pytest.mark.parametrize("model_type", CODED)
def test_a_router_in_codes_is_stored_and_loaded(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kl_clip: 8-bit rows in native records; transformers' own router reads what the stream reads."""
    engine.reload_here(monkeypatch)
    path, calibration = source(model_type, tmp_path)
    passes = [{"align.router": {"method": "kl_clip", "router_bits": 8}}, {"quantize.rtn": {"group_size": 16}}]
    recipe = engine.write_recipe(tmp_path, path, passes, calibration=calibration)
    refused = engine.command("plan", recipe, "--set", "output.format=portable")
    assert refused.code == 2 and "zero points" in refused.out + refused.err
    done = engine.command("run", recipe)
    assert done.code == 0, done.err
    out, layer = tmp_path / "out", open_model(path).facts.moe_layers[-1]
    found = router_matrix(layer)
    assert found is not None
    stored = open_model(out).read_layer(layer.index).tensors[found[0]]
    assert isinstance(stored, QuantizedTensor) and stored.scheme.bits == 8 and stored.zeros is not None
    model = load(out, dtype=torch.float32)
    module = model.get_submodule(f"{layer.name}.{found[0].removesuffix('.weight')}")
    assert "weight" not in dict(module.named_parameters(recurse=False)) and torch.equal(
        module.weight, dequantize(stored)
    )
    ids = IDS[:2, :16]
    with torch.no_grad():
        packed = model(input_ids=ids, use_cache=False).logits
        dense = load(out, dequantize=True, dtype=torch.float32)(input_ids=ids, use_cache=False).logits
    assert engine.difference(packed, engine.streamed_logits(open_model(out), ids, tmp_path / "stream")) < 1e-4
    assert engine.difference(dense, packed) < 1e-4
    lossy = engine.command("export", out, "--format", "portable", "--allow-lossy", "--out", tmp_path / "portable")
    assert lossy.code == 2 and "routers have codes, which only native outputs can say" in lossy.err
    said = [row["router"]["aligned"][0] for row in engine.read_json(out / "moecompress" / "report.json")["layers"]]
    assert all(one["method"] == "kl_clip" and 0 < one["change"] < 0.02 for one in said)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "hunyuan_v1_moe"])
def test_a_router_with_rounded_inputs_is_run_so(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EAQuant's W8A8 router: stream and loaded model round what its matrix reads, and nobody drops that."""
    engine.reload_here(monkeypatch)
    path, calibration = source(model_type, tmp_path)
    step = {"align.router": {"method": "kl_clip", "router_bits": 8, "activation_bits": 8}}
    recipe = engine.write_recipe(tmp_path, path, [step], calibration=calibration)
    refused = engine.command("plan", recipe, "--set", "output.format=dense")
    assert refused.code == 2 and "dense" in refused.out + refused.err
    done = engine.command("run", recipe)
    assert done.code == 0, done.err
    out, layer = tmp_path / "out", open_model(path).facts.moe_layers[-1]
    name, bias_name = router_matrix(layer) or ("", None)
    tensors = open_model(out).read_layer(layer.index).tensors
    stored = tensors[name]
    assert isinstance(stored, QuantizedTensor) and stored.scheme.activation == "int8"
    model = load(out, dtype=torch.float32)
    module = model.get_submodule(f"{layer.name}.{name.removesuffix('.weight')}")
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(3)) * torch.logspace(0, 2, 64)
    bias = None if bias_name is None else tensors[bias_name].float()  # type: ignore[union-attr]
    with torch.no_grad():
        made = module(x)
        made = made[0] if isinstance(made, tuple) else made
        rounded, plain = (
            torch.nn.functional.linear(v, dequantize(stored), bias) for v in (rounded_activations(x, 8), x)
        )
        ids = IDS[:2, :16]
        packed = model(input_ids=ids, use_cache=False).logits
    assert engine.difference(made, rounded) < 1e-6 < 1e-4 < engine.difference(made, plain)
    assert engine.difference(packed, engine.streamed_logits(open_model(out), ids, tmp_path / "stream")) < 1e-4
    with pytest.raises(UnsupportedModel, match="inputs are rounded to int8"):
        load(out, dequantize=True)
    lossy = engine.command("export", out, "--format", "portable", "--allow-lossy", "--out", tmp_path / "portable")
    assert lossy.code == 2


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Reports of `half of the experts gone, then this end-to-end tuning`."""
    folder, reports = tmp_path_factory.mktemp("tuned"), {}
    path = families.save_tiny("qwen3_moe", folder / "model")
    save_file({"ids": engine.random_ids(16, 24, vocabulary=20)}, folder / "ids.safetensors")
    calibration = {"source": "tokens", "files": [str(folder / "ids.safetensors")], "samples": 16, "length": 24}
    with pytest.MonkeyPatch.context() as patch:
        engine.reload_here(patch)
        for method in ("lm_ce", "kl_logits"):
            (folder / method).mkdir()
            step = {"align.router": {"method": method, "steps": 15, "lr": 3e-3, "batch": 4}}
            passes: list[Any] = [{"prune.frequency": {"keep": 0.5}}, step]
            done = engine.command("run", engine.write_recipe(folder / method, path, passes, calibration=calibration))
            assert done.code == 0, done.err
            reports[method] = engine.read_json(folder / method / "out" / "moecompress" / "report.json")
    return {"folder": folder, "source": path, **reports}


@pytest.mark.parametrize("method", ["lm_ce", "kl_logits"])
def test_end_to_end_tuning_lowers_the_held_out_loss_with_routers_alone(method: str, tuned: dict[str, Any]) -> None:
    said = [row["router"]["aligned"][0] for row in tuned[method]["layers"]]
    assert len({tuple(one["loss"]) for one in said}) == 1 and said[0]["loss"][1] < said[0]["loss"][0]
    assert said[0]["loss"][1] > 0 and all(one["accepted"] and one["change"] > 0 for one in said)
    assert said[0]["kl"][0] == pytest.approx(0, abs=1e-9) and all(one["kl"][0] > 0 for one in said[1:])
    assert all(0 < value < 1 for one in said for value in one["agreement"])
    source, out = open_model(tuned["source"]), open_model(tuned["folder"] / method / "out")
    for index in range(4):
        before, after = source.read_layer(index).tensors, out.read_layer(index).tensors
        changed = {name for name in before if not torch.equal(before[name], after[name])}  # type: ignore[arg-type]
        assert changed == {"mlp.gate.weight"}
        own = {source.read_layer(index).experts[i].down.sum().item() for i in range(8)}  # type: ignore[union-attr]
        assert all(expert.down.sum().item() in own for expert in out.read_layer(index).experts)  # type: ignore[union-attr]
    assert cut_sweeps((QuantizeRTN(bits=2), AlignRouter(method=method)))[0].barrier == 1  # type: ignore[arg-type]


def test_combinations_that_cannot_be_are_refused(tmp_path: Path) -> None:
    for options, reason in (
        ({"method": "kl_clip"}, "add router_bits: 8"),
        ({"router_bits": 8}, "router_bits: method ridge"),
        ({"activation_bits": 8}, "activation_bits: method ridge"),
        ({"method": "ridge", "lr": 0.1}, "lr: method ridge"),
        ({"method": "lm_ce", "teacher_tokens": 3}, "belongs to kl_logits"),
    ):
        with pytest.raises(ValidationError, match=reason):
            AlignRouter(**options)  # type: ignore[arg-type]
    coded = [{"align.router": {"method": "kl_clip", "router_bits": 8}}, {"prune.random": {"keep": 0.5}}]
    plain = families.save_tiny("qwen3_moe", tmp_path / "plain")
    told = engine.command("plan", engine.write_recipe(tmp_path, plain, coded))
    assert told.code == 2 and "align.router before it gives codes to the routers. Next: put prune.random" in told.out
    path = families.save_tiny("mixtral", tmp_path / "model", num_experts_per_tok=1)
    facts = open_model(path).facts
    assert "no gradient reaches the router" in AlignRouter(method="lm_ce").check(facts)[0]
    assert AlignRouter().check(facts) == []
