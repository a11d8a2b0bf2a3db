from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moecompress.checkpoint.native import expert_entries, linear_entries
from moecompress.checkpoint.native_config import ExpertsLayout, NativeConfig
from moecompress.checkpoint.writer import ShardRecord, tensor_entry, write_index, write_shard
from moecompress.errors import CheckpointError
from moecompress.inspect import component, inspect_dir, verify_dir
from moecompress.types import ExpertWeights, QuantizedTensor, Scheme


def quantized(rows: int, columns: int, bits: int, group: int) -> QuantizedTensor:
    scheme = Scheme(bits, group)
    codes = torch.zeros(rows, columns, dtype=torch.uint8)
    return QuantizedTensor(codes, torch.ones(rows, scheme.groups(columns), dtype=torch.bfloat16), None, scheme)


def expert(bits: int) -> ExpertWeights:
    return ExpertWeights(quantized(32, 64, bits, 32), torch.zeros(64, 16, dtype=torch.bfloat16))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A native checkpoint of two shards with its manifest: 3 experts at 4 bits, 1 at 2, one quantized Linear."""
    root = tmp_path / "out"
    (root / "moecompress").mkdir(parents=True)
    module = "model.layers.0.mlp.experts"
    layouts, experts = expert_entries(module, [expert(4), expert(2), expert(4), expert(4)])
    linear, matrix = linear_entries("model.layers.0.self_attn.q_proj", quantized(8, 64, 8, -1))
    embedding = tensor_entry("model.embed_tokens.weight", torch.arange(64, dtype=torch.float32).reshape(8, 8))
    records = [
        write_shard(root / "model-00001-of-00002.safetensors", [*experts, *matrix]),
        write_shard(root / "model-00002-of-00002.safetensors", [embedding]),
    ]
    write_index(root, records)
    config = NativeConfig({module: ExpertsLayout(4, layouts)}, {"model.layers.0.self_attn.q_proj": linear})
    body = {"architectures": ["TinyMoe"], "model_type": "tiny", "quantization_config": config.to_json()}
    (root / "config.json").write_text(json.dumps(body))
    (root / "moecompress" / "manifest.json").write_text(json.dumps(manifest(records)))
    return root


def manifest(records: list[ShardRecord]) -> dict[str, Any]:
    outputs = {name: {"file": r.file, **facts} for r in records for name, facts in r.tensors.items()}
    row = {"action": "copy", "bits": None, "group_size": None, "error": None}
    return {"schema": 1, "tensors": {f"source.{n}": {**row, "outputs": [n]} for n in outputs}, "outputs": outputs}


def test_inspect_shows_sizes_and_what_every_layer_became(output: Path) -> None:
    text = inspect_dir(output)
    lines = text.splitlines()
    assert lines[0] == f"{output}: TinyMoe (tiny)" and "in 2 files" in lines[1]
    rows = {line.split()[0]: line for line in lines if "%" in line}
    assert set(rows) == {"routed_experts", "attention", "embedding"}
    assert re.search(r"embedding +1 +256 B", rows["embedding"])
    assert lines[-3:] == [
        "quantization: moecompress",
        "model.layers.0.mlp.experts: 4 experts: 3 x (gate_up 4 bits in groups of 32, down not quantized), "
        "1 x (gate_up 2 bits in groups of 32, down not quantized)",
        "1 other matrices: weight 8 bits per channel",
    ]


def test_inspect_reads_any_checkpoint(tmp_path: Path) -> None:
    save_file({"lm_head.weight": torch.zeros(2, 2), "model.norm.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    text = inspect_dir(tmp_path)
    assert "unknown architecture" in text and "quantization: none\nstored as: float32 (2 tensors)" in text


@pytest.mark.parametrize(
    ("name", "shape", "role"),
    [
        ("model.embed_tokens.weight", (8, 4), "embedding"),
        ("lm_head.weight", (8, 4), "lm_head"),
        ("model.norm.weight", (4,), "norm"),
        ("model.layers.3.mlp.experts.7.gate_proj.weight", (4, 4), "routed_experts"),
        ("model.layers.3.mlp.experts.rec0", (4, 64), "routed_experts"),
        ("model.layers.3.block_sparse_moe.experts.0.w1.weight", (4, 4), "routed_experts"),
        ("model.layers.3.mlp.gate.weight", (8, 4), "router"),
        ("model.layers.3.mlp.router.bias", (8,), "router"),
        ("model.layers.3.mlp.shared_expert_gate.weight", (1, 4), "router"),
        ("model.layers.3.mlp.shared_experts.up_proj.weight", (4, 4), "shared_experts"),
        ("model.layers.3.mlp.gate_proj.weight", (4, 4), "dense_mlp"),
        ("model.layers.3.self_attn.q_proj.weight", (4, 4), "attention"),
        ("model.layers.3.self_attn.q_norm.weight", (4,), "norm"),
        ("model.language_model.layers.3.mlp.experts.gate_up_proj", (2, 4, 4), "routed_experts"),
        ("model.visual.blocks.3.attn.qkv.weight", (4, 4), "other"),
        ("something.else", (4,), "other"),
    ],
)
def test_components(name: str, shape: tuple[int, ...], role: str) -> None:
    assert component(name, shape) == role


def test_an_untouched_output_verifies(output: Path) -> None:
    assert verify_dir(output) == []


def test_one_flipped_bit_is_found(output: Path) -> None:
    path = output / "model-00002-of-00002.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert verify_dir(output) == ["model.embed_tokens.weight: other bytes than those written"]


def rewrite(output: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = output / "moecompress" / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda m: m["outputs"].pop(EMBEDDING),
            [f"{EMBEDDING}: not in the manifest", f"{EMBEDDING}: the manifest gives no hash for it"],
        ),
        (lambda m: m["outputs"].update(gone=m["outputs"][EMBEDDING]), ["gone: missing"]),
        (lambda m: m["outputs"][EMBEDDING].update(nbytes=1), [f"{EMBEDDING}: 256 bytes, written were 1"]),
        (
            lambda m: m["outputs"][EMBEDDING].update(file="x"),
            [f"{EMBEDDING}: in model-00002-of-00002.safetensors, written to x"],
        ),
        (lambda m: m["outputs"][EMBEDDING].pop("sha256"), [f"{EMBEDDING}: other bytes than those written"]),
    ],
)
def test_every_disagreement_is_named(
    output: Path, change: Callable[[dict[str, Any]], object], expected: list[str]
) -> None:
    rewrite(output, change)
    assert verify_dir(output) == expected


def test_a_directory_without_a_manifest_cannot_be_verified(output: Path) -> None:
    (output / "moecompress" / "manifest.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"manifest.json: no such file. Next: give a directory that `moecompress run`"
    ):
        verify_dir(output)


@pytest.mark.parametrize("text", ["[]", "{}", '{"schema": 2, "outputs": {}, "tensors": {}}', "{"])
def test_a_manifest_that_is_none_is_refused(output: Path, text: str) -> None:
    (output / "moecompress" / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match="manifest.json"):
        verify_dir(output)


def test_a_checkpoint_without_config_cannot_be_inspected(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="config.json: no such file"):
        inspect_dir(tmp_path)
