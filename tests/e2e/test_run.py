"""Whole runs: a checkpoint in, a smaller one out, that loads, computes the same, and accounts for every tensor."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import engine
import families
import pytest
import torch
from safetensors.torch import load_file, save_file

from moecompress.checkpoint.index import open_index
from moecompress.checkpoint.reader import TensorReader
from moecompress.inspect import verify_dir
from moecompress.load import load
from moecompress.stream.model import open_model

IDS = engine.random_ids(2, 24)
RTN = [{"quantize.rtn": {"bits": 4, "group_size": 16}}]


def execute(folder: Path, model: Path, passes: Any = None, **sections: Any) -> Path:
    """Run a recipe by the command line; the output directory."""
    done = engine.command("run", engine.write_recipe(folder, model, passes or RTN, **sections))
    assert done.code == 0, done.err
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith("out")) == ["out"]
    return folder / "out"


def sha256(root: Path) -> dict[str, str]:
    """Digest of every stored tensor."""
    found = {}
    with TensorReader(open_index(root)) as reader:
        for name in open_index(root).tensors:
            digest = hashlib.sha256()
            for chunk in reader.chunks(name):
                digest.update(chunk)
            found[name] = digest.hexdigest()
    return found


def assert_accounted(source: Path, out: Path) -> dict[str, Any]:
    """The manifest names every source tensor once and every output tensor; copies are byte for byte."""
    assert verify_dir(out) == []
    manifest = engine.read_json(out / "moecompress" / "manifest.json")
    before, after = sha256(source), sha256(out)
    assert set(manifest["tensors"]) == set(before)
    assert {name: row["sha256"] for name, row in manifest["outputs"].items()} == after
    used = [name for row in manifest["tensors"].values() for name in row["outputs"]]
    assert set(used) == set(after)
    for name, row in manifest["tensors"].items():
        if row["action"] == "copy":
            assert row["outputs"] == [name] and used.count(name) == 1 and after[name] == before[name]
    return dict(manifest["tensors"])


def generated(model: Any) -> torch.Tensor:
    with torch.no_grad():
        new = model.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    assert new.shape == (2, 28)
    return new


@pytest.mark.parametrize("model_type", engine.STREAMED)
def test_every_family_in_native_format(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.reload_here(monkeypatch)
    source = families.save_tiny(model_type, tmp_path / "model")
    out = execute(tmp_path, source, output={"format": "native"})
    rows = assert_accounted(source, out)
    roles = open_model(source).facts
    experts = {name for name, row in rows.items() if row["action"] == "quantize"}
    assert len(experts) >= 2 * len(roles.moe_layers) and all(rows[name]["bits"] == 4 for name in experts)
    assert {row["action"] for name, row in rows.items() if name not in experts} == {"copy"}
    generated(load(out))


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss", "nemotron_h", "deepseek_v2", "gemma4_text"])
def test_dense_output_is_a_plain_checkpoint_with_the_same_values(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded once to bfloat16, the values of the native output; loaded by transformers without our help."""
    engine.reload_here(monkeypatch)
    source = families.save_tiny(model_type, tmp_path / "model")
    results = {}
    for kind in ("dense", "native"):
        (tmp_path / kind).mkdir()
        results[kind] = execute(tmp_path / kind, source, output={"format": kind})
    rows = assert_accounted(source, results["dense"])
    assert {row["action"] for row in rows.values()} == {"copy", "rewrite"}
    stored, plain = load_file(source / "model.safetensors"), open_index(results["dense"]).tensors
    assert {name: (info.dtype, info.shape) for name, info in plain.items()} == {
        name: (value.dtype, tuple(value.shape)) for name, value in stored.items()
    }
    assert "quantization_config" not in engine.read_json(results["dense"] / "config.json")
    dense = engine.own_model(results["dense"])
    generated(dense)
    wanted = load(results["native"], dtype=torch.bfloat16, dequantize=True).state_dict()
    for name, value in dense.state_dict().items():
        if wanted[name].dtype == torch.bfloat16:
            assert torch.equal(value.to(torch.bfloat16), wanted[name]), name


