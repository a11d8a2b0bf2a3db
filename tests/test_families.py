"""The tiny families are sound material: random everywhere, and unchanged by saving and loading in either layout."""

from __future__ import annotations

from pathlib import Path

import families
import pytest
import torch
from torch import nn


def load(path: Path, model_type: str) -> nn.Module:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    auto = AutoModelForImageTextToText if "_vl_" in model_type and "_text" not in model_type else AutoModelForCausalLM
    model, report = auto.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


@pytest.mark.parametrize("model_type", families.FAMILIES)
def test_saved_and_loaded_again_gives_the_same_logits(model_type: str, tmp_path: Path) -> None:
    model = families.tiny_model(model_type)
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all() and parameter.abs().max() > 0, name
    ids = torch.randint(3, 100, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        for layout in ("per_expert", "stacked"):
            path = families.save_tiny(model_type, tmp_path / layout, torch.float32, layout)
            loaded = load(path, model_type)(ids, use_cache=False).logits
            # float32 sums in another order: some loaders lay tensors out differently in memory
            torch.testing.assert_close(loaded, expected, atol=1e-5, rtol=0)


def test_layouts_store_experts_apart_or_stacked(tmp_path: Path) -> None:
    from safetensors import safe_open

    shapes = {}
    for layout in ("per_expert", "stacked"):
        path = families.save_tiny("qwen3_moe", tmp_path / layout, layout=layout)
        with safe_open(path / "model.safetensors", "pt") as file:
            shapes[layout] = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}
    assert shapes["per_expert"]["model.layers.1.mlp.experts.7.down_proj.weight"] == (64, 32)
    assert shapes["stacked"]["model.layers.1.mlp.experts.gate_up_proj"] == (8, 64, 64)


def test_seeds_differ_and_repeat() -> None:
    first, again, other = (families.tiny_model("mixtral", seed).state_dict() for seed in (0, 0, 1))
    name = "model.layers.0.mlp.experts.down_proj"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])


def test_sizes_can_be_changed_under_either_of_their_names() -> None:
    for name in ("num_experts", "num_local_experts"):
        assert families.tiny_config("qwen3_moe", **{name: 4}).num_experts == 4
    assert families.tiny_config("qwen3_vl_moe", num_experts=4).text_config.num_experts == 4


def test_an_excluded_family_says_why() -> None:
    with pytest.raises(ValueError, match="doge: excluded from the tests, has no routed experts module"):
        families.tiny_config("doge")
