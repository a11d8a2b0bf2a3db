"""Wrong input of every kind: one clear message, exit code 2, no traceback, and nothing left behind."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine
import families
import pytest
import torch
from safetensors.torch import load_file, save_file

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.save_tiny("qwen3_moe", tmp_path_factory.mktemp("sound") / "model")


@pytest.fixture
def model(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "model"))


def refused(folder: Path, *arguments: object, code: int = 2) -> str:
    """Run the command line; what it says. Whatever was in the folder is all that is there afterwards."""
    before = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    done = engine.command(*arguments)
    assert done.code == code, done.err
    assert "Traceback" not in done.err and "bug" not in done.err and done.err.strip()
    assert sorted(path.relative_to(folder) for path in folder.rglob("*")) == before
    return done.err


def run_refused(folder: Path, model: Path, passes: Any = None, **sections: Any) -> str:
    return refused(folder, "run", engine.write_recipe(folder, model, passes, **sections))


# --- safetensors files


def shard(root: Path) -> Path:
    return root / "model.safetensors"


def header_of(root: Path) -> tuple[dict[str, Any], bytes]:
    raw = shard(root).read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def with_header(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(root: Path) -> None:
        header, data = header_of(root)
        change(header)
        text = json.dumps(header).encode()
        shard(root).write_bytes(struct.pack("<Q", len(text)) + text + data)

    return damage


NAME = "model.layers.1.mlp.experts.3.up_proj.weight"


def entry(**changed: Any) -> Damage:
    return with_header(lambda header: header[NAME].update(changed))


def cut(size: int) -> Damage:
    return lambda root: shard(root).write_bytes(shard(root).read_bytes()[:size])


TWICE = b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
HEADERS: dict[str, tuple[Damage, str]] = {
    "cut in the data": (cut(-100), "within the file's|tensors cover"),
    "cut in the header": (cut(500), "the file has 500 bytes but its header should have"),
    "empty": (cut(0), "the file has 0 bytes"),
    "longer than it says": (lambda root: shard(root).write_bytes(shard(root).read_bytes() + b"x"), "tensors cover"),
    "header of an exabyte": (
        lambda root: shard(root).write_bytes(struct.pack("<Q", 1 << 60) + shard(root).read_bytes()[8:]),
        "its header should have 1152921504606846976",
    ),
    "not safetensors": (lambda root: shard(root).write_bytes(b"\x80\x02}q\x00." * 99), "the file has|no header"),
    "header no JSON": (
        lambda root: shard(root).write_bytes(struct.pack("<Q", 9) + b"{'a': 1.}" + b"\0" * 9),
        "not valid JSON",
    ),
    "a tensor twice": (
        lambda root: shard(root).write_bytes(struct.pack("<Q", 2 * len(TWICE) + 3) + b"{%s,%s}x" % (TWICE, TWICE)),
        "key 'a' appears twice",
    ),
    "unknown dtype": (entry(dtype="F4"), f"{NAME}.*dtype 'F4'"),
    "outside the file": (entry(data_offsets=[1 << 40, (1 << 40) + 4096]), f"{NAME}.*within the file"),
    "negative offset": (entry(data_offsets=[-4096, 0]), f"{NAME}.*data_offsets"),
    "overlap": (entry(data_offsets=[0, 4096]), "overlaps the tensor before it|leaves a hole"),
    "shape and size differ": (entry(shape=[32, 65]), rf"{NAME}.*\[32, 65\] needs"),
    "enormous shape": (entry(shape=[1 << 62, 1 << 62]), f"{NAME}.*shape"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_broken_files(case: str, model: Path, tmp_path: Path) -> None:
    damage, expected = HEADERS[case]
    damage(model)
    text = run_refused(tmp_path, model)
    assert_matches(expected, text)
    assert "model.safetensors" in text


def assert_matches(expected: str, text: str) -> None:
    import re

    assert re.search(expected, text), text


def sharded(root: Path) -> dict[str, Any]:
    """Split the checkpoint into two shards with an index; the index."""
    tensors = load_file(shard(root))
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, root / file, {"format": "pt"})
    shard(root).unlink()
    index = {"metadata": {}, "weight_map": {name: file for file, own in parts.items() for name in own}}
    write_index(root, index)
    return index


def write_index(root: Path, index: object) -> None:
    (root / "model.safetensors.index.json").write_text(index if isinstance(index, str) else json.dumps(index))


def test_index_naming_an_absent_shard(model: Path, tmp_path: Path) -> None:
    sharded(model)
    (model / "model-00002-of-00002.safetensors").unlink()
    assert "names 1 files that are not there: model-00002-of-00002.safetensors" in run_refused(tmp_path, model)


@pytest.mark.parametrize(
    "place", ["../secret.safetensors", "/etc/passwd", "a/../../b.safetensors", "..\\b.safetensors"]
)
def test_index_leaving_the_directory(place: str, model: Path, tmp_path: Path) -> None:
    index = sharded(model)
    index["weight_map"]["lm_head.weight"] = place
    write_index(model, index)
    text = run_refused(tmp_path, model)
    assert "tensor 'lm_head.weight'" in text and "a file inside the directory" in text


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda index: index["weight_map"].pop("lm_head.weight"), "not named by the index: lm_head.weight"),
        (lambda index: index["weight_map"].update(x="model-00001-of-00002.safetensors"), "in no shard: x"),
        (lambda index: index.update(weight_map=[]), "weight_map is"),
        (lambda index: index.clear(), "weight_map is"),
    ],
)
def test_index_that_contradicts_the_shards(change: Any, expected: str, model: Path, tmp_path: Path) -> None:
    index = sharded(model)
    change(index)
    write_index(model, index)
    assert expected in run_refused(tmp_path, model)


def test_index_that_is_no_json(model: Path, tmp_path: Path) -> None:
    sharded(model)
    write_index(model, '{"weight_map": ')
    assert "model.safetensors.index.json: not valid JSON" in run_refused(tmp_path, model)


def test_pickled_weights_only(model: Path, tmp_path: Path) -> None:
    shard(model).rename(model / "pytorch_model.bin")
    text = run_refused(tmp_path, model)
    assert "no safetensors files, only pytorch_model.bin" in text and "convert it to safetensors" in text


# --- weights


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        (NAME, torch.nan, "layers.1.mlp.experts expert 3 gate_up: 2 of 4096 values are NaN or Inf"),
        ("model.layers.2.mlp.experts.7.down_proj.weight", torch.inf, "layers.2.mlp.experts expert 7 down: 2 of 2048"),
        ("model.layers.3.self_attn.q_proj.weight", -torch.inf, "model.layers.3.self_attn.q_proj.weight: 2 of"),
        ("model.layers.0.mlp.gate.weight", torch.nan, "model.layers.0.mlp.gate.weight: 2 of"),
        ("model.embed_tokens.weight", torch.nan, "model.embed_tokens.weight: 2 of"),
        ("mtp.fc.weight", torch.nan, "mtp.fc.weight: 2 of"),  # copied, never run
    ],
)
def test_weights_that_are_no_numbers_are_named(
    name: str, value: float, expected: str, model: Path, tmp_path: Path
) -> None:
    tensors = load_file(shard(model))
    tensors.setdefault(name, torch.ones(64, 128, dtype=torch.bfloat16)).flatten()[5:7] = value
    save_file(tensors, shard(model), {"format": "pt"})
    assert expected in run_refused(tmp_path, model)


def test_a_missing_tensor_is_named(model: Path, tmp_path: Path) -> None:
    tensors = load_file(shard(model))
    del tensors["model.layers.2.self_attn.k_proj.weight"]
    save_file(tensors, shard(model), {"format": "pt"})
    assert "1 tensors are missing, first ['model.layers.2.self_attn.k_proj.weight']" in run_refused(tmp_path, model)


def test_a_missing_expert_is_counted(model: Path, tmp_path: Path) -> None:
    tensors = load_file(shard(model))
    del tensors[NAME]
    save_file(tensors, shard(model), {"format": "pt"})
    text = run_refused(tmp_path, model)
    assert "layers.1.mlp.experts.gate_up_proj: [8, 7] expert tensors in the checkpoint. Allowed: 8" in text


# --- config.json


def config(**changed: Any) -> Damage:
    def damage(root: Path) -> None:
        data = engine.read_json(root / "config.json") | changed
        kept = {key: value for key, value in data.items() if value is not None}
        (root / "config.json").write_text(json.dumps(kept))

    return damage


CONFIGS: dict[str, tuple[Damage, str]] = {
    "absent": (lambda root: (root / "config.json").unlink(), "no config.json"),
    "no JSON": (lambda root: (root / "config.json").write_text("{"), "config.json: cannot be read"),
    "a list": (lambda root: (root / "config.json").write_text("[]"), "config.json: a JSON list"),
    "binary": (lambda root: (root / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json: cannot be read"),
    "no model type": (config(model_type=None), "no 'model_type'"),
    "unknown model type": (config(model_type="nonsense9"), "nonsense9"),
    "model type no text": (config(model_type=7), "config.json"),
    "unsupported family": (config(model_type="dbrx", architectures=["DbrxForCausalLM"]), "dbrx"),
    "a dense model": (
        config(model_type="llama", architectures=["LlamaForCausalLM"]),
        "model type 'llama': no routed experts.*llm-compressor",
    ),
    "fewer experts": (
        config(num_experts=6, num_local_experts=6),
        r"\[8, 8\] expert tensors in the checkpoint. Allowed: 6",
    ),
    "more experts": (
        config(num_experts=16, num_local_experts=16),
        r"\[8, 8\] expert tensors in the checkpoint. Allowed: 16",
    ),
    "wider experts": (config(moe_intermediate_size=48), r"experts.0.*is \[32, 64\], config says \[48, 64\]"),
    "another hidden size": (config(hidden_size=32), "config.json contradicts"),
    "another vocabulary": (config(vocab_size=100), r"is \[128, 64\], config says \[100, 64\]"),
    "more heads": (config(num_attention_heads=8), r"k_proj.weight is \[32, 64\], config says \[16, 64\]"),
    "more layers": (
        config(num_hidden_layers=5),
        "model.layers.4.mlp.experts.gate_up_proj: no tensor of the checkpoint provides it",
    ),
    "fewer layers": (config(num_hidden_layers=3), r"num_hidden_layers is 3, but there are tensors of layers \[3\]"),
    "more experts per token than experts": (config(num_experts_per_tok=9), "9 experts per token. Allowed: at most 8"),
    "no experts per token": (config(num_experts_per_tok=0), "config.json"),
    "no heads": (config(num_attention_heads=0), "config.json|model type"),
    "negative size": (config(hidden_size=-64), "config.json|model type"),
    "text for a size": (config(hidden_size="many"), "hidden_size"),
    "a list for a size": (config(num_local_experts=[8]), "config.json|model type"),
    "quantized by another tool": (config(quantization_config={"quant_method": "gptq"}), "already quantized.*'gptq'"),
    "quantized without a name": (config(quantization_config=7), "config.json"),
    "one FP8 block size": (
        config(quantization_config={"quant_method": "fp8", "weight_block_size": [128]}),
        r"weight_block_size \[128\]",
    ),
    "FP8 blocks of nothing": (
        config(quantization_config={"quant_method": "fp8", "weight_block_size": [0, "x"]}),
        "weight_block_size",
    ),
    "code of its own": (
        config(model_type="nonsense9", auto_map={"AutoConfig": "mine.C"}),
        "nonsense9|trust_remote_code|custom code",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_broken_configs(case: str, model: Path, tmp_path: Path) -> None:
    damage, expected = CONFIGS[case]
    damage(model)
    assert_matches(expected, run_refused(tmp_path, model))


# --- recipe


RECIPES: dict[str, tuple[str, str]] = {
    "unknown key": ("passs: []", "passs.*did you mean 'passes'"),
    "unknown pass": ("passes: [quantize.rtm: {bits: 4}]", "unknown pass 'quantize.rtm'; did you mean 'quantize.rtn'"),
    "unknown option": ("passes: [quantize.rtn: {bit: 4}]", "bit.*did you mean 'bits'"),
    "impossible bits": ("passes: [quantize.rtn: {bits: 5}]", "bits"),
    "text for bits": ("passes: [quantize.rtn: {bits: four}]", "bits"),
    "no passes": ("passes: []", "passes: missing or empty"),
    "a router": ("passes: [quantize.rtn: {targets: [router]}]", "'router' is not quantized"),
    "a tag": ("passes: !!python/object/apply:os.system [touch oops]", "tag"),
    "a python name": ("model: !!python/name:os.system ''", "tag"),
    "not YAML": ("passes: [", "recipe.yaml"),
    "a list": ("- a", "recipe.yaml"),
    "a key twice": ("seed: 1\nseed: 2", "seed"),
    "unknown format": ("output: {format: gguf}", "format"),
    "unknown source": ("calibration: {source: txt}", "txt"),
    "a negative seed": ("seed: -1", "seed"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_broken_recipes(case: str, sound: Path, tmp_path: Path) -> None:
    text, expected = RECIPES[case]
    base = {
        "model": f"model: {sound}",
        "passes": "passes: [quantize.rtn: {bits: 4}]",
        "output": f"output: {{dir: {tmp_path}/out}}",
    }
    lines = [line for key, line in base.items() if not text.startswith(f"{key}:")]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("\n".join([*lines, text] if not text.startswith("- ") else [text]) + "\n")
    found = refused(tmp_path, "run", recipe)
    assert_matches(expected, found)
    assert "recipe.yaml" in found


@pytest.mark.parametrize("size", [0, -3, 24, 128, 1000])
def test_an_impossible_group_size(size: int, sound: Path, tmp_path: Path) -> None:
    text = run_refused(tmp_path, sound, [{"quantize.rtn": {"group_size": size}}])
    assert "recipe.yaml:" in text and "group_size" in text
    if size > 0:
        assert "does not divide" in text and "works: 16, 32" in text


def test_all_problems_are_told_at_once(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    calibration = {"source": "text", "files": ["absent.txt"]}
    text = run_refused(tmp_path, sound, [{"quantize.rtn": {"group_size": 48}}], calibration=calibration)
    for part in ("group_size 48", "absent.txt", "exists", "the run needs"):
        assert part in text, part


# --- calibration, tokenizer, places


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("One sentence, and not more.\n" * 3)
    return path


@pytest.mark.parametrize(
    ("content", "expected"),
    [("", "no text|empty"), (" \n\n", "no text|empty|tokens"), ("Too short.", "needed: 4 x 64 tokens|add text")],
)
def test_calibration_without_enough_text(
    content: str, expected: str, bench_a: Path, text_file: Path, tmp_path: Path
) -> None:
    text_file.write_text(content)
    calibration = {"source": "text", "files": [str(text_file)], "samples": 4, "length": 64}
    text = run_refused(tmp_path, bench_a, calibration=calibration)
    assert_matches(expected, text)


def test_calibration_from_files_that_are_absent(bench_a: Path, tmp_path: Path) -> None:
    calibration = {"source": "text", "files": ["nowhere.txt"]}
    assert "nowhere.txt" in run_refused(tmp_path, bench_a, calibration=calibration)


def test_calibration_tokens_outside_the_vocabulary(sound: Path, tmp_path: Path) -> None:
    save_file({"ids": torch.full((8, 16), 128)}, tmp_path / "ids.safetensors")
    calibration = {"source": "tokens", "files": [str(tmp_path / "ids.safetensors")], "samples": 8, "length": 16}
    text = run_refused(tmp_path, sound, calibration=calibration)
    assert "token id 128. Allowed: 0 to 127" in text


def test_a_missing_tokenizer(sound: Path, text_file: Path, tmp_path: Path) -> None:
    calibration = {"source": "text", "files": [str(text_file)], "samples": 1, "length": 16}
    assert "tokenizer" in run_refused(tmp_path, sound, calibration=calibration)
    assert "tokenizer" in run_refused(tmp_path, sound, evaluate={"perplexity": [str(text_file)]})


def test_a_broken_tokenizer(bench_a: Path, text_file: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(bench_a, tmp_path / "model"))
    (model / "tokenizer.json").write_text("{broken")
    calibration = {"source": "text", "files": [str(text_file)], "samples": 1, "length": 16}
    assert "tokenizer" in run_refused(tmp_path, model, calibration=calibration)


def test_an_evaluation_text_that_is_absent_or_too_short(bench_a: Path, text_file: Path, tmp_path: Path) -> None:
    """Told before hours of work and not after."""
    assert "no file 'no.txt'" in run_refused(tmp_path, bench_a, evaluate={"perplexity": ["no.txt"]})
    text = run_refused(tmp_path, bench_a, evaluate={"perplexity": [str(text_file)], "length": 512})
    assert "text.txt" in text and "512" in text


def test_an_output_that_exists(sound: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    assert "exists" in run_refused(tmp_path, sound)
    assert (tmp_path / "out" / "precious").read_text() == "x"


def test_an_output_that_is_a_file_or_lies_in_one(sound: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    assert "exists" in run_refused(tmp_path, sound)
    recipe = engine.write_recipe(tmp_path, sound)
    assert "is not a directory" in refused(tmp_path, "run", recipe, "--out", tmp_path / "out" / "deep" / "er")


def test_a_disk_that_is_too_small(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=1, used=1, free=1 << 20))
    text = run_refused(tmp_path, sound)
    assert "0.00 GiB free, the run needs" in text and "free some space" in text


def test_too_little_memory_is_told_beforehand(sound: Path, tmp_path: Path) -> None:
    text = refused(tmp_path, "run", engine.write_recipe(tmp_path, sound), "--memory", "1MiB")
    assert "--memory allows 0.00 GiB" in text


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    assert "no such directory" in run_refused(tmp_path, tmp_path / "nothing" / "here")
    text = run_refused(tmp_path, Path("some-org/some-model"))
    assert "some-org/some-model" in text and "check the name and the network" in text


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    assert "absent.yaml" in refused(tmp_path, "run", tmp_path / "absent.yaml")


@pytest.mark.parametrize("verb", ["plan", "run"])
def test_in_a_process_of_its_own(verb: str, model: Path, tmp_path: Path) -> None:
    entry(shape=[32, 65])(model)
    recipe = engine.write_recipe(tmp_path, model)
    before = sorted(tmp_path.rglob("*"))
    done = subprocess.run(engine.command_line(verb, recipe), capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert NAME in done.stderr and "Traceback" not in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("verb", ["eval", "inspect", "verify", "report"])
def test_other_commands_on_what_is_no_output(verb: str, model: Path, tmp_path: Path) -> None:
    extra = ["--perplexity", str(tmp_path / "t.txt")] if verb == "eval" else []
    assert refused(tmp_path, verb, tmp_path / "nowhere", *extra)
    if verb in ("verify", "report"):
        assert refused(tmp_path, verb, model)
