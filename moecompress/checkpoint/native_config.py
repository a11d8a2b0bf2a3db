"""The `quantization_config` block of a native checkpoint: record layouts as JSON, read back strictly.

Offsets are written so that other programs need not know the rule behind them; on reading, a layout whose offsets
are not those of the rule is refused. `Any` appears where JSON enters and leaves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from moecompress.checkpoint.header import is_count, short
from moecompress.checkpoint.native import FLOATS, LINEAR, MatrixLayout, RecordLayout, plan_record
from moecompress.checkpoint.native_gate import GateLayout, gate_from_json, gate_to_json
from moecompress.checkpoint.native_turns import TurnLayout
from moecompress.errors import CheckpointError, message, suggest
from moecompress.types import PROJECTIONS, Scheme

QUANT_METHOD = "moecompress"
FORMAT_VERSION = 2  # 2: gates, and matrices of 0 bits; whatever needs neither is written as 1
_NAMES = (tuple(PROJECTIONS), (LINEAR,))
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}
_MATRIX_KEYS = (
    "shape",
    "bits",
    "group_size",
    "zero",
    "binary",
    "activation",
    "dtype",
    "codes",
    "scales",
    "zeros",
)
_TURN_KEYS = ("block", "columns", "count", "order", "second")
_MAX_SIZE = 1 << 31  # rows or columns of one matrix


@dataclass(frozen=True)
class ExpertsLayout:
    """The routed experts of one module: how many ids the router gives, and the layout of each `rec<k>` tensor.

    Ids may share a record: `slot_map` says which. turns: of the experts' inputs, for every id or one for all.
    """

    num_experts: int
    records: tuple[RecordLayout, ...]
    turns: tuple[TurnLayout, ...] = ()


@dataclass(frozen=True)
class NativeConfig:
    """What the loader must know before it reads tensors; keys are full module names. gates: of modules in experts."""

    experts: Mapping[str, ExpertsLayout] = field(default_factory=dict)
    linears: Mapping[str, RecordLayout] = field(default_factory=dict)
    gates: Mapping[str, GateLayout] = field(default_factory=dict)

    @property
    def format_version(self) -> int:
        """The first version of the format that can say this."""
        layouts = [layout for module in self.experts.values() for layout in module.records]
        empty = any(matrix.scheme.bits == 0 for layout in layouts for _, matrix in layout.matrices)
        return 2 if self.gates or empty else 1

    def to_json(self) -> dict[str, Any]:
        """The `quantization_config` dict. Layouts are listed once and referred to by number."""
        used = [layout for module in self.experts.values() for layout in module.records]
        numbers = {layout: n for n, layout in enumerate(dict.fromkeys([*used, *self.linears.values()]))}
        return {
            "quant_method": QUANT_METHOD,
            "format_version": self.format_version,
            "layouts": [layout_to_json(layout) for layout in numbers],
            "experts": {
                name: {
                    "num_experts": module.num_experts,
                    "records": [numbers[layout] for layout in module.records],
                    **({"turns": {t.projection: _turn_to_json(t) for t in module.turns}} if module.turns else {}),
                }
                for name, module in self.experts.items()
            },
            "linears": {name: numbers[layout] for name, layout in self.linears.items()},
            **({"gates": {name: gate_to_json(gate) for name, gate in self.gates.items()}} if self.gates else {}),
        }

    @staticmethod
    def from_json(block: Mapping[str, Any]) -> NativeConfig:
        """Raises CheckpointError naming the key for a newer version or anything this version does not write."""
        where = "config.json: quantization_config"
        if not isinstance(block, Mapping) or block.get("quant_method") != QUANT_METHOD:
            raise CheckpointError(message(where, "not a moecompress checkpoint", f"quant_method {QUANT_METHOD}"))
        version = block.get("format_version")
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            found = f"format_version {short(repr(version))}"
            then = "upgrade moecompress" if type(version) is int and version > FORMAT_VERSION else ""
            raise CheckpointError(message(where, found, f"1 to {FORMAT_VERSION}", then))
        optional = ("gates",) if "gates" in block and version > 1 else ()
        _exact(block, ("quant_method", "format_version", "layouts", "experts", "linears", *optional), where)
        listed = _typed(block["layouts"], list, f"{where}.layouts")
        layouts = [layout_from_json(item, f"{where}.layouts[{n}]") for n, item in enumerate(listed)]
        experts = {
            name: _experts(module, layouts, f"{where}.experts.{short(name)}")
            for name, module in _typed(block["experts"], dict, f"{where}.experts").items()
        }
        linears = {
            name: _pick(number, layouts, (LINEAR,), f"{where}.linears.{short(name)}")
            for name, number in _typed(block["linears"], dict, f"{where}.linears").items()
        }
        gates = {
            name: gate_from_json(gate, f"{where}.gates.{short(name)}")
            for name, gate in _typed(block.get("gates", {}), dict, f"{where}.gates").items()
        }
        if strange := sorted(gates.keys() - experts.keys()):
            raise CheckpointError(message(f"{where}.gates", f"'{short(strange[0])}' has no experts", "one of experts"))
        return NativeConfig(experts, linears, gates)


def layout_to_json(layout: RecordLayout) -> dict[str, Any]:
    """`{"row_bytes": R, "matrices": {name: {shape, bits, ..., byte offsets}}}`."""
    return {
        "row_bytes": layout.row_bytes,
        "matrices": {name: _matrix_to_json(matrix) for name, matrix in layout.matrices},
    }


def layout_from_json(block: object, where: str = "layout") -> RecordLayout:
    """Inverse of `layout_to_json`. Raises CheckpointError naming the key that is wrong."""
    fields = _typed(block, dict, where)
    _exact(fields, ("row_bytes", "matrices"), where)
    matrices = _typed(fields["matrices"], dict, f"{where}.matrices")
    names = next((names for names in _NAMES if set(names) == set(matrices)), None)
    if names is None:
        found = f"matrices {short(repr(list(matrices)))}"
        raise CheckpointError(message(where, found, " or ".join(str(list(names)) for names in _NAMES)))
    described = [
        (name, *_described(_typed(matrices[name], dict, f"{where}.{name}"), f"{where}.{name}"))
        for name in names  # not in the order of the keys: transformers sorts them when it saves a config
    ]
    try:
        layout = plan_record(described)
    except ValueError as error:
        raise CheckpointError(message(where, str(error))) from None
    if layout_to_json(layout) != block:
        found = "row_bytes or offsets are not those of the format"
        raise CheckpointError(message(where, found, f"{short(repr(_offsets(layout)))}"))
    return layout


def _matrix_to_json(matrix: MatrixLayout) -> dict[str, Any]:
    scheme = matrix.scheme
    values = (
        list(matrix.shape),
        scheme.bits,
        scheme.group_size,
        scheme.zero,
        scheme.binary,
        scheme.activation,
        str(matrix.dtype).removeprefix("torch."),
        *(None if part is None else part.offset for part in (matrix.codes, matrix.scales, matrix.zeros)),
    )
    clip = {} if scheme.activation == "none" else {"activation_clip": scheme.activation_clip}
    return dict(zip(_MATRIX_KEYS, values, strict=True)) | clip


def _described(block: dict[str, Any], where: str) -> tuple[tuple[int, int], Scheme, torch.dtype]:
    rounds = block.get("activation", "none") != "none"
    _exact(block, (*_MATRIX_KEYS, *["activation_clip"] * rounds), where)
    shape = _typed(block["shape"], list, f"{where}.shape")
    if len(shape) != 2 or not all(is_count(size) and 0 < size <= _MAX_SIZE for size in shape):
        raise CheckpointError(message(f"{where}.shape", short(repr(shape)), "[out, in]"))
    bits = _typed(block["bits"], int, f"{where}.bits")
    group_size = _typed(block["group_size"], int, f"{where}.group_size")
    binary = _typed(block["binary"], bool, f"{where}.binary")
    zero = _word(block["zero"], ("none", "int", "float"), f"{where}.zero")
    activation = _word(block["activation"], ("none", "int4", "int8"), f"{where}.activation")
    clip = _typed(block["activation_clip"], float, f"{where}.activation_clip") if rounds else 1.0
    dtype = _DTYPES[_word(block["dtype"], tuple(_DTYPES), f"{where}.dtype")]
    try:
        scheme = Scheme(bits, group_size, zero == "none", cast(Any, zero), binary, cast(Any, activation), clip)
    except ValueError as error:
        raise CheckpointError(message(where, short(str(error)))) from None
    if bits in (0, 16) and scheme != Scheme(bits):
        raise CheckpointError(message(where, f"{scheme}", f"{Scheme(bits)}"))
    return (shape[0], shape[1]), scheme, dtype


def _experts(block: object, layouts: list[RecordLayout], where: str) -> ExpertsLayout:
    module = _typed(block, dict, where)
    _exact(module, ("num_experts", "records", *["turns"] * ("turns" in module)), where)
    count = _typed(module["num_experts"], int, f"{where}.num_experts")
    numbers = _typed(module["records"], list, f"{where}.records")
    if not 0 < len(numbers) <= count:
        raise CheckpointError(message(where, f"{count} experts in {len(numbers)} record layouts"))
    records = tuple(_pick(number, layouts, tuple(PROJECTIONS), f"{where}.records") for number in numbers)
    if len(set(records)) < len(records):
        raise CheckpointError(message(f"{where}.records", "a layout appears twice", "each once"))
    turns = _typed(module.get("turns", {}), dict, f"{where}.turns")
    named = [(_word(name, tuple(PROJECTIONS), f"{where}.turns"), block) for name, block in sorted(turns.items())]
    found = [_turn(name, block, count, records, f"{where}.turns.{name}") for name, block in named]
    return ExpertsLayout(count, records, tuple(sorted(found, key=lambda t: PROJECTIONS.index(t.projection))))


def _turn_to_json(turn: TurnLayout) -> dict[str, Any]:
    return {key: getattr(turn, key) for key in _TURN_KEYS}


def _turn(name: str, block: object, experts: int, records: tuple[RecordLayout, ...], where: str) -> TurnLayout:
    fields = _typed(block, dict, where)
    _exact(fields, _TURN_KEYS, where)
    sizes = [_typed(fields[key], int, f"{where}.{key}") for key in _TURN_KEYS[:3]]
    flags = [_typed(fields[key], bool, f"{where}.{key}") for key in _TURN_KEYS[3:]]
    size, columns, count = sizes
    received = {record.matrix(name).shape[1] for record in records}
    if size < 1 or columns % max(1, size) or received != {columns} or count not in (1, experts):
        found = f"blocks of {size} in {columns} columns, {count} turns; the matrices have {sorted(received)}"
        raise CheckpointError(message(where, found, f"blocks that divide the columns, 1 or {experts} turns"))
    return TurnLayout(cast(Any, name), size, columns, count, *flags)


def _pick(number: object, layouts: list[RecordLayout], names: tuple[str, ...], where: str) -> RecordLayout:
    if not is_count(number) or cast(int, number) >= len(layouts):
        raise CheckpointError(message(where, f"layout {short(repr(number))}", f"0 to {len(layouts) - 1}"))
    layout = layouts[cast(int, number)]
    found = tuple(name for name, _ in layout.matrices)
    if found != names:
        raise CheckpointError(message(where, f"layout {number} has {found}", f"{names}"))
    return layout


def _typed(value: object, kind: type, where: str) -> Any:
    if type(value) is not kind:  # not isinstance: JSON true is no number
        raise CheckpointError(message(where, short(repr(value)), f"{kind.__name__}"))
    return value


def _word(value: object, allowed: tuple[str, ...], where: str) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise CheckpointError(message(where, short(repr(value)) + suggest(str(value), allowed)))
    return value


def _exact(block: Mapping[str, Any], keys: tuple[str, ...], where: str) -> None:
    for key in block:
        if key not in keys:
            raise CheckpointError(message(where, f"unknown key '{short(str(key))}'{suggest(short(str(key)), keys)}"))
    missing = [key for key in keys if key not in block]
    if missing:
        raise CheckpointError(message(where, f"missing {', '.join(missing)}"))


def _offsets(layout: RecordLayout) -> dict[str, Any]:
    parts = {name: (m.codes, m.scales, m.zeros) for name, m in layout.matrices}
    return {"row_bytes": layout.row_bytes} | {
        name: [None if part is None else part.offset for part in found] for name, found in parts.items()
    }
