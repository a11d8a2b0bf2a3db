"""compressed-tensors `pack-quantized`: the tensors of one quantized matrix, and the `quantization_config` block.

A matrix `X.weight` [out, in] becomes `X.weight_packed` int32 [out, ceil(in*b/32)] (a dense little-endian bit stream
per row, as compressed-tensors has written it since 0.18), `X.weight_scale` [out, G] and `X.weight_shape` int64 [2].
Symmetric codes only: stock transformers loads no zero points for experts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moecompress.checkpoint.header import short
from moecompress.checkpoint.writer import Entry, tensor_entry
from moecompress.errors import UnsupportedModel, message
from moecompress.numerics.packing import pack_codes, row_bytes
from moecompress.types import BITS, QuantizedTensor, Scheme

QUANT_METHOD = "compressed-tensors"
FORMAT = "pack-quantized"
LINEAR = "Linear"  # the class name that selects every Linear (in the engines: fused experts, too)
PARTS = ("weight_packed", "weight_scale", "weight_shape")
EXPERTS = r"re:.*\.experts\.\d+\..*"
_WHERE = "config.json: quantization_config"


@dataclass(frozen=True)
class Group:
    """One scheme and what it applies to: class names, full module names, or `re:` patterns (matched from the start)."""

    scheme: Scheme
    targets: tuple[str, ...]

    def names(self, module: str) -> bool:
        """Whether a target names the module, other than by its class."""
        return any(re.match(t[3:], module) if t.startswith("re:") else t == module for t in self.targets)


@dataclass(frozen=True)
class PortableConfig:
    """What the block says. ignore: modules that are not quantized, as names or `re:` patterns."""

    groups: tuple[Group, ...]
    ignore: tuple[str, ...] = ()

    def scheme_of(self, module: str) -> Scheme | None:
        """The scheme of a module that has packed codes: a target naming it wins over its class."""
        by_name = [group.scheme for group in self.groups if group.names(module)]
        by_class = [group.scheme for group in self.groups if LINEAR in group.targets]
        return next(iter([*by_name, *by_class]), None)

    def to_json(self) -> dict[str, Any]:
        """The `quantization_config` dict. Group names are in alphabetical order, which vLLM's matching relies on."""
        return {
            "quant_method": QUANT_METHOD,
            "format": FORMAT,
            "quantization_status": "compressed",
            "config_groups": {f"group_{n}": _group_to_json(group) for n, group in enumerate(self.groups)},
            "ignore": list(self.ignore),
        }

    @staticmethod
    def from_json(block: Mapping[str, Any]) -> PortableConfig:
        """Raises UnsupportedModel for everything but symmetric integer weights packed without activation rounding."""
        if block.get("format") != FORMAT:
            raise _refused(f"format {short(repr(block.get('format')))}", FORMAT)
        groups, ignore = block.get("config_groups"), block.get("ignore") or []
        if not isinstance(groups, dict) or not groups or not isinstance(ignore, list):
            raise _refused("no config_groups", "at least one")
        made = tuple(_group_from_json(name, group) for name, group in groups.items())
        return PortableConfig(made, tuple(str(name) for name in ignore))


def packed_entries(module: str, weight: QuantizedTensor) -> tuple[Entry, ...]:
    """The three tensors of one matrix. Raises ValueError for codes that the format does not have."""
    scheme = weight.scheme
    if not scheme.symmetric or scheme.binary or weight.zeros is not None or scheme.bits not in BITS[1:]:
        raise ValueError(f"{module}: {scheme}; allowed: symmetric codes of 2, 3, 4 or 8 bits")
    rows, columns = weight.shape
    words = (rows, row_bytes(columns, scheme.bits) // 4)
    return (
        Entry(
            f"{module}.weight_packed",
            torch.int32,
            words,
            lambda: (pack_codes(weight.codes, scheme.bits).numpy().data,),
        ),
        tensor_entry(f"{module}.weight_scale", weight.scales),
        tensor_entry(f"{module}.weight_shape", torch.tensor([rows, columns])),
    )


def portable_config(experts: Scheme, linears: Scheme | None, ignore: Sequence[str]) -> PortableConfig:
    """The block for routed experts of one scheme and, when they are quantized, all other Linears of another.

    Two schemes: transformers looks for the group whose pattern names experts, and vLLM matches names before classes.
    The Linears keep the class name because vLLM's fused ones (qkv_proj) are found by their class first.
    """
    if linears is None or linears == experts:
        return PortableConfig((Group(experts, (LINEAR,)),), tuple(ignore))
    return PortableConfig((Group(experts, (EXPERTS,)), Group(linears, (LINEAR,))), tuple(ignore))


def _group_to_json(group: Group) -> dict[str, Any]:
    channel = group.scheme.group_size == -1
    weights = {
        "num_bits": group.scheme.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else group.scheme.group_size,
        "dynamic": False,
        "actorder": None,
    }
    return {
        "targets": list(group.targets),
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": FORMAT,
    }


def _group_from_json(name: str, block: Any) -> Group:
    weights = block.get("weights") if isinstance(block, dict) else None
    if not isinstance(weights, dict):
        raise _refused(f"config_groups.{short(name)} without weights", "quantized weights")
    where = f"config_groups.{short(name)}"
    if block.get("input_activations") or block.get("output_activations"):
        raise _refused(f"{where} rounds activations", "weights only")
    if block.get("format") not in (None, FORMAT):
        raise _refused(f"{where}.format {short(repr(block['format']))}", FORMAT)
    bits, size, strategy = weights.get("num_bits"), weights.get("group_size"), weights.get("strategy")
    size = -1 if strategy == "channel" else size
    plain = weights.get("type", "int") == "int" and weights.get("symmetric", True) and not weights.get("actorder")
    if not plain or bits not in BITS[1:] or strategy not in ("group", "channel") or not isinstance(size, int):
        raise _refused(f"{where}.weights {short(repr(weights))}", "symmetric integers of 2, 3, 4 or 8 bits in groups")
    try:
        return Group(Scheme(bits, size), tuple(str(target) for target in block.get("targets") or ()))
    except ValueError as error:
        raise _refused(f"{where}: {error}", "") from None


def _refused(found: str, allowed: str) -> UnsupportedModel:
    return UnsupportedModel(message(_WHERE, found, allowed, "start from the original checkpoint"))
