"""What is in an output directory: its quantized matrices and the checkpoint names that they had in the source."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moecompress.checkpoint.native_check import is_native_tensor
from moecompress.checkpoint.portable_reader import PortableReader
from moecompress.errors import CheckpointError, OutputError, message
from moecompress.portable import Layout
from moecompress.stream.expert_source import ExpertSource, expert_source
from moecompress.stream.inventory import owners
from moecompress.stream.mapping import KeyMap, build_key_map
from moecompress.stream.model import StreamModel, open_model
from moecompress.types import PROJECTIONS, Scheme

_NUMBER = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class Output:
    """A native or portable directory.

    rows: its manifest, source tensor -> what became of it. sources: where each layer's experts were in the source.
    linears: module name of every other quantized matrix -> its module in the checkpoint. key_map: of the source.
    plain: layer (None: outside) -> stored tensors without codes.
    """

    root: Path
    model: StreamModel
    rows: Mapping[str, Mapping[str, Any]]
    key_map: KeyMap
    sources: Mapping[int, ExpertSource]
    linears: Mapping[str, str]
    plain: Mapping[int | None, tuple[str, ...]]

    @property
    def layout(self) -> Layout:
        return Layout(self.model, self.key_map, self.sources)

    def expert_schemes(self) -> set[Scheme]:
        """How the routed experts are stored; 16 bits where they are not quantized."""
        native, reader = self.model.native, self.model.reader
        if native is not None:
            layouts = [record for module in native.experts.values() for record in module.records]
            found = {matrix.scheme for layout in layouts for _, matrix in layout.matrices}
            whole = len(native.experts) == len(self.sources)
        else:
            assert isinstance(reader, PortableReader)
            keys = [key for source in self.sources.values() for name in PROJECTIONS for key in _keys(source, name)]
            found = {scheme for key in keys if (scheme := reader.scheme(key)) is not None}
            whole = all(reader.is_packed(key) for key in keys)
        return found if whole else found | {Scheme(16)}

    def linear_schemes(self) -> set[Scheme]:
        """How the other quantized matrices are stored."""
        native, reader = self.model.native, self.model.reader
        if native is not None:
            return {matrix.scheme for layout in native.linears.values() for _, matrix in layout.matrices}
        assert isinstance(reader, PortableReader)
        found = {reader.scheme(f"{module}.weight") for module in self.linears.values()}
        return {scheme for scheme in found if scheme is not None}


def open_output(root: Path) -> Output:
    """Open a directory that `run` or `export` has written.

    Raises OutputError when it holds no codes, CheckpointError when a native one has no manifest.
    """
    model = open_model(root)
    if not model.compressed:
        then = "export converts native and portable outputs; a dense one is already plain"
        raise OutputError(message(str(root), "holds no quantized weights", then=then))
    rows = _manifest(root, required=model.native is not None)
    stored = model.reader.names()
    key_map = model.key_map
    if model.native is not None:
        stored = [name for name in stored if not is_native_tensor(model.native, name)]
        key_map = build_key_map(model.skeleton, [*stored, *_replaced(model, rows, set(stored))])
    sources = {
        layer.index: expert_source(f"{layer.name}.{layer.site.experts}", layer.site, key_map)
        for layer in model.facts.moe_layers
        if layer.site is not None
    }
    reader = model.reader
    packed = {name for name in stored if isinstance(reader, PortableReader) and reader.is_packed(name)}
    return Output(
        root,
        model,
        rows,
        key_map,
        sources,
        _linears(model, key_map, sources, packed),
        _plain(model, [name for name in stored if name not in packed]),
    )


def _keys(source: ExpertSource, name: str) -> tuple[str, ...]:
    return source.projections[name].assembly.keys  # type: ignore[index]


def _manifest(root: Path, required: bool) -> Mapping[str, Mapping[str, Any]]:
    path = root / "moecompress" / "manifest.json"
    try:
        rows = json.loads(path.read_text("utf-8"))["tensors"]
        return {str(key): dict(row) for key, row in rows.items()}
    except FileNotFoundError:
        if not required:
            return {}
        found, then = "no such file", "give the whole directory that `moecompress run` has written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        found, then = f"not a manifest ({type(error).__name__})", "copy the directory again"
    raise CheckpointError(message(str(path), found, "the names of the source's tensors", then))


def _replaced(model: StreamModel, rows: Mapping[str, Mapping[str, Any]], stored: set[str]) -> list[str]:
    """Source tensors that became records: all names of the source that are not stored any more.

    Experts are numbered anew, so names of single ones are those of the first numbers, whichever experts went. Raises
    OutputError where layers have different numbers of experts.
    """
    counts = {layer.site.num_experts for layer in model.facts.moe_layers if layer.site is not None}
    if len(counts) > 1:
        found, then = f"layers have {sorted(counts)} experts", "run again with uneven_layers: pad or uniformize"
        raise OutputError(message(str(model.root), found, "one number, which other formats' configurations name", then))
    names = []
    for key, row in rows.items():
        if key in stored or row.get("action") == "consume":
            continue
        number = _NUMBER.search(key)
        if int(number[1]) < max(counts) if number else row.get("action") != "drop":
            names.append(key)
    return names


def _linears(
    model: StreamModel, key_map: KeyMap, sources: Mapping[int, ExpertSource], packed: set[str]
) -> dict[str, str]:
    if model.native is not None:
        names = [f"{module}.weight" for module in model.native.linears]
    else:
        routed = {key for source in sources.values() for key in source.checkpoint_keys}
        names = [t for t, a in key_map.assemblies.items() if a.keys[0] in packed and a.keys[0] not in routed]
    missing = [name for name in names if name not in key_map.assemblies]
    if missing:
        raise CheckpointError(message(missing[0], "the manifest does not say what it was made from"))
    return {name.removesuffix(".weight"): key_map.assemblies[name].keys[0].removesuffix(".weight") for name in names}


def _plain(model: StreamModel, stored: list[str]) -> dict[int | None, tuple[str, ...]]:
    owned = owners(model)
    found: dict[int | None, list[str]] = {}
    for name in stored:
        found.setdefault(owned[name].layer, []).append(name)
    return {layer: tuple(names) for layer, names in found.items()}
