"""Weights outside the layers: read when they are needed, in the form the model needs, and gone afterwards."""

from __future__ import annotations

from pathlib import Path

import engine
import families
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moecompress.errors import CheckpointError, UnsupportedModel
from moecompress.stream.model import StreamModel, open_model
from moecompress.stream.outer import outer_weights
from moecompress.stream.prelude import logits, record, share_equal

IDS = engine.random_ids(2, 12)


class Reads:
    """Counts what is read."""

    def __init__(self, model: StreamModel) -> None:
        self.model, self.names = model, []  # type: ignore[var-annotated]

    def __call__(self, name: str) -> Tensor:
        self.names.append(name)
        return self.model.read_outer(name)


def assert_empty(model: StreamModel) -> None:
    saved = model.skeleton.state_dict()
    assert all(value.is_meta for value in saved.values())
    assert not any("forward" in module.__dict__ for module in model.skeleton.modules())


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "gemma4_text", "qwen3_vl_moe", "nemotron_h"])
def test_the_input_of_layer_0_equals_the_models_own(model_type: str, tmp_path: Path) -> None:
    model = open_model(families.save_tiny(model_type, tmp_path, torch.bfloat16))
    own = engine.own_model(tmp_path)
    layers = own.get_submodule(model.layers_name)
    wanted, wanted_calls = record(own, layers, IDS)
    with outer_weights(model.skeleton, model.layers_name, model.read_outer):
        found, calls = record(model.skeleton, model.layers, IDS)
    assert found.dtype == torch.float32 and torch.equal(found, wanted)
    assert [call.kwargs.keys() for call in calls] == [call.kwargs.keys() for call in wanted_calls]
    assert_empty(model)


def test_the_vision_tower_is_never_read(tmp_path: Path) -> None:
    model = open_model(families.save_tiny("qwen3_vl_moe", tmp_path))
    reads = Reads(model)
    with outer_weights(model.skeleton, model.layers_name, reads):
        hidden, _ = record(model.skeleton, model.layers, IDS)
        logits(model.skeleton, model.layers, IDS, hidden)
    assert set(reads.names) == {
        "model.language_model.embed_tokens.weight",
        "model.language_model.norm.weight",
        "lm_head.weight",
    }
    assert any("visual" in name for name in model.skeleton.state_dict())
    assert_empty(model)


def test_nothing_stays_after_an_error(tmp_path: Path) -> None:
    model = open_model(families.save_tiny("qwen3_moe", tmp_path))

    def read(name: str) -> Tensor:
        if name == "model.norm.weight":
            raise CheckpointError("broken")
        return model.read_outer(name)

    with pytest.raises(CheckpointError, match="broken"), outer_weights(model.skeleton, model.layers_name, read):
        hidden, _ = record(model.skeleton, model.layers, IDS)
        logits(model.skeleton, model.layers, IDS, hidden)
    assert_empty(model)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "phimoe"])  # without and with a bias
def test_a_large_head_works_by_blocks_of_rows(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_model(families.save_tiny(model_type, tmp_path, lm_head_bias=True if model_type == "phimoe" else None))
    hidden = torch.randn(2, 12, 64)
    results = []
    for rows in (10_000, 48):  # 128 ids: whole, and in three blocks of which the last is ragged
        monkeypatch.setattr("moecompress.stream.outer._ROWS", rows)
        reads = Reads(model)
        with outer_weights(model.skeleton, model.layers_name, reads):
            results.append(logits(model.skeleton, model.layers, IDS, hidden))
            results.append(logits(model.skeleton, model.layers, IDS, hidden))
        assert reads.names.count("lm_head.weight") == (1 if rows == 48 else 2)  # the blocks' matrix is kept
        assert ("lm_head.bias" in reads.names) == (model_type == "phimoe")
        assert_empty(model)
    assert torch.equal(results[0], results[1]) and torch.equal(results[2], results[3])
    assert engine.difference(results[2], results[0]) < 1e-6


def test_gradients_reach_the_hidden_states(tmp_path: Path) -> None:
    model = open_model(families.save_tiny("qwen3_moe", tmp_path))
    hidden = torch.randn(2, 12, 64, requires_grad=True)
    with outer_weights(model.skeleton, model.layers_name, model.read_outer):
        logits(model.skeleton, model.layers, IDS, hidden).square().mean().backward()
    assert hidden.grad is not None and bool((hidden.grad.abs().amax(-1) > 0).all())


def test_a_tensor_with_infinite_values_is_named(tmp_path: Path) -> None:
    path = families.save_tiny("qwen3_moe", tmp_path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"][3:5] = torch.inf
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="model.norm.weight: 2 of 64 values are NaN or Inf"):
        open_model(path).read_outer("model.norm.weight")


def test_calls_share_what_is_equal(tmp_path: Path) -> None:
    """The rotary tables and masks of all batches are one object: they would fill the memory otherwise."""
    model = open_model(families.save_tiny("qwen3_moe", tmp_path))
    with outer_weights(model.skeleton, model.layers_name, model.read_outer):
        first, second = (record(model.skeleton, model.layers, ids)[1][0] for ids in IDS.split(1))
    shared = share_equal(second, first)
    assert second.kwargs["position_embeddings"][0] is not first.kwargs["position_embeddings"][0]
    assert all(
        a is b for a, b in zip(shared.kwargs["position_embeddings"], first.kwargs["position_embeddings"], strict=True)
    )
    changed = share_equal(type(second)(second.args, {**second.kwargs, "position_ids": torch.ones(1, 12)}), first)
    assert torch.equal(changed.kwargs["position_ids"], torch.ones(1, 12))


def test_a_layer_that_is_not_called_once_is_refused(tmp_path: Path) -> None:
    model = open_model(families.save_tiny("qwen3_moe", tmp_path))
    with outer_weights(model.skeleton, model.layers_name, model.read_outer):
        layers = torch.nn.ModuleList([*model.layers, model.layers[0]])
        with pytest.raises(UnsupportedModel, match=r"layers \[0\] were not called|is called twice"):
            record(model.skeleton, layers, IDS)
