"""Peak memory, disk and time of a run, predicted from shapes alone.

The memory model names what is resident at the worst moment of a layer; `plan` prints it and the report sets it beside
the measured peak.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from moecompress.calib.balance import pool_rows
from moecompress.calib.estimate import all_costs
from moecompress.checkpoint.native import plan_record
from moecompress.memory import resident_bytes
from moecompress.numerics.grids import stored_bits
from moecompress.numerics.packing import row_bytes
from moecompress.recipe import Recipe
from moecompress.stream.inventory import Owner
from moecompress.stream.model import StreamModel
from moecompress.stream.probe import probe_bytes
from moecompress.stream.speed import active_weights, matmul_rate
from moecompress.types import LayerFacts, ModelFacts, Scheme
from moecompress.writing import Format

_WRITE_RATE = 400e6  # bytes per second, a modest disk
_ROUND_RATE = 25e6  # weights per second per thread through an MSE grid search


@dataclass(frozen=True)
class Estimate:
    """peak_bytes: resident memory; disk_bytes: output, hidden states and side files; parts: what makes the peak.

    fixed_bytes: output files without the routed experts' records; only where an allocation needs it.
    """

    peak_bytes: int
    disk_bytes: int
    output_bytes: int
    seconds: float
    expert_bits_per_weight: float | None
    total_bits_per_weight: float
    component_bytes: Mapping[str, tuple[int, int]]  # role -> (source, output)
    parts: Mapping[str, int]
    fixed_bytes: int = 0


def estimate(
    recipe: Recipe,
    model: StreamModel,
    owned: Mapping[str, Owner],
    schemes: Mapping[int, Mapping[str, Scheme]],
    output: Format,
    statistics: Mapping[int, int],
    sweeps: int,
    batch_tokens: int,
    probe_tokens: int,
    facts: ModelFacts | None = None,
    dropped: Collection[str] = (),
    added: int = 0,
) -> Estimate:
    """Predict one run. statistics: bytes the passes hold at once, by layer. facts: of the output, where experts are
    removed; dropped: checkpoint tensors outside the layers that are left out. added: bytes of tensors that passes add.

    Uses the process's present memory as the base, so transformers should be imported by now.
    """
    tokens = [pool_rows(spec) * spec.length for spec in recipe.calibration.values()] + [probe_tokens]
    lengths = [spec.length for spec in recipe.calibration.values()] + [probe_tokens]
    hidden = model.facts.hidden_size
    pairs = any(
        getattr(spec.params, "pairs_streams", False) for spec in recipe.passes
    )  # the original stream's expert inputs
    stores = (4 + pairs) * 4 * hidden * sum(tokens)  # two streams, two generations, float32
    stores += sum(probe_bytes(probe_tokens, layer, hidden) for layer in model.facts.layers)
    facts = facts or model.facts
    component, out_bytes = _component_bytes(model, owned, schemes, output, facts, dropped)
    generated = [cost for spec in recipe.calibration.values() for cost in all_costs(spec, model)]
    parts = _peak_parts(
        model, schemes, output, statistics, min(batch_tokens, max(tokens)), max(lengths), [c.parts for c in generated]
    )
    out_bytes += added
    weights = sum(out for _, out in component.values()) + added
    codes = [_expert_bits(layer, schemes[layer.index]) for layer in facts.moe_layers]
    expert_weights = sum(_expert_bits(layer, {})[0] for layer in model.facts.moe_layers)
    total_weights = _count_weights(model)
    return Estimate(
        peak_bytes=sum(parts.values()),
        disk_bytes=int(out_bytes * 1.02) + max([stores, *(c.disk_bytes for c in generated)]) + (64 << 20),
        output_bytes=out_bytes,
        seconds=_seconds(model, sum(tokens), sweeps, out_bytes) + sum(c.seconds for c in generated),
        expert_bits_per_weight=sum(bits for _, bits in codes) / expert_weights if expert_weights else None,
        total_bits_per_weight=8 * weights / total_weights,
        component_bytes=component,
        parts=parts,
    )


def _expert_bits(layer: LayerFacts, chosen: Mapping[str, Scheme]) -> tuple[int, int]:
    """(weights, stored bits) of one layer's routed experts."""
    site = layer.site
    assert site is not None
    shapes = {"gate_up": (site.gate_up_rows, site.hidden), "down": (site.hidden, site.width)}
    weights = bits = 0
    for name, shape in shapes.items():
        count = shape[0] * shape[1]
        weights += count
        bits += stored_bits(shape, chosen[name], torch.bfloat16) if name in chosen else 16 * count
    return weights * site.num_experts, bits * site.num_experts


