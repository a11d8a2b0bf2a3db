"""Checkpoint keys <-> module tensors, through transformers' own conversion tables.

The only file that uses the conversion internals of transformers 5.x (`core_model_loading`, `conversion_mapping`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moecompress.errors import CheckpointError, message


@dataclass(frozen=True)
class Assembly:
    """How one module tensor (or several made together) comes from checkpoint tensors.

    targets: module names; sources: (pattern, key) in transformers' natural order; converter: None = renamed only.
    """

    targets: tuple[str, ...]
    sources: tuple[tuple[str, str], ...]
    converter: Any = None

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(key for _, key in self.sources)

    @property
    def patterns(self) -> tuple[str, ...]:
        """The source patterns of the conversion, as transformers' table has them; () when renamed only."""
        return () if self.converter is None else tuple(self.converter._original_source_patterns)


@dataclass(frozen=True)
class KeyMap:
    """assemblies: every module tensor -> its assembly. unmapped: checkpoint keys that no module tensor takes."""

    assemblies: Mapping[str, Assembly]
    unmapped: tuple[str, ...]


def build_key_map(model: Any, keys: Iterable[str]) -> KeyMap:
    """Map every checkpoint key to the module tensor it feeds. `model` is a skeleton on the meta device."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    names = model.state_dict()
    table = get_model_conversion_mapping(model)
    renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in table if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    prefix = model.base_model_prefix
    sources: dict[str, list[tuple[str, str]]] = {}
    chosen: dict[str, Any] = {}
    unmapped: list[str] = []
    for key in sorted(keys, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, prefix, names)
        if target not in names and key in names:
            target, pattern = rename_source_key(key, [], [], prefix, names)
        if target not in names:
            unmapped.append(key)
            continue
        sources.setdefault(target, []).append((pattern or key, key))
        chosen[target] = by_pattern[pattern] if pattern is not None else None
    assemblies: dict[str, Assembly] = {}
    for first, pairs in sources.items():
        converter = chosen[first]
        targets: tuple[str, ...] = (first,)
        if converter is not None:
            head = converter.target_patterns[0]
            targets = tuple(first.replace(head, other) for other in converter.target_patterns)
        elif len(pairs) > 1:
            raise CheckpointError(message(first, f"two checkpoint tensors claim it: {[k for _, k in pairs]}", "one"))
        assembly = Assembly(targets, tuple(pairs), converter)
        assemblies.update(dict.fromkeys(targets, assembly))
    return KeyMap(assemblies, tuple(unmapped))


def assemble(assembly: Assembly, read: Callable[[str], Tensor], model: Any) -> dict[str, Tensor]:
    """Run the assembly: read its checkpoint tensors and convert them. Returns module name -> tensor.

    Raises CheckpointError naming the tensors when transformers' conversion cannot digest them.
    """
    if assembly.converter is None:
        return {assembly.targets[0]: read(assembly.sources[0][1])}
    converter = deepcopy(assembly.converter)
    for pattern, key in assembly.sources:
        converter.add_tensor(assembly.targets[0], key, pattern, read(key))
    try:
        made = converter.convert(assembly.targets[0], model=model, config=model.config)
    except Exception as error:  # transformers raises many types here; the user needs the tensor names
        raise CheckpointError(
            message(assembly.targets[0], f"cannot be built from {list(assembly.keys)[:4]}...: {error}")
        ) from error
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def disassemble(assembly: Assembly, tensors: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """The inverse of `assemble`: module tensors back to checkpoint tensors under their original keys.

    Raises CheckpointError when the conversion is not invertible or produces other keys than it came from.
    """
    if assembly.converter is None:
        return {assembly.sources[0][1]: tensors[assembly.targets[0]]}
    reverse = assembly.converter.reverse_transform()
    first = assembly.targets[0]
    renamed = first
    for name in assembly.targets:
        renamed, pattern = reverse.rename_source_key(name)
        reverse.add_tensor(renamed, name, pattern, tensors[name])
    made = reverse.convert(renamed, model=model, config=model.config)
    values = {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
    return _original_names(assembly, values)


def _original_names(assembly: Assembly, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Match reverse-converted names to the keys they came from: same order within each source pattern."""
    from transformers.core_model_loading import dot_natural_key

    names = sorted(values, key=dot_natural_key)
    keys = sorted(assembly.keys, key=dot_natural_key)
    if len(names) != len(keys):
        raise CheckpointError(
            message(assembly.targets[0], f"{len(keys)} tensors in, {len(names)} out of the inverse conversion")
        )
    return {key: values[name] for name, key in zip(names, keys, strict=True)}
