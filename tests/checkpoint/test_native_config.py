"""Layouts as JSON: exact round trip; anything else is refused with the key that is wrong."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moecompress.checkpoint.native import RecordLayout, plan_record
from moecompress.checkpoint.native_config import (
    ExpertsLayout,
    NativeConfig,
    layout_from_json,
    layout_to_json,
)
from moecompress.errors import CheckpointError
from moecompress.types import Scheme

SCHEMES = [
    Scheme(16),
    Scheme(8),
    Scheme(4, 16, activation="int8"),
    Scheme(3, 8, False, "int"),
    Scheme(2, -1, False, "float", activation="int4"),
    Scheme(1, 16, binary=True),
    Scheme(1, 16),
]


def expert_layout(gate_up: Scheme, down: Scheme, dtype: torch.dtype = torch.bfloat16) -> RecordLayout:
    return plan_record([("gate_up", (24, 32), gate_up, dtype), ("down", (32, 16), down, torch.float32)])


def config() -> NativeConfig:
    mixed, plain = expert_layout(SCHEMES[2], SCHEMES[3]), expert_layout(SCHEMES[0], SCHEMES[5])
    linear = plan_record([("weight", (8, 16), SCHEMES[1], torch.float16)])
    experts = {
        "model.layers.0.mlp.experts": ExpertsLayout(8, (mixed, plain)),
        "model.layers.1.mlp.experts": ExpertsLayout(6, (plain,)),
    }
    return NativeConfig(experts, {"model.layers.0.self_attn.q_proj": linear})


@given(
    gate_up=st.sampled_from(SCHEMES),
    down=st.sampled_from(SCHEMES),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
@settings(max_examples=40, deadline=None)
def test_layout_roundtrip(gate_up: Scheme, down: Scheme, dtype: torch.dtype) -> None:
    layout = expert_layout(gate_up, down, dtype)
    found = layout_from_json(json.loads(json.dumps(layout_to_json(layout))))
    assert found == layout and hash(found) == hash(layout)


def test_config_roundtrip() -> None:
    block = json.loads(json.dumps(config().to_json()))
    assert block["quant_method"] == "moecompress" and block["format_version"] == 1
    assert len(block["layouts"]) == 3  # the shared one is listed once
    found = NativeConfig.from_json(block)
    assert found == config() and found.to_json() == block
    sorted_keys = json.loads(json.dumps(block, sort_keys=True))  # as transformers saves a config
    assert NativeConfig.from_json(sorted_keys) == config()


def test_offsets_are_written_for_other_readers() -> None:
    block = layout_to_json(expert_layout(Scheme(4, 16), Scheme(8, -1, False, "float")))
    gate_up, down = block["matrices"]["gate_up"], block["matrices"]["down"]
    assert (gate_up["codes"], gate_up["scales"], gate_up["zeros"]) == (0, 24 * 16, None)
    start = 24 * 16 + 128  # 24 rows x 2 groups x 2 bytes = 96, padded to a multiple of 64
    assert (down["codes"], down["scales"], down["zeros"]) == (start, start + 512, start + 512 + 128)
    assert block["row_bytes"] == start + 512 + 128 + 128


L = ("layouts", 0)
G = (*L, "matrices", "gate_up")
E = ("experts", "model.layers.0.mlp.experts")
DELETE = object()
WRONG: list[tuple[tuple[Any, ...], Any, str]] = [
    (("quant_method",), "gptq", "not a moecompress checkpoint"),
    (("format_version",), 3, "upgrade moecompress"),
    (("format_version",), 0, "format_version 0"),
    (("format_version",), True, "format_version True"),
    (("format_version",), DELETE, "format_version None"),
    (("surprise",), 1, "unknown key 'surprise'"),
    (("linear",), {}, "did you mean 'linears'"),
    (("linears",), DELETE, "missing linears"),
    (("layouts",), {}, "layouts"),
    (L, 3, "layouts[0]"),
    ((*L, "row_bytes"), 64, "not those of the format"),
    ((*L, "row_bytes"), "64", "not those of the format"),
    ((*L, "extra"), 1, "unknown key 'extra'"),
    ((*L, "matrices"), {}, "matrices []"),
    (G, None, "gate_up"),
    ((*G, "codes"), 64, "not those of the format"),
    ((*G, "scales"), -64, "not those of the format"),
    ((*G, "zeros"), 0, "not those of the format"),
    ((*G, "colour"), 0, "unknown key 'colour'"),
    ((*G, "bits"), DELETE, "missing bits"),
    ((*G, "bits"), 5, "bits: 5"),
    ((*G, "bits"), True, "bits: True"),
    ((*G, "bits"), 16, "gate_up"),
    ((*G, "group_size"), 0, "group_size: 0"),
    ((*G, "group_size"), 5, "group_size 5 does not divide 32"),
    ((*G, "zero"), "intt", "did you mean 'int'"),
    ((*G, "binary"), 1, "binary: 1"),
    ((*G, "binary"), True, "binary codes are 1-bit"),
    ((*G, "activation"), ["int8"], "activation"),
    ((*G, "dtype"), "float64", "dtype"),
    ((*G, "shape"), [24], "shape"),
    ((*G, "shape"), [0, 32], "shape"),
    ((*G, "shape"), [24, 2**60], "shape"),
    ((*G, "shape"), [24.0, 32], "shape"),
    ((*E, "records"), [], "8 experts in 0 record layouts"),
    ((*E, "records"), [0, 0], "twice"),
    ((*E, "records"), [9], "layout 9"),
    ((*E, "records"), [-1], "layout -1"),
    ((*E, "records"), [2], "layout 2 has"),
    ((*E, "num_experts"), 1, "1 experts in 2 record layouts"),
    ((*E, "num_experts"), "8", "num_experts: '8'"),
    ((*E, "kind"), "x", "unknown key 'kind'"),
    (("linears", "model.layers.0.self_attn.q_proj"), 0, "layout 0 has"),
    (("linears", "model.layers.0.self_attn.q_proj"), None, "layout None"),
]


@pytest.mark.parametrize(("path", "value", "reason"), WRONG, ids=[f"{w[0][-1]}-{n}" for n, w in enumerate(WRONG)])
def test_wrong_block_is_refused(path: tuple[Any, ...], value: Any, reason: str) -> None:
    block = copy.deepcopy(config().to_json())
    inner: Any = block
    for key in path[:-1]:
        inner = inner[key]
    if value is DELETE:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    with pytest.raises(CheckpointError) as caught:
        NativeConfig.from_json(block)
    text = str(caught.value)
    assert reason in text and text.startswith("config.json: quantization_config"), text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["int", "none"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(path=st.sampled_from([case[0] for case in WRONG]), value=JSON)
def test_any_replaced_value_is_refused_or_means_the_same(path: tuple[Any, ...], value: Any) -> None:
    block = copy.deepcopy(config().to_json())
    inner: Any = block
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    try:
        found = NativeConfig.from_json(block)
    except CheckpointError:
        return
    layouts = block["layouts"]
    assert {name: [layout_to_json(layout) for layout in module.records] for name, module in found.experts.items()} == {
        name: [layouts[number] for number in module["records"]] for name, module in block["experts"].items()
    }
    assert {name: layout_to_json(layout) for name, layout in found.linears.items()} == {
        name: layouts[number] for name, number in block["linears"].items()
    }


@settings(max_examples=50, deadline=None)
@given(block=JSON)
def test_any_layout_is_refused(block: Any) -> None:
    with pytest.raises(CheckpointError):
        layout_from_json(block)