def _count_weights(model: StreamModel) -> int:
    names = set(model.reader.names())
    total = 0
    for name in names:
        count = 1
        for size in model.index.tensors[name].shape:
            count *= size
        total += count
    return max(1, total)


def _component_bytes(
    model: StreamModel,
    owned: Mapping[str, Owner],
    schemes: Mapping[int, Mapping[str, Scheme]],
    output: Format,
    facts: ModelFacts,
    dropped: Collection[str],
) -> tuple[dict[str, tuple[int, int]], int]:
    """role -> (source bytes, output bytes); FP8 counts as bfloat16 in the output."""
    plain = set(model.reader.names()) - set(dropped)
    shares = remaining_shares(model, facts)
    found: dict[str, list[int]] = {}
    for key, owner in owned.items():
        info = model.index.tensors[key]
        row = found.setdefault(owner.role, [0, 0])
        row[0] += info.nbytes
        if key in plain:
            after, before = shares.get(key, (1, 1))
            row[1] += info.nbytes // info.dtype.itemsize * model.reader.logical_dtype(key).itemsize * after // before
    for old, layer in zip(model.facts.layers, facts.layers, strict=True):
        saved: Mapping[str, int] = {}
        if output == "native":
            resized = old.site is not None and layer.site is not None and old.site.num_experts != layer.site.num_experts
            saved = _saved_bytes(model, layer, schemes[layer.index], resized)
        elif output == "portable":
            saved = _saved_portable(model, layer, schemes[layer.index])
        for role, count in saved.items():
            found[role][1] -= count
    return {role: (a, b) for role, (a, b) in sorted(found.items())}, sum(row[1] for row in found.values())


def remaining_shares(model: StreamModel, facts: ModelFacts) -> dict[str, tuple[int, int]]:
    """Checkpoint tensor -> (experts after, before), for every tensor that shrinks when experts are removed.

    Tensors of single experts are removed or kept whole; the share is right for all of them together. Experts that
    become narrower count in neurons.
    """
    shares: dict[str, tuple[int, int]] = {}
    for old, new in zip(model.facts.layers, facts.layers, strict=True):
        if old.site is None or new.site is None:
            continue
        source = model.expert_sources[old.index]
        experts, ids = (new.site.num_experts, old.site.num_experts), (new.site.choices, old.site.num_experts)
        width = (new.site.width, old.site.width) if new.site.width != old.site.width else (1, 1)
        found = [(part.assembly.keys, experts, width) for part in source.projections.values()]
        found += [(bias.keys, ids, width if name == "gate_up" else (1, 1)) for name, bias in source.biases.items()]
        for keys, counts, widths in found:
            after, before = counts[0] * widths[0], counts[1] * widths[1]
            if after != before:
                shares.update(dict.fromkeys(keys, (after, before)))
        for name, dim in old.expert_dims.items():
            before, after = old.shapes[name][dim], new.shapes[name][dim]
            if before != after:
                keys = model.key_map.assemblies[f"{old.name}.{name}"].keys
                shares.update(dict.fromkeys(keys, (after, before)))
    return shares


def _saved_bytes(model: StreamModel, layer: LayerFacts, chosen: Mapping[str, Scheme], resized: bool) -> dict[str, int]:
    """How many bytes records save against the dense tensors of one layer, by role: of quantized experts, and of
    unquantized ones in a layer of another size."""
    saved: dict[str, int] = {}
    dtype = model.facts.dtype
    site = layer.site
    if site is not None and (resized or "gate_up" in chosen or "down" in chosen):
        shapes = (("gate_up", (site.gate_up_rows, site.hidden)), ("down", (site.hidden, site.width)))
        record = plan_record([(name, shape, chosen.get(name, Scheme(16)), dtype) for name, shape in shapes])
        dense = sum(rows * columns for _, (rows, columns) in shapes) * dtype.itemsize
        saved["routed_experts"] = (dense - record.row_bytes) * site.num_experts - 8 * site.choices - 1
    for name, scheme in chosen.items():
        if name in layer.shapes:
            rows, columns = layer.shapes[name]
            record = plan_record([("weight", (rows, columns), scheme, dtype)])
            role = layer.roles[name]
            saved[role] = saved.get(role, 0) + rows * columns * dtype.itemsize - record.row_bytes - 1
    return saved


