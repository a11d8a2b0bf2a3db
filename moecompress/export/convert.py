"""One layer of an output in another format: its entries, and what became of every tensor of the source."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from moecompress.checkpoint.gptq import gptq_entries
from moecompress.checkpoint.portable import packed_entries
from moecompress.checkpoint.writer import Buffer, Entry, copy_entry, tensor_entry
from moecompress.errors import OutputError, message
from moecompress.export.fit import ExportFormat, fitted
from moecompress.export.source import Output
from moecompress.numerics.grids import dequantize
from moecompress.numerics.turn import without_turns
from moecompress.portable import expert_matrices
from moecompress.stream.expert_source import OutTensor, dense_tensors
from moecompress.stream.mapping import disassemble
from moecompress.types import PROJECTIONS, ExpertWeights, QuantizedTensor, Scheme, Weight


@dataclass(frozen=True)
class Target:
    """What is written. experts, linears: the one scheme of each kind, None where every matrix keeps its own."""

    format: ExportFormat
    experts: Scheme | None
    linears: Scheme | None
    allow_lossy: bool
    dtype: torch.dtype  # of scales and expanded weights


@dataclass
class Converted:
    """entries: in writing order. rows: source tensor -> manifest row. schemes: checkpoint module -> its scheme.

    shapes: checkpoint module -> [out, in].
    """

    entries: list[Entry] = field(default_factory=list)
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    schemes: dict[str, Scheme] = field(default_factory=dict)
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add(self, module: str, weight: QuantizedTensor, target: Target) -> None:
        """One quantized matrix under its checkpoint module."""
        if target.format == "gptq":
            entries = gptq_entries(module, weight, allow_lossy=target.allow_lossy)
        else:
            entries = packed_entries(module, weight)
        self.entries += entries
        self.schemes[module], self.shapes[module] = weight.scheme, (weight.shape[0], weight.shape[1])
        self.note([f"{module}.weight"], "quantize", [entry.name for entry in entries], weight.scheme)

    def note(self, keys: Iterable[str], action: str, outputs: Sequence[str], scheme: Scheme | None = None) -> None:
        bits, group = (scheme.bits, scheme.group_size) if scheme else (None, None)
        self.rows |= dict.fromkeys(
            keys, {"action": action, "bits": bits, "group_size": group, "outputs": list(outputs)}
        )


def convert_layer(output: Output, target: Target, index: int | None) -> Converted:
    """Experts, then other quantized matrices, then everything else, byte for byte. index None: outside the layers.

    Raises OutputError for values that the format cannot hold.
    """
    made = Converted()
    rewritten: set[str] = set()
    if index is not None:
        try:
            if index in output.sources:
                _experts(output, target, index, made)
            rewritten = _linears(output, target, index, made)
        except ValueError as error:
            raise OutputError(message(f"--format {target.format}", str(error), then="choose another format")) from None
    kept = {entry.name for entry in made.entries} | rewritten
    for name in output.plain.get(index, ()):
        if name not in kept:
            made.entries.append(copy_entry(output.model.reader, name))
            made.note([name], "copy", [name])
    return made


def _experts(output: Output, target: Target, index: int, made: Converted) -> None:
    source, experts = output.sources[index], output.model.read_experts(index)
    if target.format == "dense":
        experts = tuple(map(without_turns, experts))
        tensors = dense_tensors(source, experts, lambda weight: expanded(weight, target.dtype), output.model.skeleton)
        made.entries += [_out_entry(tensor) for tensor in tensors]
        for tensor in tensors:
            made.note([tensor.key], "dequantize", [tensor.key])
        return
    coded = [_fitted_expert(expert, target) for expert in experts]
    for _, _, module, weight in expert_matrices(source, coded):
        made.add(module, weight, target)


def _fitted_expert(expert: ExpertWeights, target: Target) -> ExpertWeights:
    for name in PROJECTIONS:
        expert = expert.with_projection(name, fitted(expert.projection(name), target.experts, target.dtype))
    return expert


def _linears(output: Output, target: Target, index: int, made: Converted) -> set[str]:
    """The quantized matrices of one layer that are no experts; returns the stored names that they stand for."""
    layer = output.model.facts.layers[index]
    names = [name for name in layer.linears if f"{layer.name}.{name}".removesuffix(".weight") in output.linears]
    if not names:
        return set()
    tensors: Mapping[str, Weight] = output.model.read_tensors(index)
    done: set[str] = set()
    for name in names:
        full = f"{layer.name}.{name}"
        assembly, weight = output.key_map.assemblies[full], tensors[name]
        assert isinstance(weight, QuantizedTensor)
        if target.format != "dense":
            if assembly.converter is not None or not assembly.keys[0].endswith(".weight"):
                raise ValueError(f"{full} was stored in another shape in the source")
            made.add(assembly.keys[0].removesuffix(".weight"), fitted(weight, target.linears, target.dtype), target)
        elif full not in done:
            values = {t: expanded(tensors[t.removeprefix(layer.name + ".")], target.dtype) for t in assembly.targets}
            dense = disassemble(assembly, values, output.model.skeleton)
            made.entries += [tensor_entry(key, value) for key, value in dense.items()]
            made.note(assembly.keys, "dequantize", list(dense))
            done |= set(assembly.targets)
    return done


def expanded(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The matrix without codes, rounded once."""
    return dequantize(weight, dtype) if isinstance(weight, QuantizedTensor) else weight


def same_values(output: Output, written: Output, index: int) -> bool:
    """Whether the experts of one layer in two directories are equal, value for value."""
    pairs = zip(output.model.read_experts(index), written.model.read_experts(index), strict=True)
    return all(
        torch.equal(expanded(a.projection(name), torch.float32), expanded(b.projection(name), torch.float32))
        for a, b in pairs
        for name in PROJECTIONS
    )


def without_biases(output: Output) -> Output:
    """The same output with the experts' biases left to the tensors that hold them (they are stored plainly)."""
    return replace(output, sources={i: replace(source, biases={}) for i, source in output.sources.items()})


def _out_entry(tensor: OutTensor) -> Entry:
    def data() -> Iterator[Buffer]:
        for part in tensor.parts():
            yield from tensor_entry(tensor.key, part).data()

    return Entry(tensor.key, tensor.dtype, tensor.shape, data)
