"""Routed experts of one layer as the checkpoint stores them: read one expert, write all back under the same keys.

Three storage kinds cover every family: `per_expert` (2-D tensors, gate and up apart), `stacked` (3-D tensors like
the module's) and `converted` (anything else: transformers converts the whole layer, so all its experts are in memory).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from moecompress.errors import CheckpointError, message
from moecompress.stream.mapping import Assembly, KeyMap, assemble, disassemble
from moecompress.types import PROJECTIONS, ExpertWeights, MoESite, Projection, QuantizedTensor, Weight

Kind = Literal["per_expert", "stacked", "converted"]
Read = Callable[..., Tensor]  # read(key, start=None, stop=None)
ReadWeight = Callable[[str], Weight]  # one whole matrix, with its codes where it is stored so


@dataclass(frozen=True)
class ProjectionSource:
    """One projection of all experts: its storage kind, keys (per expert: one tuple of row blocks) and assembly."""

    kind: Kind
    assembly: Assembly
    keys: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class ExpertSource:
    """Where all routed-expert tensors of one layer are."""

    prefix: str  # module name of the experts
    site: MoESite
    projections: Mapping[Projection, ProjectionSource]
    biases: Mapping[Projection, Assembly]

    @property
    def checkpoint_keys(self) -> tuple[str, ...]:
        """Every checkpoint tensor that holds routed experts of this layer."""
        made = [*self.projections.values()]
        return tuple(key for part in made for key in part.assembly.keys) + tuple(
            key for assembly in self.biases.values() for key in assembly.keys
        )


def expert_source(prefix: str, site: MoESite, key_map: KeyMap) -> ExpertSource:
    """Describe the storage of one layer's experts. Raises CheckpointError when tensors are missing."""
    names: dict[Projection, str] = {"gate_up": site.gate_up_name, "down": "down_proj"}
    projections: dict[Projection, ProjectionSource] = {}
    biases: dict[Projection, Assembly] = {}
    for projection, leaf in names.items():
        projections[projection] = _projection(f"{prefix}.{leaf}", site, key_map)
        if site.has_bias:
            biases[projection] = _assembly(f"{prefix}.{leaf}_bias", key_map)
    return ExpertSource(prefix, site, projections, biases)


def _assembly(name: str, key_map: KeyMap) -> Assembly:
    if name not in key_map.assemblies:
        raise CheckpointError(message(name, "no tensor of the checkpoint provides it", then="is a shard missing?"))
    return key_map.assemblies[name]


def _projection(name: str, site: MoESite, key_map: KeyMap) -> ProjectionSource:
    assembly = _assembly(name, key_map)
    if assembly.converter is None:
        return ProjectionSource("stacked", assembly)
    operations = [(type(op).__name__, getattr(op, "dim", None)) for op in assembly.converter.operations]
    patterns = assembly.converter.source_patterns
    simple = operations in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])
    if not simple or len(assembly.targets) != 1 or site.transposed or (len(patterns) > 1) != (len(operations) > 1):
        return ProjectionSource("converted", assembly)
    columns = [[key for pattern, key in assembly.sources if pattern == wanted] for wanted in patterns]
    if any(len(column) != site.num_experts for column in columns):
        counts = [len(column) for column in columns]
        raise CheckpointError(
            message(name, f"{counts} expert tensors in the checkpoint", f"{site.num_experts} (config.json)")
        )
    return ProjectionSource("per_expert", assembly, tuple(zip(*columns, strict=True)))


class ExpertReader:
    """Reads experts of one layer in canonical layout. Holds the converted stack while a `converted` layer is read.

    read_weight: how one expert's own matrix is read, where that is not `read`.
    """

    def __init__(self, source: ExpertSource, read: Read, model: Any, read_weight: ReadWeight | None = None) -> None:
        self._source, self._read, self._model = source, read, model
        self._read_weight = read_weight or read
        self._stacks: dict[Projection, Tensor] = {}
        self._biases = {
            name: assemble(assembly, read, model)[assembly.targets[0]] for name, assembly in source.biases.items()
        }

    def expert(self, index: int) -> ExpertWeights:
        """One expert: gate_up [2I, H] and down [H, I] in the stored dtype, contiguous."""
        weights = {name: self._weight(name, index) for name in PROJECTIONS}
        biases = {name: None if name not in self._biases else self._biases[name][index].clone() for name in PROJECTIONS}
        return ExpertWeights(weights["gate_up"], weights["down"], biases["gate_up"], biases["down"])

    def _weight(self, name: Projection, index: int) -> Weight:
        part = self._source.projections[name]
        if part.kind == "per_expert":
            return _joined([self._read_weight(key) for key in part.keys[index]])
        if part.kind == "stacked":
            matrix = self._read(part.assembly.keys[0], index, index + 1)[0]
        else:
            if name not in self._stacks:
                self._stacks[name] = self._converted(part.assembly)
            matrix = self._stacks[name][index].clone()
        return matrix.T.contiguous() if self._source.site.transposed else matrix

    def _converted(self, assembly: Assembly) -> Tensor:
        name = assembly.targets[0]
        stack = assemble(assembly, self._read, self._model)[name]
        wanted = self._model.get_parameter(name).shape
        if stack.shape != wanted:
            found = f"{list(stack.shape)} from {list(assembly.keys)[:3]}"
            raise CheckpointError(message(name, found, f"{list(wanted)} (config.json)"))
        return stack


