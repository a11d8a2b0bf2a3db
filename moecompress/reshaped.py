"""What becomes of the model's shape when passes remove experts: facts per pass, config.json, tensors that go."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moecompress.arch.sites import router_matrix
from moecompress.errors import UnsupportedModel, message
from moecompress.passes.base import Pass
from moecompress.stream.model import StreamModel
from moecompress.stream.resize import check_uneven, with_resized
from moecompress.types import ModelFacts, MoESite

_EXTRA = re.compile(r"(.*?\bmtp|.*?\blayers\.\d+)\.")  # a block of layers for multi-token prediction
_EXTRA_COUNTS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")


@dataclass(frozen=True)
class Reshaped:
    """model: it also runs with fewer experts. stages: facts before every pass, and after the last one.

    native: why only the native format can hold the result, or None.
    """

    model: StreamModel
    stages: tuple[ModelFacts, ...]
    config: Mapping[str, Any]
    dropped: frozenset[str]
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    native: str | None


def reshape(model: StreamModel, passes: Sequence[Pass]) -> Reshaped:
    """Follow the passes through the model's shape. A pass that cannot run leaves the shape as it is."""
    stages, problems, resized, unknown = [model.facts], [], False, False
    for position, step in enumerate(passes):
        problems += _coded_routers(step, passes[:position], stages[-1])
        after = stages[-1] if step.check(stages[-1]) else step.reshape(stages[-1])
        try:
            if after is stages[-1]:
                pass
            elif len(set(_shapes(after))) > 1 or step.uneven:
                if resized:
                    raise UnsupportedModel("other numbers of experts per layer after an earlier pass removed some")
                check_uneven(model, after)
                unknown |= step.uneven
            elif _shapes(after) != _shapes(stages[-1]):
                model, resized = with_resized(model, after), True
        except UnsupportedModel as error:
            problems.append(f"{step.name}: {error}")
            after = stages[-1]
        stages.append(after)
    sites = _sites(stages[-1])
    shared = any(site.shared_ids is not None for site in sites)
    uneven = unknown or len({site.choices for site in sites}) > 1
    native = "layers have different numbers of experts" if uneven else "ids of the router share experts"
    made = None if uneven else model.resized.get(sites[0].choices)
    config, dropped, warnings = dict(model.raw_config if made is None else made.raw_config), frozenset[str](), []
    moved = bool(passes) and passes[0].moves_residual
    if moved:
        config = untied(model, config)
    if made is not None or moved:
        dropped = _extra_layers(model)
    if dropped:
        _without_extra_layers(config)
        warnings.append(
            f"{len(dropped)} tensors of layers for multi-token prediction are dropped: they fit the source only"
        )
    reason = native if shared or uneven else None
    return Reshaped(model, tuple(stages), config, dropped, tuple(problems), tuple(warnings), reason)


def _coded_routers(step: Pass, before: Sequence[Pass], facts: ModelFacts) -> list[str]:
    """Rows cannot leave a router that has codes already."""
    for earlier in before if step.removes_experts else ():
        for layer in facts.moe_layers:
            names = router_matrix(layer)
            if names is not None and names[0] in earlier.schemes(layer):
                then = f"put {step.name} before it"
                return [message(f"{step.name}", f"{earlier.name} before it gives codes to the routers", then=then)]
    return []


def untied(model: StreamModel, config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a model whose head has weights of its own."""
    return {**config, "tie_word_embeddings": False} if model.tied else dict(config)


def _sites(facts: ModelFacts) -> list[MoESite]:
    return [layer.site for layer in facts.moe_layers if layer.site is not None]


def _shapes(facts: ModelFacts) -> list[tuple[int, ...]]:
    """What of every MoE layer the configuration has to say."""
    return [(site.choices, site.top_k, site.groups, site.top_groups, site.width) for site in _sites(facts)]


def _extra_layers(model: StreamModel) -> frozenset[str]:
    """Tensors that transformers does not load, of blocks with experts of their own (and their FP8 scales)."""
    blocks = {key: match[1] for key in model.key_map.unmapped if (match := _EXTRA.match(key))}
    routed = {block for key, block in blocks.items() if ".experts." in key}
    found = {key for key, block in blocks.items() if block in routed}
    return frozenset(found | {f"{key}_scale_inv" for key in found} & set(model.index.tensors))


def _without_extra_layers(config: dict[str, Any]) -> None:
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        part.update({name: 0 for name in _EXTRA_COUNTS if name in part})