@pytest.mark.parametrize("layout", ["per_expert", "stacked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_layouts_and_dtypes(layout: Any, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.reload_here(monkeypatch)
    source = families.save_tiny("qwen3_moe", tmp_path / "model", dtype, layout)
    for kind in ("dense", "native"):
        (tmp_path / kind).mkdir()
        out = execute(tmp_path / kind, source, output={"format": kind, "shard_size": "40KiB"})
        assert_accounted(source, out)
        sizes = [path.stat().st_size for path in out.glob("model-*.safetensors")]
        assert len(sizes) > 3 and max(sizes) < 140_000
        if kind == "dense":
            kinds = {info.dtype for info in open_index(out).tensors.values()}
            assert kinds == {dtype} and set(open_index(out).tensors) == set(open_index(source).tensors)


def test_block_scaled_fp8_becomes_bfloat16_and_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.reload_here(monkeypatch)
    source = families.save_tiny("deepseek_v3", tmp_path / "model")
    engine.make_fp8(source, tmp_path / "plain", 16)
    out = execute(tmp_path, source, output={"format": "native"})
    rows = assert_accounted(source, out)
    assert rows["model.layers.1.mlp.experts.0.up_proj.weight"]["action"] == "quantize"
    assert rows["model.layers.1.mlp.experts.0.up_proj.weight_scale_inv"] == {
        "action": "consume",
        "bits": None,
        "group_size": None,
        "outputs": [],
        "error": None,
    }
    dense = load_file(tmp_path / "plain" / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj.weight"
    assert rows[name]["action"] == rows[f"{name}_scale_inv"]["action"] == "dequantize"
    with TensorReader(open_index(out)) as reader:
        assert torch.equal(reader.read(name), dense[name])
    assert not any("fp8" in str(value) for value in engine.read_json(out / "config.json").values())


def test_vision_tensors_are_copied_byte_for_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.reload_here(monkeypatch)
    source = families.save_tiny("qwen3_vl_moe", tmp_path / "model")
    targets = ["routed_experts", "attention"]
    rows = assert_accounted(
        source, execute(tmp_path, source, [{"quantize.rtn": {"bits": 3, "group_size": 32, "targets": targets}}])
    )
    vision = {name: row["action"] for name, row in rows.items() if "visual" in name}
    assert len(vision) > 20 and set(vision.values()) == {"copy"}
    assert rows["model.language_model.layers.0.self_attn.q_proj.weight"]["action"] == "quantize"


def test_multi_token_prediction_layers_are_copied_byte_for_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSeek-V3 publishes them as one more decoder layer, which transformers does not build."""
    engine.reload_here(monkeypatch)
    source = families.save_tiny("deepseek_v3", tmp_path / "model", num_nextn_predict_layers=1)
    tensors = load_file(source / "model.safetensors")
    last = {name: value for name, value in tensors.items() if ".layers.3." in name}
    extra = {name.replace(".layers.3.", ".layers.4."): value + 1 for name, value in last.items()}
    extra["model.layers.4.eh_proj.weight"] = torch.randn(64, 128).to(torch.bfloat16)
    save_file({**tensors, **extra}, source / "model.safetensors", {"format": "pt"})
    rows = assert_accounted(source, execute(tmp_path, source))
    assert {rows[name]["action"] for name in extra} == {"copy"}
    assert rows["model.layers.3.mlp.experts.0.up_proj.weight"]["action"] == "quantize"


def text_of_python(path: Path) -> Path:
    """Some text that every machine with Python has."""
    import argparse

    path.write_text(Path(argparse.__file__).read_text())
    return path


def test_a_calibrated_run_of_the_demo_checkpoint_in_a_fresh_process(bench_a: Path, tmp_path: Path) -> None:
    text = text_of_python(tmp_path / "text.txt")
    calibration = {"source": "text", "files": [str(text)], "samples": 16, "length": 64}
    out = execute(
        tmp_path,
        bench_a,
        [{"quantize.rtn": {"bits": 3, "group_size": 32, "targets": ["routed_experts", "attention"]}}],
        calibration=calibration,
        evaluate={"perplexity": [str(text)], "length": 64, "windows": 4},
    )
    rows = assert_accounted(bench_a, out)
    assert {row["action"] for name, row in rows.items() if ".experts." in name} == {"quantize"}
    report = engine.read_json(out / "moecompress" / "report.json")
    assert [row["layer"] for row in report["layers"]] == [0, 1, 2, 3]
    for row in report["layers"]:
        assert row["experts_before"] == row["experts_after"] == len(row["experts"]) == 16
        assert sum(expert["tokens"] for expert in row["experts"]) == 14 * 64 * 4  # 2 of 16 sequences are held out
        assert 0 < row["output_error"] < 0.2 and 0.5 < row["router"]["topk_agreement"] <= 1
        assert 0 <= row["router"]["kl"] < 0.2 and row["router"]["load_cv"] > 0
        for expert in row["experts"]:
            assert expert["bits"] == {"gate_up": 3, "down": 3} and expert["action"] == "quantized"
            assert 0.01 < expert["error"] < 0.2
    errors = [row["output_error"] for row in report["layers"]]
    assert errors[0] < errors[-1]
    assert report["loadable"]["transformers"]["status"] == "tested"
    assert report["calibration"][0]["samples"] == 16 and report["size"]["output_bytes"] < report["size"]["source_bytes"]
    evaluation = engine.read_json(out / "moecompress" / "eval.json")
    assert evaluation["perplexity"]["text"]["value"] > 1 and 0 < evaluation["kl"]["text"] < 0.5
    for name in (
        "README.md",
        "tokenizer.json",
        "generation_config.json",
        "moecompress/report.md",
        "moecompress/recipe.yaml",
    ):
        assert (out / name).is_file(), name
    again = engine.command("plan", out / "moecompress" / "recipe.yaml", "--out", tmp_path / "other")
    assert again.code == 0, again.err
    (tmp_path / "more").mkdir()
    refused = engine.command("plan", engine.write_recipe(tmp_path / "more", out))
    assert refused.code == 2 and "already compressed" in refused.err


def test_errors_fall_with_more_bits_and_grow_along_the_layers(
    bench_a: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.reload_here(monkeypatch)
    save_file({"ids": engine.random_ids(8, 32, vocabulary=4000)}, tmp_path / "ids.safetensors")
    calibration = {"source": "tokens", "files": [str(tmp_path / "ids.safetensors")], "samples": 8, "length": 32}
    errors = []
    for bits in (8, 4, 2):
        (tmp_path / str(bits)).mkdir()
        passes = [{"quantize.rtn": {"bits": bits, "group_size": 32}}]
        out = execute(tmp_path / str(bits), bench_a, passes, calibration=calibration)
        report = engine.read_json(out / "moecompress" / "report.json")
        errors.append([row["output_error"] for row in report["layers"]])
    for more, fewer in zip(errors, errors[1:], strict=False):
        assert all(a < b for a, b in zip(more, fewer, strict=True))


def test_the_same_run_twice_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.reload_here(monkeypatch)
    source = families.save_tiny("gpt_oss", tmp_path / "model")
    found = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        out = execute(tmp_path / name, source)
        files = sorted(out.glob("*.safetensors")) + [out / "config.json", out / "moecompress" / "manifest.json"]
        found.append([path.read_bytes() for path in files])
    assert found[0] == found[1]


def test_a_reload_that_differs_is_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check would notice a wrong tensor: one matrix of the staged files is turned upside down before it."""
    engine.reload_here(monkeypatch)
    from moecompress import finish

    original = finish.reload_check

    def damaged(job: Any) -> Any:
        shard = next(
            path for path in sorted(job.run.staging.glob("*.safetensors")) if b"lm_head" in path.read_bytes()[:9000]
        )
        tensors = load_file(shard)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].flip(0)
        save_file(tensors, shard, {"format": "pt"})
        return original(job)

    monkeypatch.setattr(finish, "reload_check", damaged)
    source = families.save_tiny("qwen3_moe", tmp_path / "model")
    done = engine.command("run", engine.write_recipe(tmp_path, source))
    assert done.code == 2 and "logits differ" in done.err and "Traceback" not in done.err
    assert not os.path.exists(tmp_path / "out")


def test_config_of_the_source_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.reload_here(monkeypatch)
    source = families.save_tiny("qwen3_moe", tmp_path / "model")
    config = engine.read_json(source / "config.json") | {"my_own_key": [1, "ä"]}
    (source / "config.json").write_text(json.dumps(config))
    out = execute(tmp_path, source, output={"format": "native"})
    found = engine.read_json(out / "config.json")
    assert found.pop("quantization_config")["quant_method"] == "moecompress"
    assert found == config
