"""rotate.hadamard: the same logits in float64 on every family whose residual stream turns; else the plan says why."""

from __future__ import annotations

import re
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
from torch import Tensor

from moecompress.errors import UnsupportedModel
from moecompress.load import load
from moecompress.numerics.hadamard import random_signs, rotated
from moecompress.passes.rotate_hadamard import RotateHadamard
from moecompress.plan import make_plan
from moecompress.recipe import load_recipe
from moecompress.stream.model import StreamModel, open_model
from moecompress.stream.rebase import find_outer, rotated_outer
from moecompress.stream.residual import find_residual, rotated_layer

IDS = engine.random_ids(4, 24)
RTN8 = {"quantize.rtn": {"bits": 8, "group_size": -1}}
REFUSED = {  # families, with the reason
    "afmoe": "applied to what is added",
    "axk1": "applied to what is added",
    "axk2": "changes what the layer computes",
    "beam": "applied to what is added",
    "cohere2_moe": "changes what the layer computes",  # a norm that subtracts the mean
    "deepseek_v4": "the residual stream has the shape",
    "flex_olmo": "applied to what is added",
    "gemma4_text": "applied to what is added",
    "inkling2_text": "nothing is seen",
    "inkling_text": "nothing is seen",
    "kolibri1": "applied to what is added",
    "minimax": "changes what the layer computes",  # the residual is what the norm made
    "phimoe": "subtracts a mean",
    "qwen3_vl_moe": "more than a norm takes part",
    "qwen4_exp_text": "nothing is seen",
}


def rotate_of(model: StreamModel) -> Any:
    signs = random_signs(model.facts.hidden_size, torch.Generator().manual_seed(0))
    return lambda x: rotated(x, model.facts.hidden_size, signs)


def problems(path: Path, folder: Path, *passes: Any) -> str:
    recipe = engine.write_recipe(folder, path, [*passes, RTN8], output={"format": "native"})
    return "\n".join(make_plan(load_recipe(recipe)).problems)


@pytest.mark.parametrize("model_type", engine.STREAMED)
def test_every_family_keeps_its_logits_or_says_why(model_type: str, tmp_path: Path) -> None:
    """Every layer, the embedding, the final norm and the head rotated in float64: the same logits to 1e-10."""
    path = families.save_tiny(model_type, tmp_path / "model", torch.float32)
    told = problems(path, tmp_path, {"rotate.hadamard": {}})
    if model_type in REFUSED:
        assert re.search(REFUSED[model_type], told) and "use rotate.duquant, or leave the pass out" in told
        return
    assert told == ""
    model, own = open_model(path), exact.double_model(path)
    wanted, rotate = exact.double_logits(own, IDS), rotate_of(model)
    run = engine.token_run(model, IDS[:2, :12], tmp_path)
    for facts in model.facts.layers:
        weights = model.read_layer(facts.index)
        hidden = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(facts.index))
        found = find_residual(model, weights, run.calls[0][facts.index], hidden, rotate)
        exact.load_into(own.get_submodule(facts.name), facts.site, rotated_layer(exact.widened(weights), found, rotate))
    outer = find_outer(model)
    norm = model.read_outer(outer.norm).double() + outer.offset
    assert set(rotated_outer(model, rotate)) == {outer.embedding, outer.norm, outer.head}  # and proved there
    exact.load_outer(
        own,
        {
            outer.embedding: rotate(model.read_outer(outer.embedding).double()),
            outer.norm: torch.full_like(norm, 1 - outer.offset),
            outer.head: rotate(model.read_outer(outer.head).double() * norm),
        },
    )
    assert engine.difference(exact.double_logits(own, IDS), wanted) < 1e-10


def run(folder: Path, source: Path, *passes: Any, calibrated: bool = False, **sections: Any) -> Path:
    folder.mkdir()
    if calibrated:
        save_file({"input_ids": engine.random_ids(8, 32).int()}, folder / "ids.safetensors")
        files = [str(folder / "ids.safetensors")]
        sections["calibration"] = {"source": "tokens", "files": files, "samples": 8, "length": 32}
    done = engine.command("run", engine.write_recipe(folder, source, list(passes), **sections))
    assert done.code == 0, done.err
    return folder / "out"


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float()