def _saved_portable(model: StreamModel, layer: LayerFacts, chosen: Mapping[str, Scheme]) -> dict[str, int]:
    """The same for packed words, scales and an int64 [2] shape per checkpoint matrix."""
    saved: dict[str, int] = {}
    dtype, site = model.facts.dtype, layer.site
    found = [(name, layer.shapes[name], layer.roles[name], 1, 1) for name in chosen if name in layer.shapes]
    if site is not None and "gate_up" in chosen and "down" in chosen:
        blocks = 2 if site.gated else 1
        found.append(("gate_up", (site.gate_up_rows, site.hidden), "routed_experts", site.num_experts, blocks))
        found.append(("down", (site.hidden, site.width), "routed_experts", site.num_experts, 1))
    for name, shape, role, count, blocks in found:
        rows, columns = shape
        scheme = chosen[name]
        stored = rows * (row_bytes(columns, scheme.bits) + scheme.groups(columns) * dtype.itemsize) + 16 * blocks
        saved[role] = saved.get(role, 0) + count * (rows * columns * dtype.itemsize - stored)
    return saved


def _peak_parts(
    model: StreamModel,
    schemes: Mapping[int, Mapping[str, Scheme]],
    output: Format,
    statistics: Mapping[int, int],
    batch_tokens: int,
    length: int,
    generated: Sequence[Mapping[str, int]],
) -> dict[str, int]:
    """Resident bytes by cause: at the heaviest layer, at the vocabulary matrices, or while a token set is generated."""
    item = model.facts.dtype.itemsize
    base = resident_bytes()
    layers = [
        _layer_parts(model, layer, schemes[layer.index], output, batch_tokens)
        | {"statistics of a layer": statistics[layer.index]}
        for layer in model.facts.layers
    ]
    heaviest = max(layers, key=lambda parts: sum(parts.values()))
    matrices = 1 if model.tied else 2
    vocabulary = {
        "vocabulary matrices": matrices * model.facts.vocab_size * model.facts.hidden_size * item,
        "logits of one sequence": 3 * 4 * length * model.facts.vocab_size,
    }
    worst = max(heaviest, vocabulary, *generated, key=lambda parts: sum(parts.values()))
    return {"imports and module tree": base, **worst}


def _layer_parts(
    model: StreamModel, layer: LayerFacts, chosen: Mapping[str, Scheme], output: Format, batch_tokens: int
) -> dict[str, int]:
    item = model.facts.dtype.itemsize
    other = 0
    for shape in layer.shapes.values():
        size = 1
        for length in shape:
            size *= length
        other += size
    hidden = model.facts.hidden_size
    parts = {"attention and other weights": other * (item + 4)}
    site = layer.site
    widest = hidden
    if site is not None:
        one = site.gate_up_rows * site.hidden + site.hidden * site.width
        parts["experts, stored dtype"] = one * site.num_experts * item
        if "gate_up" in chosen:
            parts["experts, codes"] = one * site.num_experts * (item if output == "dense" else 1)
        parts["one expert, float32 and search"] = 4 * one * 4
        widest = max(hidden, 2 * site.gate_up_rows * site.top_k // 2)
    parts["activations of a batch"] = batch_tokens * 4 * (6 * hidden + widest)
    return parts


def _seconds(model: StreamModel, tokens: int, sweeps: int, out_bytes: int) -> float:
    """Two forwards per sweep at this machine's measured matmul speed, one rounding pass, and the writing."""
    experts = sum(_expert_bits(layer, {})[0] for layer in model.facts.moe_layers)
    return (
        sweeps * 2 * 2 * active_weights(model.facts) * tokens / matmul_rate()
        + experts / (_ROUND_RATE * torch.get_num_threads())
        + out_bytes / _WRITE_RATE
        + 15.0  # imports and the reload check
    )
