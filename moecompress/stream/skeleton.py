"""Build a model without weights: config.json -> transformers module tree on the meta device."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moecompress.errors import CheckpointError, UnsupportedModel, message
from moecompress.experts import Experts


def load_config(root: Path, *, trust_remote_code: bool = False) -> Any:
    """The transformers config of a checkpoint directory, with any quantization entry taken off.

    Raises CheckpointError for a missing or broken config.json, UnsupportedModel for an unknown model type.
    """
    from transformers import AutoConfig

    raw = read_config_json(root)
    if "model_type" not in raw:
        raise CheckpointError(message(str(root / "config.json"), "no 'model_type'", then="is this a model directory?"))
    try:
        config = AutoConfig.from_pretrained(root, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # transformers raises ValueError, KeyError, StrictDataclassError, ...
        text = str(error).split("\n")[0]
        unknown = "does not recognize" in str(error) or "model type" in text.lower()
        kind = UnsupportedModel if unknown else CheckpointError
        then = "update transformers or check config.json" if unknown else "correct config.json"
        raise kind(message(str(root / "config.json"), text, then=then)) from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def read_config_json(root: Path) -> dict[str, Any]:
    """config.json as plain data. Raises CheckpointError when it is missing or no JSON object."""
    path = root / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            message(str(root), "no config.json", then="give the directory of a Hugging Face checkpoint")
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(message(str(path), f"cannot be read: {error}")) from error
    if not isinstance(raw, dict):
        raise CheckpointError(message(str(path), f"a JSON {type(raw).__name__}", "an object"))
    return raw


def build_skeleton(config: Any, *, trust_remote_code: bool = False) -> nn.Module:
    """The model class of `config` on the meta device in float32 and eval mode; computed buffers are real.

    Parameters and persistent buffers stay on meta until their layer is read; rotary tables and the like, which no
    checkpoint carries, are made by the model's own initialisation.
    """
    with torch.device("meta"):
        model = _model_class(config, trust_remote_code)
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    _make_computed_buffers(model)
    return model


def _model_class(config: Any, trust_remote_code: bool) -> Any:
    import transformers

    name = (getattr(config, "architectures", None) or [None])[0]
    cls = getattr(transformers, name, None) if name else None
    try:
        if cls is not None and hasattr(cls, "_from_config"):
            return cls._from_config(config, dtype=torch.float32)
        return transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # sizes that make no sense fail in as many ways as there are families
        text = str(error).split("\n")[0]
        raise UnsupportedModel(
            message(
                f"model type '{config.model_type}'", f"transformers cannot build it: {text}", then="check config.json"
            )
        ) from error


def _make_computed_buffers(model: Any) -> None:
    """Give non-persistent buffers (not in any checkpoint) real memory and let the model initialise them."""
    owners: Mapping[str, Any] = dict(model.named_modules())
    found = False
    for name, buffer in list(model.named_non_persistent_buffers()):
        owner, _, leaf = name.rpartition(".")
        owners[owner]._buffers[leaf] = torch.empty_like(buffer, device="cpu")
        found = True
    if not found:
        return
    for module in model.modules():
        module._is_hf_initialized = False
    with torch.no_grad():
        model.initialize_weights()


def replace_experts(layer: nn.Module, name: str) -> None:
    """Put our empty experts module in place of the family's, with its parameters on the meta device."""
    parent, _, leaf = name.rpartition(".")
    owner = layer.get_submodule(parent) if parent else layer
    original = getattr(owner, leaf)
    made = Experts.replacing(original)
    for key, value in original.named_parameters(recurse=False):
        made.register_parameter(key, value)  # on the meta device: transformers' conversions ask for shapes
    owner.add_module(leaf, made)