def difference(found: Tensor, wanted: Tensor) -> float:
    return float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median())


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_next", "granitemoe", "nemotron_h", "gpt_oss", "deepseek_v3"])
def test_a_rotated_checkpoint_is_an_ordinary_one(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is rounded but the float32 of the source, and transformers alone runs the dense result."""
    engine.reload_here(monkeypatch)
    source = families.save_tiny(model_type, tmp_path / "model", torch.float32)
    out = run(tmp_path / "run", source, {"rotate.hadamard": {"seed": 3}}, output={"format": "dense"})
    assert difference(logits(engine.own_model(out)), engine.own_logits(source, IDS)) < 1e-4
    manifest = engine.read_json(out / "moecompress" / "manifest.json")["tensors"]
    embedding = next(name for name in manifest if "embed" in name)
    assert manifest[embedding]["action"] == "rewrite"
    before, after = (load_file(next(p.glob("model*.safetensors"))) for p in (source, source))
    assert before.keys() == after.keys()


def test_a_shared_head_comes_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bench-a's head is its embedding; after the rotation it is not, config.json says so, and generation goes on."""
    engine.reload_here(monkeypatch)
    source = families.save_tiny("qwen3_moe", tmp_path / "model", torch.float32, tie_word_embeddings=True)
    assert open_model(source).tied
    out = run(tmp_path / "run", source, {"rotate.hadamard": {}}, RTN8, output={"format": "native"})
    assert engine.read_json(out / "config.json")["tie_word_embeddings"] is False
    manifest = engine.read_json(out / "moecompress" / "manifest.json")["tensors"]
    assert manifest["model.embed_tokens.weight"]["outputs"] == ["model.embed_tokens.weight", "lm_head.weight"]
    model = load(out)
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    assert difference(logits(model), engine.own_logits(source, IDS)) < 0.05
    with torch.no_grad():
        new = model.generate(IDS[:1], max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    assert new.shape == (1, 28)


@pytest.mark.parametrize("activations", [None, 4])
def test_an_online_rotation_before_down(
    activations: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept in native files, executed alike by the streamed run (reload check), the loaded model and a saved copy."""
    engine.reload_here(monkeypatch)
    source = families.save_tiny("qwen2_moe", tmp_path / "model", torch.float32)
    rounding = {} if activations is None else {"activation_bits": activations}
    rtn = {"quantize.rtn": {"bits": 8, "group_size": -1, **rounding}}
    out = run(tmp_path / "run", source, {"rotate.hadamard": {"down_block": 16}}, rtn)
    block = engine.read_json(out / "config.json")["quantization_config"]
    kept = {"block": 16, "columns": 32, "count": 1, "order": False, "second": False}
    assert all(module["turns"] == {"down": {**kept, "columns": m}} for m, module in _columns(block))
    model = load(out)
    found = logits(model)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), found)
    if activations is None:
        assert difference(found, engine.own_logits(source, IDS)) < 0.05
        assert difference(logits(load(out, dequantize=True)), found) < 1e-4
    streamed = engine.streamed_logits(open_model(out), IDS, tmp_path / "hidden")
    assert difference(streamed, found) < 1e-4


def test_planted_outlier_channels_stop_hurting(bench_a: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales of the norm go into what reads it and channels are mixed: 4-bit inputs of the experts lose less."""
    engine.reload_here(monkeypatch)
    source = planted.outlier_channels(bench_a, tmp_path / "model", (3, 77), 32.0)
    rtn = {"quantize.rtn": {"bits": 8, "group_size": -1, "activation_bits": 4}}
    save_file({"ids": engine.random_ids(8, 64, vocabulary=4096)}, tmp_path / "ids.safetensors")
    errors = {}
    for name, first in (("plain", []), ("rotated", [{"rotate.hadamard": {}}])):
        (tmp_path / name).mkdir()
        calibration = {"source": "tokens", "files": [str(tmp_path / "ids.safetensors")], "samples": 8, "length": 64}
        recipe = engine.write_recipe(tmp_path / name, source, [*first, rtn], calibration=calibration)
        done = engine.command("run", recipe)
        assert done.code == 0, done.err
        report = engine.read_json(tmp_path / name / "out" / "moecompress" / "report.json")
        errors[name] = [layer["output_error"] for layer in report["layers"]]
    assert all(b < a / 2 for a, b in zip(errors["plain"], errors["rotated"], strict=True)), errors


def _columns(block: Any) -> list[tuple[int, Any]]:
    layouts = block["layouts"]
    return [(layouts[m["records"][0]]["matrices"]["down"]["shape"][1], m) for m in block["experts"].values()]


@pytest.mark.parametrize(
    "step",
    [
        {"quantize.gptq": {"bits": 4, "group_size": 16, "target_inputs": "original", "min_tokens": 0}},
        {"quantize.learned": {"bits": 4, "group_size": 16, "steps": 20, "samples": 128, "min_tokens": 0}},
        {"smooth.awq": {"group_size": 16}},
        {"prune.reap": {"keep": 0.5}},
    ],
)
def test_passes_after_it_work_in_the_new_basis(
    step: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both streams are in it: errors of layers are as small as without a rotation, or the basis would be mixed up."""
    engine.reload_here(monkeypatch)
    source = families.save_tiny("qwen3_moe", tmp_path / "model", torch.float32)
    last = [] if next(iter(step)).startswith("quantize") else [RTN8]
    made = {}
    for name, first in (("plain", []), ("rotated", [{"rotate.hadamard": {}}])):
        out = run(tmp_path / name, source, *first, step, *last, calibrated=True, output={"format": "native"})
        report = engine.read_json(out / "moecompress" / "report.json")
        made[name] = [layer["output_error"] for layer in report["layers"]]
    assert all(0 < b < 2 * a + 1e-2 for a, b in zip(made["plain"], made["rotated"], strict=True)), made


def test_order_and_blocks_are_checked_by_plan(tmp_path: Path) -> None:
    source = families.save_tiny("qwen3_moe", tmp_path / "model")
    told = problems(source, tmp_path, {"prune.score": {"keep": 0.5}}, {"rotate.hadamard": {}})
    assert "rotate.hadamard: comes after another pass, which knew the old basis. Next: put it first" in told
    told = problems(source, tmp_path, {"rotate.hadamard": {"block": 48, "down_block": 24}})
    assert "block 48 does not rotate 64 channels (works: 2, 4, 8, 16, 32, 64)" in told
    assert "down_block 24 does not rotate 32 channels" in told


def test_the_layer_itself_refuses_what_only_values_tell(tmp_path: Path) -> None:
    """A layer whose norm is not of the residual stream alone: the trial run finds it whatever the plan thought."""
    path = families.save_tiny("minimax", tmp_path / "model", torch.float32)
    at = layers.at_layer(path, IDS, tmp_path)
    with pytest.raises(UnsupportedModel, match="rotation of the residual stream"):
        at.process(RotateHadamard())
