"""Pass name -> class. A new pass is one line here; its module is imported only when a recipe names it."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel

from moecompress.errors import RecipeError, suggest


def table(entries: Iterable[tuple[str, str]]) -> Mapping[str, str]:
    """Read-only name -> `"module:Class"`. Raises ValueError when a name is given twice."""
    found: dict[str, str] = {}
    for name, target in entries:
        if name in found:
            raise ValueError(f"pass '{name}' is registered twice: {found[name]} and {target}")
        found[name] = target
    return MappingProxyType(found)


PASSES = table(
    [
        ("align.router", "moecompress.passes.align_router:AlignRouter"),
        ("allocate.global", "moecompress.passes.allocate_global:AllocateGlobal"),
        ("allocate.pmq", "moecompress.passes.allocate_pmq:AllocatePMQ"),
        ("merge.dern", "moecompress.passes.merge_dern:MergeDERN"),
        ("merge.hc_smoe", "moecompress.passes.merge_hc_smoe:MergeHCSMoE"),
        ("merge.m_smoe", "moecompress.passes.merge_m_smoe:MergeMSMoE"),
        ("merge.uncurl", "moecompress.passes.merge_uncurl:MergeUncurl"),
        ("prune.ean", "moecompress.passes.prune_ean:PruneEAN"),
        ("prune.easy_ep", "moecompress.passes.prune_easy_ep:PruneEasyEP"),
        ("prune.frequency", "moecompress.passes.prune_frequency:PruneFrequency"),
        ("prune.gate", "moecompress.passes.prune_gate:PruneGate"),
        ("prune.neurons", "moecompress.passes.prune_neurons:PruneNeurons"),
        ("prune.odp", "moecompress.passes.prune_odp:PruneODP"),
        ("prune.otp", "moecompress.passes.prune_otp:PruneOTP"),
        ("prune.random", "moecompress.passes.prune_random:PruneRandom"),
        ("prune.reap", "moecompress.passes.prune_reap:PruneREAP"),
        ("prune.score", "moecompress.passes.prune_score:PruneScore"),
        ("prune.top_k", "moecompress.passes.prune_top_k:PruneTopK"),
        ("quantize.gptq", "moecompress.passes.quantize_gptq:QuantizeGPTQ"),
        ("quantize.hqq", "moecompress.passes.quantize_hqq:QuantizeHQQ"),
        ("quantize.learned", "moecompress.passes.quantize_learned:QuantizeLearned"),
        ("quantize.rtn", "moecompress.passes.quantize_rtn:QuantizeRTN"),
        ("rotate.hadamard", "moecompress.passes.rotate_hadamard:RotateHadamard"),
        ("rotate.duquant", "moecompress.passes.rotate_duquant:RotateDuQuant"),
        ("smooth.awq", "moecompress.passes.smooth_awq:SmoothAWQ"),
        ("smooth.expert", "moecompress.passes.smooth_expert:SmoothExpert"),
    ]
)


def pass_names() -> tuple[str, ...]:
    """Every name a recipe may use, sorted."""
    return tuple(sorted(PASSES))


def pass_class(name: str) -> type[Any]:
    """The class behind a recipe's pass name: a frozen pydantic model whose fields are the recipe keys.

    Raises RecipeError for an unknown name, with the nearest name and the whole list.
    """
    if name not in PASSES:
        raise RecipeError(f"unknown pass '{name}'{suggest(name, PASSES)}")
    module, _, attribute = PASSES[name].partition(":")
    found = getattr(importlib.import_module(module), attribute)
    if not (isinstance(found, type) and issubclass(found, BaseModel)):
        raise TypeError(f"pass '{name}': {PASSES[name]} is not a pydantic model")
    return found