def _joined(blocks: list[Weight]) -> Weight:
    """Row blocks of one matrix as one. Raises CheckpointError when they are not stored alike."""
    if len(blocks) == 1:
        return blocks[0]
    dense = [block for block in blocks if isinstance(block, Tensor)]
    if len(dense) == len(blocks):
        return torch.cat(dense)
    coded = [block for block in blocks if isinstance(block, QuantizedTensor)]
    if dense or len({block.scheme for block in coded}) > 1 or coded[0].zeros is not None:
        raise CheckpointError(message("expert", "gate and up are not quantized alike", "one scheme"))
    codes, scales = (torch.cat([getattr(block, part) for block in coded]) for part in ("codes", "scales"))
    return QuantizedTensor(codes, scales, None, coded[0].scheme)


@dataclass(frozen=True)
class OutTensor:
    """One checkpoint tensor to be written: its key, dtype, shape, and its parts in order (made when asked)."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Callable[[], Iterator[Tensor]]


def dense_tensors(
    source: ExpertSource,
    experts: Sequence[ExpertWeights],
    dense: Callable[[Any], Tensor],
    model: Any,
    stored: Mapping[str, tuple[int, ...]] | None = None,
) -> list[OutTensor]:
    """Checkpoint tensors of one layer's experts under their original keys, in the original layout.

    dense: turns a weight (dense or quantized) into a tensor of the output dtype. The number of experts may differ
    from the source's when it is stored stacked or per expert (renumbered from 0). model: the module tree with as many
    experts. stored: shapes in the source, where a stack may lie the other way round than transformers would save it.
    """
    out: list[OutTensor] = []
    for name in PROJECTIONS:
        part = source.projections[name]
        if part.kind == "per_expert":
            out += _per_expert(part, experts, name, dense)
        elif part.kind == "stacked":
            out.append(_stacked(part, experts, name, dense, source.site.transposed))
        else:
            out += _converted(part, experts, name, dense, source.site.transposed, model, stored or {})
        if name in source.biases:
            values = torch.stack([_bias(expert, name) for expert in experts])
            made = disassemble(source.biases[name], {source.biases[name].targets[0]: values}, model)
            out += [_whole(key, value) for key, value in made.items()]
    return out


def _bias(expert: ExpertWeights, name: Projection) -> Tensor:
    bias = expert.gate_up_bias if name == "gate_up" else expert.down_bias
    if bias is None:
        raise CheckpointError(message(f"{name} bias", "lost on the way", "one per expert"))
    return bias


def _whole(key: str, value: Tensor) -> OutTensor:
    return OutTensor(key, value.dtype, tuple(value.shape), lambda: iter((value.contiguous(),)))


def _per_expert(
    part: ProjectionSource, experts: Sequence[ExpertWeights], name: Projection, dense: Callable[[Any], Tensor]
) -> list[OutTensor]:
    out = []
    for keys, expert in zip(part.keys, experts, strict=False):
        weight = expert.projection(name)
        rows = weight.shape[0] // len(keys)
        dtype = dense_dtype(weight, dense)
        for block, key in enumerate(keys):

            def parts(weight: Any = weight, at: int = block * rows, rows: int = rows) -> Iterator[Tensor]:
                yield dense(weight)[at : at + rows].contiguous()

            out.append(OutTensor(key, dtype, (rows, weight.shape[1]), parts))
    return out


def dense_dtype(weight: Any, dense: Callable[[Any], Tensor]) -> torch.dtype:
    """The dtype that `dense` gives for this weight, found on one element."""
    return weight.dtype if isinstance(weight, Tensor) else dense(_corner(weight)).dtype


def _corner(weight: Any) -> Any:
    from dataclasses import replace

    zeros = None if weight.zeros is None else weight.zeros[:1]
    return replace(weight, codes=weight.codes[:1], scales=weight.scales[:1], zeros=zeros)


def _stacked(
    part: ProjectionSource,
    experts: Sequence[ExpertWeights],
    name: Projection,
    dense: Callable[[Any], Tensor],
    transposed: bool,
) -> OutTensor:
    first = experts[0].projection(name)
    rows, columns = first.shape
    shape = (len(experts), columns, rows) if transposed else (len(experts), rows, columns)

    def parts() -> Iterator[Tensor]:
        for expert in experts:
            matrix = dense(expert.projection(name))
            yield (matrix.T if transposed else matrix).contiguous()

    return OutTensor(part.assembly.keys[0], dense_dtype(first, dense), shape, parts)


def _converted(
    part: ProjectionSource,
    experts: Sequence[ExpertWeights],
    name: Projection,
    dense: Callable[[Any], Tensor],
    transposed: bool,
    model: Any,
    stored: Mapping[str, tuple[int, ...]],
) -> list[OutTensor]:
    matrices = [dense(expert.projection(name)) for expert in experts]
    stack = torch.stack([matrix.T if transposed else matrix for matrix in matrices])
    made = disassemble(part.assembly, {part.assembly.targets[0]: stack}, model)
    return [_whole(key, _laid_as(value, stored.get(key))) for key, value in made.items()]


def _laid_as(stack: Tensor, stored: tuple[int, ...] | None) -> Tensor:
    """A stack [E, a, b] with its matrices the way round that `stored` [E', a, b] has them; equal sizes tell nothing."""
    if stored is None or stack.dim() != 3 or tuple(stack.shape[1:]) != stored[:0:-1]:
        return stack
    return stack if tuple(stack.shape[1:]) == stored[1:] else stack.mT
