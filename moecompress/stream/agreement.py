"""Whether config.json and the tensors of a checkpoint agree, told from headers before anything is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from moecompress.errors import CheckpointError, message
from moecompress.stream.expert_source import ExpertSource
from moecompress.stream.mapping import KeyMap

ShapeOf = Callable[[str], tuple[int, ...]]
_LAYER = re.compile(r"^(.*\blayers\.)(\d+)\.")
_MORE_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")


def check_agreement(
    root: Path,
    skeleton: Any,
    key_map: KeyMap,
    sources: Iterable[ExpertSource],
    shape: ShapeOf,
    given: Callable[[str], bool],
) -> None:
    """Every module tensor has a source of its shape, and no decoder layer is left over.

    shape: of a checkpoint tensor. given: whether a module tensor comes from elsewhere (records, a tied tensor).
    Raises CheckpointError with the first few of the tensors that are missing, wrong or left over.
    """
    names = skeleton.state_dict()
    missing = [name for name in names if name not in key_map.assemblies and not given(name)]
    if missing:
        raise CheckpointError(
            message(str(root), f"{len(missing)} tensors are missing, first {missing[:3]}", then="download it again")
        )
    expected = {}
    for name, value in names.items():
        assembly = key_map.assemblies.get(name)
        if assembly is not None and assembly.converter is None:
            expected[assembly.keys[0]] = tuple(value.shape)
    for source in sources:
        expected.update(_expert_shapes(source, names))
    wrong = [
        f"{key} is {list(shape(key))}, config says {list(size)}" for key, size in expected.items() if shape(key) != size
    ]
    if wrong:
        raise CheckpointError(
            message(str(root), f"config.json contradicts {len(wrong)} tensors: {'; '.join(wrong[:3])}", "equal shapes")
        )
    _check_layers(root, skeleton, key_map)


def _expert_shapes(source: ExpertSource, names: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape that the config gives to every expert tensor that is stored by itself."""
    found: dict[str, tuple[int, ...]] = {}
    for part in source.projections.values():
        if part.kind == "per_expert":
            _, rows, columns = names[part.assembly.targets[0]].shape
            for keys in part.keys:
                found.update(dict.fromkeys(keys, (rows // len(keys), columns)))
    return found


def _check_layers(root: Path, skeleton: Any, key_map: KeyMap) -> None:
    """Layers behind the last one must be announced (multi-token prediction), or the config is another model's."""
    mapped = (_LAYER.match(key) for assembly in key_map.assemblies.values() for key in assembly.keys)
    lists = {found[1] for found in mapped if found}
    known = getattr(skeleton, "_keys_to_ignore_on_load_unexpected", None) or ()
    extra = set()
    for key in key_map.unmapped:
        found = _LAYER.match(key)
        if found and found[1] in lists and not any(re.search(pattern, key) for pattern in known):
            extra.add(int(found[2]))
    configs = (skeleton.config, skeleton.config.get_text_config())
    allowed = max((getattr(config, key, 0) or 0) for config in configs for key in _MORE_LAYERS)
    if len(extra) > allowed:
        count = skeleton.config.get_text_config().num_hidden_layers
        found_text = f"num_hidden_layers is {count}, but there are tensors of layers {sorted(extra)[:8]}"
        raise CheckpointError(message(str(root / "config.json"), found_text, then="correct config.json"))
