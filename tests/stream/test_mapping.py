"""Checkpoint keys to module tensors and back: every key once, and writing is the inverse of reading."""

from __future__ import annotations

from pathlib import Path

import engine
import families
import pytest
import torch
from safetensors.torch import load_file, save_file

from moecompress.errors import CheckpointError
from moecompress.experts import materialise
from moecompress.stream.expert_source import ExpertReader, dense_tensors
from moecompress.stream.inventory import owners
from moecompress.stream.mapping import assemble, disassemble
from moecompress.stream.model import open_model


@pytest.mark.parametrize("model_type", engine.STREAMED)
def test_writing_is_the_inverse_of_reading(model_type: str, tmp_path: Path) -> None:
    """Every checkpoint tensor is read by exactly one assembly and comes out of it bit for bit under its own key."""
    path = families.save_tiny(model_type, tmp_path)
    model, stored = open_model(path), load_file(path / "model.safetensors")
    assert not model.key_map.unmapped
    seen: list[str] = []
    for assembly in {id(found): found for found in model.key_map.assemblies.values()}.values():
        made = assemble(assembly, model.reader.read, model.skeleton)
        back = disassemble(assembly, made, model.skeleton)
        seen += back
        for key, value in back.items():
            assert value.dtype == stored[key].dtype and torch.equal(value, stored[key]), key
    assert sorted(seen) == sorted(stored)


@pytest.mark.parametrize("layout", ["per_expert", "stacked"])
@pytest.mark.parametrize("model_type", engine.STREAMED)
def test_experts_are_those_of_the_module(model_type: str, layout: str, tmp_path: Path) -> None:
    path = families.save_tiny(model_type, tmp_path, torch.float32, layout)  # type: ignore[arg-type]
    model, own = open_model(path), dict(families.tiny_model(model_type).named_parameters())
    for facts in model.facts.moe_layers:
        site = facts.site
        assert site is not None
        reader = ExpertReader(model.expert_sources[facts.index], model.reader.read, model.skeleton)
        prefix = f"{facts.name}.{site.experts}"
        for index in range(site.num_experts):
            found = reader.expert(index)
            for name, value in ((site.gate_up_name, found.gate_up), ("down_proj", found.down)):
                wanted = own[f"{prefix}.{name}"][index]
                assert torch.equal(materialise(value, torch.float32), wanted.T if site.transposed else wanted)
            for name, bias in ((site.gate_up_name, found.gate_up_bias), ("down_proj", found.down_bias)):
                assert (bias is not None) == site.has_bias
                if bias is not None:
                    assert torch.equal(bias, own[f"{prefix}.{name}_bias"][index])


@pytest.mark.parametrize("model_type", engine.STREAMED)
def test_experts_are_written_as_they_were_stored(model_type: str, tmp_path: Path) -> None:
    path = families.save_tiny(model_type, tmp_path)
    model, stored = open_model(path), load_file(path / "model.safetensors")
    for facts in model.facts.moe_layers:
        source = model.expert_sources[facts.index]
        made = dense_tensors(source, model.read_layer(facts.index).experts, lambda weight: weight, model.skeleton)
        assert sorted(tensor.key for tensor in made) == sorted(source.checkpoint_keys)
        for tensor in made:
            value = torch.cat([part.flatten() for part in tensor.parts()])
            assert tensor.dtype == value.dtype == stored[tensor.key].dtype
            assert tensor.shape == stored[tensor.key].shape
            assert torch.equal(value, stored[tensor.key].flatten()), tensor.key


@pytest.mark.parametrize("model_type", engine.STREAMED)
def test_every_tensor_has_one_owner_and_the_roles_make_sense(model_type: str, tmp_path: Path) -> None:
    path = families.save_tiny(model_type, tmp_path)
    model = open_model(path)
    found = owners(model)
    assert set(found) == set(model.index.tensors)
    roles = {key: owner.role for key, owner in found.items()}
    assert {"routed_experts", "router", "attention", "norm", "embedding", "lm_head"} <= set(roles.values())
    for key, role in roles.items():
        if ".experts." in key and "shared" not in key and key.endswith((".weight", "_proj", "_projs")):
            assert role == "routed_experts", key
        if "norm" in key.split(".")[-2]:
            assert role == "norm", key
        assert (role == "shared_experts") <= ("shared" in key), key
    for role in ("embedding", "lm_head"):
        (key,) = (key for key, value in roles.items() if value == role)
        assert model.index.tensors[key].shape == (families.VOCABULARY, 64)


def test_tensors_outside_the_module_tree_are_kept_apart(tmp_path: Path) -> None:
    path = families.save_tiny("qwen3_moe", tmp_path)
    tensors = load_file(path / "model.safetensors")
    extra = {"mtp.fc.weight": torch.ones(4, 4), "mtp.norm.weight": torch.ones(4)}
    save_file({**tensors, **extra}, path / "model.safetensors", {"format": "pt"})
    model = open_model(path)
    assert sorted(model.key_map.unmapped) == sorted(extra)
    assert {owners(model)[key].layer for key in extra} == {None}


def test_two_tensors_for_one_place_are_refused(tmp_path: Path) -> None:
    path = families.save_tiny("qwen3_moe", tmp_path)
    tensors = load_file(path / "model.safetensors")
    twice = {"layers.0.input_layernorm.weight": torch.ones(64)}  # the base model's name of the same tensor
    save_file({**tensors, **twice}, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="model.layers.0.input_layernorm.weight: two checkpoint tensors claim it"):
        open_model(path)


def test_a_conversion_that_fails_names_its_tensors(tmp_path: Path) -> None:
    path = families.save_tiny("mixtral", tmp_path)
    model = open_model(path)
    assembly = model.key_map.assemblies["model.layers.0.mlp.experts.gate_up_proj"]
    broken = assembly.sources[3][1]

    def read(key: str, start: int | None = None, stop: int | None = None) -> torch.Tensor:
        value = model.reader.read(key, start, stop)
        return value[:-1] if key == broken else value

    with pytest.raises(CheckpointError, match="gate_up_proj: cannot be built from .*experts.0.w1.weight"):
        assemble(assembly, read, model.skeleton)
