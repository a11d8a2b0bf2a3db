"""The few families that differ from the standard experts interface, as data. Most families need no row here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moecompress.types import Scoring

#: model types whose layers cannot be run one at a time by the generic engine, with the reason a user reads
UNSUPPORTED: Mapping[str, str] = {
    "dbrx": "experts are stored as flat matrices outside transformers' experts interface",
    "llama4": "experts weigh their input instead of their output and run outside the experts interface",
    "llama4_text": "experts weigh their input instead of their output and run outside the experts interface",
    "jetmoe": "attention and MLP experts use grouped linears outside the experts interface",
    "longcat_flash": "zero-computation experts share the id space of the real ones",
    "doge": "product-key experts are not a conventional MoE layer",
    "zaya": "the router carries hidden state from layer to layer",
    "glm_moe_dsa": "layers hand sparse-attention indices to the next layer",
    "hy_v4": "layers hand sparse-attention indices to the next layer",
}

#: config entries that, when they are on, make layers depend on more than hidden states, with the reason
UNSUPPORTED_OPTIONS: Mapping[str, str] = {
    "num_kv_shared_layers": "late layers reuse the keys and values of earlier ones",
}

#: model types without a norm between the residual stream and the experts: what experts add to it cannot be told
NO_RESIDUAL: Mapping[str, str] = {
    "flex_olmo": "experts read the residual stream itself, and their output is normed before it is added",
    "qwen4_exp_text": "experts read a mixture of several residual streams",
}

#: model types whose cached forward differs from the plain one, with the reason: generation recomputes the prefix
RECOMPUTED: Mapping[str, str] = {
    **dict.fromkeys(
        ("axk2", "deepseek_v32", "dots3_note_text"), "the sparse-attention index reads its cache differently"
    ),
    "minimax": "the state of its linear attention depends on where the prefix was cut",
    "nemotron_h": "its state-space layers lose precision from token to token",
    "qwen3_vl_moe": "positions after the first call count from a picture's",
}

#: model types that cannot generate with `streamed`, with the reason
UNPARKED: Mapping[str, str] = {"qwen4_exp_text": "its forward reads the positions in every layer's cache beforehand"}

#: model types whose routing weights hold more than a common factor once they are normalised, with what that is
RESCALED_GATES: Mapping[str, str] = {
    "gemma4_text": "each is multiplied by a learned scale of its expert",
}

_SIGMOID = (
    "afmoe axk1 axk2 bailing_hybrid beam deepseek_v3 deepseek_v32 dots1 dots3_note_text exaone_moe flint glm4_moe "
    "glm4_moe_lite glm4v_moe hy_v3 inkling_text kimi_linear kolibri1 laguna lfm2_moe mimo_v2_flash minimax_m2 "
    "minimax_m3_vl_text nemotron_h solar_open"
).split()
_SCORING: Mapping[str, Scoring] = {**dict.fromkeys(_SIGMOID, "sigmoid"), "gemma4_text": "probabilities"}
#: model types whose config names the rule, with the entry and what its values mean
_NAMED: Mapping[str, str] = {
    "cohere2_moe": "expert_selection_fn",
    "deepseek_v4": "scoring_func",
    "inkling2_text": "scoring_func",
}
_RULES: Mapping[str, Scoring] = {"softmax": "softmax", "sigmoid": "sigmoid", "sqrtsoftplus": "sqrt_softplus"}

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_WIDTH = ("moe_intermediate_size", "expert_intermediate_size", "moe_ffn_hidden_size", "intermediate_size")
_TOP_K = ("num_experts_per_tok", "top_k_experts", "moe_k", "moe_topk", "num_experts_per_token", "moe_top_k", "top_k")


def scoring(config: Any) -> Scoring:
    """How the router's first output becomes a distribution over experts, from a (text) config; default softmax."""
    named = getattr(config, _NAMED.get(config.model_type, ""), None)
    return _RULES.get(str(named), _SCORING.get(config.model_type, "softmax"))


def router_names(model_type: str) -> tuple[str, ...]:
    """Child names of the MoE block that may be its router."""
    return ("gate", "router")


def routing_groups(config: Any) -> tuple[int, int]:
    """(groups of experts, groups chosen per token) from a (text) config; (1, 1) where routing knows no groups."""
    groups, chosen = getattr(config, "n_group", None), getattr(config, "topk_group", None)
    if not isinstance(groups, int) or not isinstance(chosen, int) or groups <= 1:
        return 1, 1
    if getattr(config, "topk_method", None) == "greedy":  # deepseek_v2: present in the config, not used
        return 1, 1
    return groups, chosen


def shape_names(config: Any, experts: int, top_k: int, width: int) -> dict[str, tuple[str, ...]]:
    """Config entries that hold the number of experts, of experts per token and of groups, under all their spellings,
    and the experts' width.

    Keys: experts, top_k, groups, top_groups, width. An entry counts when it has the value that the modules show.
    """
    groups, chosen = routing_groups(config)
    wanted = {
        "experts": (_COUNTS, experts),
        "top_k": (_TOP_K, top_k),
        "groups": (("n_group", "num_expert_group"), groups),
        "top_groups": (("topk_group",), chosen),
        "width": (_WIDTH, width),
    }
    found = {
        key: tuple(name for name in names if getattr(config, name, None) == value)
        for key, (names, value) in wanted.items()
    }
    return {**found, "width": found["width"][:1]}  # another entry of the same value is that of dense layers


def top_k(config: Any) -> int | None:
    """Experts per token from a (text) config, whatever the family calls it; None when it cannot be told."""
    for key in _TOP_K:
        value = getattr(config, key, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None
