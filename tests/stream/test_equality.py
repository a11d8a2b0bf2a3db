"""The streamed forward equals the model's own forward, for every family and every way a checkpoint is stored."""

from __future__ import annotations

from pathlib import Path

import engine
import families
import pytest
import torch
from safetensors.torch import load_file, save_file

from moecompress.arch.quirks import UNSUPPORTED
from moecompress.errors import UnsupportedModel
from moecompress.stream.model import open_model

TOLERANCE = 1e-5
IDS = engine.random_ids(3, 24)


def assert_equal(path: Path, folder: Path, batch_tokens: int = 64) -> None:
    model = open_model(path)
    found = engine.streamed_logits(model, IDS, folder / "hidden", batch_tokens=batch_tokens)
    assert engine.difference(found, engine.own_logits(path, IDS)) <= TOLERANCE


@pytest.mark.parametrize("model_type", engine.STREAMED)
def test_every_family(model_type: str, tmp_path: Path) -> None:
    assert_equal(families.save_tiny(model_type, tmp_path / "model", torch.float32), tmp_path)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_vl_moe", "nemotron_h"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sources_run_in_float32(model_type: str, dtype: torch.dtype, tmp_path: Path) -> None:
    path = families.save_tiny(model_type, tmp_path / "model", dtype)
    assert open_model(path).facts.dtype == dtype
    assert_equal(path, tmp_path)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "deepseek_v3", "phimoe", "ernie4_5_moe", "jamba"])
def test_stacked_sources(model_type: str, tmp_path: Path) -> None:
    path = families.save_tiny(model_type, tmp_path / "model", torch.float32, "stacked")
    kinds = {part.kind for source in open_model(path).expert_sources.values() for part in source.projections.values()}
    assert kinds == {"stacked"}
    assert_equal(path, tmp_path)


def test_sharded_source(tmp_path: Path) -> None:
    model = families.tiny_model("qwen3_moe")
    model.save_pretrained(tmp_path / "model", max_shard_size="60KB")  # type: ignore[operator]
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 3
    assert_equal(tmp_path / "model", tmp_path)


@pytest.mark.parametrize("batch_tokens", [1, 24, 50, 10_000])
def test_batches_of_any_size(batch_tokens: int, tmp_path: Path) -> None:
    assert_equal(families.save_tiny("gpt_oss", tmp_path / "model", torch.float32), tmp_path, batch_tokens)


def test_tied_embeddings(tmp_path: Path) -> None:
    path = families.save_tiny("qwen3_moe", tmp_path / "model", torch.float32, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(path / "model.safetensors")
    assert_equal(path, tmp_path)


@pytest.mark.parametrize("size", [16, 24])  # 24 leaves ragged blocks
def test_block_scaled_fp8_source(size: int, tmp_path: Path) -> None:
    path = families.save_tiny("deepseek_v3", tmp_path / "model")
    engine.make_fp8(path, tmp_path / "dense", size)
    model = open_model(path)
    found = engine.streamed_logits(model, IDS, tmp_path / "hidden")
    assert engine.difference(found, engine.own_logits(tmp_path / "dense", IDS)) <= TOLERANCE
    assert model.facts.dtype == torch.bfloat16


@pytest.mark.parametrize("model_type", [name for name in families.FAMILIES if name in UNSUPPORTED])
def test_unsupported_families_say_why(model_type: str, tmp_path: Path) -> None:
    path = families.save_tiny(model_type, tmp_path)
    with pytest.raises(UnsupportedModel, match=f"model type '{model_type}'") as caught:
        open_model(path)
    assert UNSUPPORTED[model_type] in str(caught.value)


def test_the_unsupported_families_are_the_known_ones() -> None:
    """A family that becomes unsupported, or stops being so, is a decision and no accident."""
    refused = {"dbrx", "glm_moe_dsa", "hy_v4", "jetmoe", "llama4_text", "longcat_flash", "zaya"}
    assert set(families.FAMILIES) & set(UNSUPPORTED) == refused
    assert len(engine.STREAMED) == len(families.FAMILIES) - len(refused) >= 48


def test_layers_that_share_keys_and_values_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their configuration; and by what they do, should a family call its option something else."""
    extra = {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 16}
    path = families.save_tiny("gemma4_text", tmp_path / "model", torch.float32, **extra)
    with pytest.raises(UnsupportedModel, match="num_kv_shared_layers is 2: late layers reuse the keys and values"):
        open_model(path)
    monkeypatch.setattr("moecompress.arch.sites.UNSUPPORTED_OPTIONS", {})
    with pytest.raises(UnsupportedModel, match="shares 'shared_kv_states' with later layers"):
        engine.streamed_logits(open_model(path), IDS, tmp_path / "hidden")


def test_inputs_of_each_layer_beside_the_hidden_states(tmp_path: Path) -> None:
    path = families.save_tiny("gemma4_text", tmp_path / "model", torch.float32, hidden_size_per_layer_input=16)
    assert_equal(path, tmp_path)


def test_stacked_tensors_stored_transposed(tmp_path: Path) -> None:
    """The published Qwen3-VL-MoE checkpoints have [E, H, 2I] where the module has [E, 2I, H]."""
    path = families.save_tiny("qwen3_vl_moe", tmp_path / "model", torch.float32, moe_intermediate_size=24)
    wanted = engine.own_logits(path, IDS)
    tensors = load_file(path / "model.safetensors")
    turned = {name: tensors[name].mT.contiguous() for name in tensors if ".experts." in name}
    assert turned["model.language_model.layers.0.mlp.experts.gate_up_proj"].shape == (8, 64, 48)
    save_file({**tensors, **turned}, path / "model.safetensors", {"format": "pt"})
    found = engine.streamed_logits(open_model(path), IDS, tmp_path / "hidden")
    assert engine.difference(found, wanted) <= TOLERANCE


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="model type 'llama': no routed experts"):
        open_model(tmp_path)
