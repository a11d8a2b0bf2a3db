"""Tiny random models of every Mixture-of-Experts family in transformers: what the tests run instead of real models.

Each model has four layers, hidden size 64, eight experts of width 32 and two experts per token (`zaya`: one), a
vocabulary of 128 ids (in `qwen3_vl_moe` 120 to 123 stand for pictures), and builds in well under a second. Every
weight is drawn at random, routers and their correction biases too: a router of zeros makes every expert tie, and a
test on ties proves nothing.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

VOCABULARY = 128
LAYERS = 4

# Offered to every family; a family takes the keys its configuration class knows.
_SIZES: dict[str, Any] = {
    # model
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    # experts, under each of the names the families use
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 40,
    "moe_shared_expert_intermediate_size": 40,
    "shared_intermediate_size": 40,
    "dense_intermediate_size": 48,
    "first_k_dense_replace": 1,
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    "n_group": 2,
    "topk_group": 1,
    # attention
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 16,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "index_n_heads": 4,
    "index_head_dim": 32,
    "index_topk": 8,
    # linear attention and state spaces
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_d_state": 16,
    "ssm_state_size": 16,
    "mamba_chunk_size": 16,
    "chunk_size": 16,
}

# What one family needs on top of, or instead of, the common sizes. None removes a common key.
_SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": LAYERS,
        "max_seq_len": 256,
        "ffn_config": {"ffn_hidden_size": 32, "hidden_size": 64, "moe_num_experts": 8, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "num_key_value_heads": None,
    },
    "deepseek_v4": {
        "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
        "o_groups": 2,
        "o_lora_rank": 16,
    },
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {
        "layer_types": ["indexed_attention", "sliding_attention"] * 2,
        "per_layer_config": {},
        "head_dim": 32,
        "shared_experts_intermediate_size": 40,
    },
    "gemma4_text": {
        "enable_moe_block": True,
        "top_k_experts": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "hidden_size_per_layer_input": 0,
        "global_head_dim": 16,
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "inkling_text": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "rel_extent": 32},
    "inkling2_text": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "rel_extent": 32},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "llama4_text": {"interleave_moe_layer_step": 1},
    "longcat_flash": {"num_layers": LAYERS, "zero_expert_num": 2, "head_dim": 16},
    "nemotron_h": {"n_groups": 2, "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "linear_attention", "linear_attention", "indexed_attention"],
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "output_gate_type": "sigmoid",
        "hc_lowrank": 16,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}

_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}

# Text generation families, then those that also look at pictures (`AutoModelForImageTextToText`).
_TEXT = (
    "afmoe aria_text axk1 axk2 bailing_hybrid beam cohere2_moe dbrx deepseek_v2 deepseek_v3 deepseek_v32 "
    "deepseek_v4 dots1 dots3_note_text ernie4_5_moe exaone_moe flex_olmo flint gemma4_text glm4_moe glm4_moe_lite "
    "glm_moe_dsa gpt_oss granitemoe granitemoe_swa granitemoehybrid granitemoeshared hunyuan_v1_moe hy_v3 hy_v4 "
    "inkling2_text inkling_text jamba jetmoe kimi_linear kolibri1 laguna lfm2_moe llama4_text longcat_flash mellum "
    "mimo_v2_flash minimax minimax_m2 minimax_m3_vl_text mixtral nemotron_h olmoe phimoe qwen2_moe qwen3_5_moe_text "
    "qwen3_moe qwen3_next qwen4_exp_text solar_open zaya"
).split()
_PICTURES = ("qwen3_vl_moe",)
FAMILIES: tuple[str, ...] = (*_TEXT, *_PICTURES)

# Families of the library that are left out, and why.
EXCLUDED: dict[str, str] = {
    "doge": "has no routed experts module: its experts are rows of an embedding",
}


def tiny_config(model_type: str, **extra: Any) -> Any:
    """The configuration of a tiny model of this family; `extra` overrides any key (None leaves a key out)."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type in EXCLUDED:
        raise ValueError(f"{model_type}: excluded from the tests, {EXCLUDED[model_type]}")
    config_class = CONFIG_MAPPING[model_type]
    if model_type in _PICTURES:
        ids = {"image_token_id": 120, "video_token_id": 121, "vision_start_token_id": 122, "vision_end_token_id": 123}
        text = _text_arguments(type(config_class().text_config), "", extra)
        return config_class(text_config=text, vision_config=_VISION, tie_word_embeddings=False, **ids)
    return config_class(**_text_arguments(config_class, model_type, extra))


def tiny_model(model_type: str, seed: int = 0, **extra: Any) -> nn.Module:
    """A float32 model of this family in evaluation mode, drawn from `seed`; the global generator is left alone."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    auto = AutoModelForImageTextToText if model_type in _PICTURES else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(tiny_config(model_type, **extra), dtype=torch.float32).eval()
    _fill(model, model.config, torch.Generator().manual_seed(seed))
    return model


def save_tiny(
    model_type: str,
    path: Path,
    dtype: torch.dtype = torch.bfloat16,
    layout: Literal["per_expert", "stacked"] = "per_expert",
    seed: int = 0,
    **extra: Any,
) -> Path:
    """Write a tiny checkpoint and return its directory.

    layout: `per_expert` = the names of the family's published checkpoints (a few families publish stacked tensors,
    and those stay stacked); `stacked` = the names of the modules, `[E, 2I, H]` and `[E, H, I]`.
    Tensors that the family insists on keeping in float32 (router correction biases, mostly) stay float32.
    """
    model: Any = tiny_model(model_type, seed, **extra)
    keep = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not any(part in name for part in keep):
            tensor.data = tensor.data.to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(path, save_original_format=layout == "per_expert")
    return path


def _text_arguments(config_class: Any, model_type: str, extra: dict[str, Any]) -> dict[str, Any]:
    aliases = getattr(config_class, "attribute_map", {})
    known = {*config_class().to_dict(), *config_class.__dataclass_fields__, *aliases}
    arguments = {key: value for key, value in _SIZES.items() if key in known}
    if "kv_lora_rank" in arguments:  # latent attention: one key-value head per head, head size is derived
        arguments["num_key_value_heads"] = arguments["num_attention_heads"]
        arguments.pop("head_dim", None)
    arguments |= _SPECIAL.get(model_type, {})
    arguments |= {aliases.get(key, key): value for key, value in extra.items()}
    arguments = {key: value for key, value in arguments.items() if value is not None}
    return {key: value for key, value in arguments.items() if key not in aliases or aliases[key] not in arguments}


@torch.no_grad()
def _fill(model: nn.Module, config: Any, generator: torch.Generator) -> None:
    """Matrices: normal over the square root of the row length. Vectors and state matrices: jitter about their start."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2 and not name.endswith("A_log"):
            parameter.copy_(noise / math.sqrt(parameter.shape[-1]))
        else:
            parameter.add_(noise, alpha=0.1)
    saved = model.state_dict()
    for name, buffer in model.named_buffers():
        if name not in saved:
            continue
        if buffer.is_floating_point():
            buffer.add_(torch.randn(buffer.shape, generator=generator), alpha=0.05)
        elif name.endswith("tid2eid"):  # hash routing: a table of distinct expert ids per token id
            order = torch.rand(buffer.shape[0], config.num_local_experts, generator=generator).argsort(dim=1)
            buffer.copy_(order[:, : buffer.shape[1]])
