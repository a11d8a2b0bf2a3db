"""What becomes of the model's shape when passes remove experts: facts per pass, config.json, tensors that go."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moecompress.errors import UnsupportedModel
from moecompress.passes.base import Pass
from moecompress.stream.model import StreamModel
from moecompress.stream.resize import with_resized
from moecompress.types import ModelFacts

_EXTRA = re.compile(r"(.*?\bmtp|.*?\blayers\.\d+)\.")  # a block of layers for multi-token prediction
_EXTRA_COUNTS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")


@dataclass(frozen=True)
class Reshaped:
    """model: it also runs with fewer experts. stages: facts before every pass, and after the last one."""

    model: StreamModel
    stages: tuple[ModelFacts, ...]
    config: Mapping[str, Any]
    dropped: frozenset[str]
    problems: tuple[str, ...]
    warnings: tuple[str, ...]


def reshape(model: StreamModel, passes: Sequence[Pass]) -> Reshaped:
    """Follow the passes through the model's shape. A pass that cannot run leaves the shape as it is."""
    stages, problems = [model.facts], []
    for step in passes:
        after = stages[-1] if step.check(stages[-1]) else step.reshape(stages[-1])
        if _experts(after) != _experts(stages[-1]):
            try:
                model = with_resized(model, after)
            except UnsupportedModel as error:
                problems.append(f"{step.name}: {error}")
                after = stages[-1]
        stages.append(after)
    resized = model.resized.get(_experts(stages[-1]))
    if resized is None:
        return Reshaped(model, tuple(stages), model.raw_config, frozenset(), tuple(problems), ())
    dropped = _extra_layers(model)
    config = dict(resized.raw_config)
    warnings: tuple[str, ...] = ()
    if dropped:
        _without_extra_layers(config)
        warnings = (f"{len(dropped)} tensors of layers for multi-token prediction are dropped, as experts are removed",)
    return Reshaped(model, tuple(stages), config, dropped, tuple(problems), warnings)


def _experts(facts: ModelFacts) -> int:
    site = facts.moe_layers[0].site
    assert site is not None
    return site.num_experts


def _extra_layers(model: StreamModel) -> frozenset[str]:
    """Tensors that transformers does not load, of blocks with experts of their own (and their FP8 scales)."""
    blocks = {key: match[1] for key in model.key_map.unmapped if (match := _EXTRA.match(key))}
    routed = {block for key, block in blocks.items() if ".experts." in key}
    found = {key for key, block in blocks.items() if block in routed}
    return frozenset(found | {f"{key}_scale_inv" for key in found} & set(model.index.tensors))


def _without_extra_layers(config: dict[str, Any]) -> None:
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        part.update({name: 0 for name in _EXTRA_COUNTS if name in part})
