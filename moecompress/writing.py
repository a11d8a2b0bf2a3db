"""What goes into the output shards: entries, manifest rows and the native part of one layer, or of the rest."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from moecompress.checkpoint.native import RecordLayout, expert_entries, linear_entries
from moecompress.checkpoint.native_config import ExpertsLayout
from moecompress.checkpoint.native_gate import GateLayout, gate_entries, gate_layout
from moecompress.checkpoint.native_turns import turn_entries
from moecompress.checkpoint.portable import packed_entries
from moecompress.checkpoint.writer import Buffer, Entry, copy_entry, tensor_entry
from moecompress.errors import OutputError, message
from moecompress.portable import one_scheme, portable_experts
from moecompress.stream.expert_source import OutTensor, dense_tensors
from moecompress.stream.mapping import Assembly, disassemble
from moecompress.stream.model import StreamModel
from moecompress.types import PROJECTIONS, LayerWeights, QuantizedTensor, Scheme, Weight

Format = Literal["dense", "native", "portable"]


@dataclass
class Written:
    """Parts of the output that one layer (or the rest of the model) makes.

    manifest: source tensor -> {action, bits, group_size, outputs, error}. experts, linears, gates: for the native
    config block.
    portable: experts prefix or checkpoint module -> scheme, for the portable one.
    """

    entries: list[Entry] = field(default_factory=list)
    manifest: dict[str, dict[str, Any]] = field(default_factory=dict)
    experts: dict[str, ExpertsLayout] = field(default_factory=dict)
    linears: dict[str, RecordLayout] = field(default_factory=dict)
    gates: dict[str, GateLayout] = field(default_factory=dict)
    portable: dict[str, Scheme] = field(default_factory=dict)

    def note(self, keys: Iterable[str], action: str, outputs: Sequence[str], weight: Weight | None = None) -> None:
        """Account for source tensors."""
        scheme = weight.scheme if isinstance(weight, QuantizedTensor) else None
        row = {
            "action": action,
            "bits": scheme.bits if scheme else None,
            "group_size": scheme.group_size if scheme else None,
            "outputs": list(outputs),
            "error": None,
        }
        for key in keys:
            self.manifest[key] = dict(row)


def layer_output(model: StreamModel, original: LayerWeights, weights: LayerWeights, output: Format) -> Written:
    """Entries of one layer, expert-major. `weights` must be settled."""
    facts = model.facts.layers[weights.index]
    written = Written()
    if facts.site is not None:
        prefix = f"{facts.name}.{facts.site.experts}"
        if _same_experts(original, weights) and weights.gate is None:
            _copy(model, model.expert_sources[facts.index].checkpoint_keys, written)
        elif output == "native":
            _records(model, prefix, weights, written)
        elif output == "portable":
            _portable_experts(model, prefix, weights, written)
        else:
            _dense_experts(model, weights, written)
    done: set[int] = set()
    for name in facts.roles:
        assembly = model.key_map.assemblies[f"{facts.name}.{name}"]
        if id(assembly) not in done:
            done.add(id(assembly))
            _assembly(model, assembly, facts.name, original, weights, output, written)
    return written


def _same_experts(original: LayerWeights, weights: LayerWeights) -> bool:
    if len(original.experts) != len(weights.experts):
        return False
    pairs = zip(original.experts, weights.experts, strict=True)
    return all(value is vars(b)[name] for a, b in pairs for name, value in vars(a).items())


def _copy(model: StreamModel, keys: Iterable[str], written: Written) -> None:
    """Byte for byte, except that FP8 blocks (whose scales the plain formats cannot carry) become bfloat16."""
    for key in keys:
        info = model.index.tensors[key]
        if model.reader.logical_dtype(key) == info.dtype:
            written.entries.append(copy_entry(model.reader, key))
            written.note([key], "copy", [key])
        else:
            written.entries.append(Entry(key, torch.bfloat16, info.shape, partial(_read_bytes, model, key)))
            written.note([key, f"{key}_scale_inv"], "dequantize", [key])


def _read_bytes(model: StreamModel, key: str) -> Iterable[Buffer]:
    return tensor_entry(key, model.reader.read(key)).data()


def _records(model: StreamModel, prefix: str, weights: LayerWeights, written: Written) -> None:
    facts = model.facts.layers[weights.index]
    site, source = facts.site, model.expert_sources[weights.index]
    assert site is not None
    of_id = weights.experts if weights.slots is None else [weights.experts[place] for place in weights.slots]
    layouts, entries = expert_entries(prefix, weights.experts, weights.slots)
    turns, beside = turn_entries(prefix, of_id)
    written.entries += [*entries, *beside]
    written.experts[prefix] = ExpertsLayout(weights.choices, layouts, turns)
    if weights.gate is not None:
        written.entries += gate_entries(prefix, weights.gate)
        written.gates[prefix] = gate_layout(weights.gate, site.top_k)
    outputs = [entry.name for entry in (*entries, *beside)]
    for name, part in source.projections.items():
        action = "quantize" if isinstance(weights.experts[0].projection(name), QuantizedTensor) else "rewrite"
        if part.kind == "per_expert":
            written.note(part.assembly.keys, "drop", [])
            for number, expert in zip(weights.source_ids, weights.experts, strict=True):
                written.note(part.keys[number], action, outputs, expert.projection(name))
        else:
            written.note(part.assembly.keys, action, outputs, weights.experts[0].projection(name))
    for name, assembly in source.biases.items():
        biases = [e.gate_up_bias if name == "gate_up" else e.down_bias for e in of_id]
        stacked = torch.stack([bias for bias in biases if bias is not None])
        _write_dense(model, assembly, {assembly.targets[0]: stacked}, "copy", written)
    _note_companions(model, source.checkpoint_keys, written)


def _portable_experts(model: StreamModel, prefix: str, weights: LayerWeights, written: Written) -> None:
    source = model.expert_sources[weights.index]
    try:
        written.portable[prefix] = one_scheme(e.projection(name) for e in weights.experts for name in PROJECTIONS)
        entries = portable_experts(source, weights.experts)
    except ValueError as error:
        raise OutputError(message(f"{prefix}: output.format portable", str(error), then="use native")) from None
    written.entries += entries
    kept = {entry.name for entry in entries}
    for name, part in source.projections.items():
        written.note(part.assembly.keys, "drop", [])
        for number, (before, expert) in enumerate(zip(weights.source_ids, weights.experts, strict=True)):
            for key, new in zip(part.keys[before], part.keys[number], strict=True):
                outputs = [f"{new}_packed", f"{new}_scale", f"{new}_shape"]
                assert outputs[0] in kept, "the plan has refused experts stored otherwise"
                written.note([key], "quantize", outputs, expert.projection(name))
    _note_companions(model, source.checkpoint_keys, written)


def _dense_experts(model: StreamModel, weights: LayerWeights, written: Written) -> None:
    source = model.expert_sources[weights.index]
    stored = {key: model.index.tensors[key].shape for key in source.checkpoint_keys}
    made = dense_tensors(source, weights.experts, lambda weight: weight, model.tree_of(weights), stored)
    written.entries += [_out_entry(tensor) for tensor in made]
    kept = [tensor.key for tensor in made]
    written.note(source.checkpoint_keys, "drop", [])
    for part in source.projections.values():
        if part.kind == "per_expert":  # renumbered: the name of an expert is its place in the output
            for number, before in enumerate(weights.source_ids):
                for key, new in zip(part.keys[before], part.keys[number], strict=True):
                    written.note([key], "rewrite", [new])
        else:
            written.note([key for key in part.assembly.keys if key in kept], "rewrite", kept)
    for assembly in source.biases.values():
        written.note(assembly.keys, "rewrite", assembly.keys)
    _note_companions(model, source.checkpoint_keys, written)


def _out_entry(tensor: OutTensor) -> Entry:
    def data() -> Iterator[Buffer]:
        for part in tensor.parts():
            yield from tensor_entry(tensor.key, part).data()

    return Entry(tensor.key, tensor.dtype, tensor.shape, data)


def _assembly(
    model: StreamModel,
    assembly: Assembly,
    layer: str,
    original: LayerWeights,
    weights: LayerWeights,
    output: Format,
    written: Written,
) -> None:
    """One group of non-expert tensors: copied when untouched, codes when quantized, else rewritten."""
    values = {target: weights.tensors[target.removeprefix(layer + ".")] for target in assembly.targets}
    before = {target: original.tensors[target.removeprefix(layer + ".")] for target in assembly.targets}
    if all(values[target] is before[target] for target in values):
        _copy(model, assembly.keys, written)
        return
    if not any(isinstance(value, QuantizedTensor) for value in values.values()):
        dense = {target: value for target, value in values.items() if isinstance(value, Tensor)}
        _write_dense(model, assembly, dense, "rewrite", written)
        _note_companions(model, assembly.keys, written)
        return
    outputs: list[str] = []
    for target, value in values.items():
        if isinstance(value, QuantizedTensor) and output == "portable":
            module = assembly.keys[0].removesuffix(".weight")  # the plan has refused matrices stored otherwise
            entries = packed_entries(module, value)
            written.portable[module] = value.scheme
        elif isinstance(value, QuantizedTensor):
            module = target.removesuffix(".weight")
            layout, entries = linear_entries(module, value)
            written.linears[module] = layout
        else:
            entries = (tensor_entry(target, value),)
        written.entries += entries
        outputs += [entry.name for entry in entries]
    quantized = next(value for value in values.values() if isinstance(value, QuantizedTensor))
    written.note(assembly.keys, "quantize", outputs, quantized)
    _note_companions(model, assembly.keys, written)


def _write_dense(
    model: StreamModel, assembly: Assembly, values: Mapping[str, Tensor], action: str, written: Written
) -> None:
    made = disassemble(assembly, values, model.skeleton)
    written.entries += [tensor_entry(key, value) for key, value in made.items()]
    written.note(assembly.keys, action, list(made))


def _note_companions(model: StreamModel, keys: Iterable[str], written: Written) -> None:
    for key in keys:
        if model.reader.logical_dtype(key) != model.index.tensors[key].dtype:
            written.note([f"{key}_scale_inv"], "consume", [])


def outer_output(model: StreamModel, inside: Callable[[str], bool], dropped: Collection[str] = ()) -> Written:
    """Everything outside the decoder layers (embedding, head, vision, multi-token prediction): copied.

    inside: whether a checkpoint tensor belongs to a decoder layer. dropped: keys that are left out.
    """
    written = Written()
    written.note(dropped, "drop", [])
    rewritten: set[str] = set()
    for name, read in model.outer.items():
        rewritten |= _rewrite_outer(model, name, read, written)
    _copy(model, [key for key in _outer_keys(model, inside, dropped) if key not in rewritten], written)
    return written


def _rewrite_outer(model: StreamModel, name: str, read: Callable[[], Tensor], written: Written) -> set[str]:
    """One tensor that is read in another way than stored; returns the keys it came from. A tied one gets its name."""
    assembly = model.key_map.assemblies.get(name)
    if assembly is None:
        (key,) = model.key_map.assemblies[model.tied[name]].keys
    elif assembly.converter is not None or len(assembly.keys) != 1:
        raise OutputError(message(name, "is stored in another shape than the module has", then="report this model"))
    else:
        (key,) = assembly.keys
    target = name if assembly is None else key
    shape = model.index.tensors[key].shape
    written.entries.append(Entry(target, model.reader.logical_dtype(key), shape, partial(_bytes, target, read)))
    if assembly is None:
        written.manifest[key]["outputs"].append(name)
        return set()
    written.note([key], "rewrite", [key])
    _note_companions(model, [key], written)
    return {key}


def _bytes(key: str, read: Callable[[], Tensor]) -> Iterable[Buffer]:
    return tensor_entry(key, read()).data()


def check_copied(model: StreamModel, inside: Callable[[str], bool], dropped: Collection[str] = ()) -> None:
    """Raises NotFinite for NaN or Inf in what `outer_output` copies, one tensor in memory at a time."""
    for key in _outer_keys(model, inside, dropped):
        model.check_finite(key, model.reader.read(key))


def _outer_keys(model: StreamModel, inside: Callable[[str], bool], dropped: Collection[str]) -> list[str]:
    return [key for key in model.reader.names() if not inside(key) and key not in dropped]
