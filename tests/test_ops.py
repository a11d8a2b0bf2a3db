"""The operators: their torch reference against float64 by hand, their fake functions, and who is asked to run them."""

from __future__ import annotations

import math
from typing import Any

import families
import packed_layers
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

from moecompress import ops
from moecompress.arch.activation import recognise
from moecompress.arch.sites import is_experts
from moecompress.checkpoint.native import encode, encode_linear, linear_layout, record_layout
from moecompress.experts import Experts
from moecompress.numerics.grids import dequantize, round_to_nearest
from moecompress.types import ExpertWeights, Scheme

WIDTH, HIDDEN, EXPERTS = 32, 64, 3
SCHEMES = (Scheme(4, 32), Scheme(3, 16, False, "int"), Scheme(1, -1, binary=True))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def expert(number: int) -> ExpertWeights:
    up, down = random(2 * WIDTH, HIDDEN, seed=number), random(HIDDEN, WIDTH, seed=number + 50)
    scheme = SCHEMES[number]
    return ExpertWeights(round_to_nearest(up, scheme), round_to_nearest(down, scheme))


def reference_layer(activation: ops.Activation) -> tuple[ops.Layer, list[Tensor], list[ExpertWeights]]:
    weights = [expert(number) for number in range(EXPERTS)]
    layouts = [record_layout(one) for one in weights]
    layer = ops.describe_layer(layouts, EXPERTS, activation)
    records = [encode(layout, one)[None] for layout, one in zip(layouts, weights, strict=True)]
    slot_map = torch.tensor([[k, 0] for k in range(EXPERTS)], dtype=torch.int32)
    return layer, ops.sealed("torch", layer, ops.backend("torch").prepare(layer, records, slot_map, [])), weights


def test_the_reference_is_the_sum_over_slots() -> None:
    layer, handle, weights = reference_layer(ops.Activation("silu"))
    hidden = random(5, HIDDEN, seed=9)
    ids = torch.tensor([[0, 1], [2, 3], [3, 3], [1, 1], [2, 0]])
    gates = random(5, 2, seed=10).abs()
    found = ops.moe_mlp(hidden, ids, gates, handle, "torch", layer.text)
    for token in range(5):
        wanted = torch.zeros(HIDDEN, dtype=torch.float64)
        for slot in range(2):
            if ids[token, slot] < EXPERTS:
                one = weights[int(ids[token, slot])]
                gate, up = (dequantize(one.gate_up).double() @ hidden[token].double()).chunk(2)
                inner = gate / (1 + torch.exp(-gate)) * up
                wanted += gates[token, slot].double() * (dequantize(one.down).double() @ inner)
        assert float((found[token] - wanted).norm()) <= 1e-5 * float(wanted.norm())


@pytest.mark.parametrize("shape", [(HIDDEN,), (7, HIDDEN), (2, 3, HIDDEN), (0, HIDDEN)])
def test_a_linear_takes_any_leading_shape(shape: tuple[int, ...]) -> None:
    weight = round_to_nearest(random(24, HIDDEN), Scheme(4, 32))
    layout = linear_layout(weight)
    layer = ops.describe_layer([layout], 1)
    held = ops.backend("torch").prepare(
        layer, [encode_linear(layout, weight)[None]], torch.zeros(1, 2, dtype=torch.int32), []
    )
    handle = ops.sealed("torch", layer, held)
    inputs = random(*shape, seed=3)
    found = ops.packed_linear(inputs, handle, "torch", layer.text)
    torch.testing.assert_close(found, inputs @ dequantize(weight).T)


COMPUTES = [
    pytest.param(name, marks=pytest.mark.skipif(bool(ops.unavailable(name)), reason=name)) for name in ("cpu", "torch")
]


def both_layers(name: str) -> tuple[packed_layers.Packed, packed_layers.Packed, list[Tensor], list[Tensor]]:
    """Experts and a Linear with their handles."""
    experts = packed_layers.experts([(Scheme(4, 32), Scheme(3, 16, activation="int8")), (Scheme(2, 16), Scheme(8))])
    linear = packed_layers.linear(packed_layers.weight(24, HIDDEN, Scheme(4, 32)))
    return experts, linear, *(packed_layers.sealed_handle(packed, name) for packed in (experts, linear))  # type: ignore[return-value]


@pytest.mark.parametrize("name", COMPUTES)
def test_one_graph_holds_both_operators_for_any_number_of_tokens(name: str) -> None:
    experts, linear, expert_handle, linear_handle = both_layers(name)

    def both(hidden: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        made = ops.moe_mlp(hidden * 2, ids, gates, expert_handle, name, experts.layer.text) + hidden
        return ops.packed_linear(made, linear_handle, name, linear.layer.text).relu()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(both, backend=counter, fullgraph=True, dynamic=True)
    for tokens in (4, 7, 30):
        inputs = packed_layers.routing(tokens, 2, 2, HIDDEN, torch.bfloat16)  # some ids are the sentinel
        torch.testing.assert_close(compiled(*inputs), both(*inputs), rtol=0, atol=0)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", COMPUTES)
def test_operators_are_what_torch_expects_of_them(name: str) -> None:
    """Schema (nothing is changed in place), fake functions and graphs with shapes that are not known."""
    experts, linear, expert_handle, linear_handle = both_layers(name)
    inputs = packed_layers.routing(5, 2, 2, HIDDEN, torch.float32)
    operators = torch.ops.moecompress
    torch.library.opcheck(operators.moe_mlp.default, (*inputs, expert_handle, name, experts.layer.text))
    for x in (random(3, HIDDEN), random(2, 3, HIDDEN), random(HIDDEN)):
        torch.library.opcheck(operators.packed_linear.default, (x, linear_handle, name, linear.layer.text))


def test_wrong_arguments_are_errors_while_a_graph_is_traced() -> None:
    experts, _, handle, _ = both_layers("torch")
    hidden, ids, gates = packed_layers.routing(5, 2, 2, HIDDEN, torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(one) for one in (hidden, ids, gates)]
        held = [mode.from_tensor(one) for one in handle]
        assert ops.moe_mlp(*fakes, held, "torch", experts.layer.text).shape == hidden.shape
        with pytest.raises(ValueError, match=r"weights \[4, 2\]"):
            ops.moe_mlp(fakes[0], fakes[1], fakes[2][:4], held, "torch", experts.layer.text)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden": random(4, HIDDEN + 1)}, r"\[\.\.\., 64\]"),
        ({"hidden": random(2, 2, HIDDEN)}, r"hidden \[T, H\]"),
        ({"hidden": random(4, HIDDEN).double()}, "float64"),
        ({"ids": torch.zeros(3, 1, dtype=torch.long)}, r"ids \[3, 1\]"),
        ({"ids": torch.zeros(4, 1)}, "ids torch.float32"),
        ({"ids": torch.full((4, 1), 4)}, r"0\.\.3"),
        ({"ids": torch.full((4, 1), -1)}, r"0\.\.3"),
        ({"weights": torch.ones(4, 2)}, r"weights \[4, 2\]"),
        ({"name": "rocm"}, "cuda, triton, cpu, torch"),
    ],
)
def test_wrong_arguments_are_errors(change: dict[str, Any], words: str) -> None:
    layer, handle, _ = reference_layer(ops.Activation("silu"))
    good: dict[str, Any] = {
        "hidden": random(4, HIDDEN),
        "ids": torch.zeros(4, 1, dtype=torch.long),
        "weights": torch.ones(4, 1),
        "handle": handle,
        "name": "torch",
        "layer": layer.text,
    }
    assert ops.moe_mlp(**good).shape == (4, HIDDEN)
    with pytest.raises(ValueError, match=words):
        ops.moe_mlp(**(good | change))


def test_inputs_that_a_backend_does_not_take_are_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 is not for the compiled CUDA kernels; with any other inputs, or any at all, they are the first choice."""
    layer, _, _ = reference_layer(ops.Activation("silu"))
    monkeypatch.setattr(ops, "unavailable", lambda name: None if name == "cuda" else "for a test")
    monkeypatch.setattr(ops.backend("cuda"), "unfit", lambda layer, device: None)
    device = torch.device("cuda")
    assert ops.choose(layer, device, torch.bfloat16) == ops.choose(layer, device) == ops.Choice("cuda")
    choice = ops.choose(layer, device, torch.float32)
    assert choice.backend == "torch"
    assert choice.refused[0] == ("cuda", "inputs are float32; it takes bfloat16 and float16")


def test_triton_is_next_where_the_compiled_library_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _, _ = reference_layer(ops.Activation("silu"))
    missing = "no nvcc found"
    monkeypatch.setattr(ops, "unavailable", lambda name: missing if name == "cuda" else None)
    monkeypatch.setattr(ops.backend("triton"), "_trouble", lambda index: None)
    choice = ops.choose(layer, torch.device("cuda", 0), torch.float32)
    assert choice == ops.Choice("triton", (("cuda", missing),))
    monkeypatch.setattr(ops.backend("triton"), "_trouble", lambda index: "Triton cannot be imported")
    choice = ops.choose(layer, torch.device("cuda", 0))
    assert choice.refused[1] == ("triton", "Triton cannot be imported") and choice.backend not in ("cuda", "triton")


def test_every_refusal_has_a_reason() -> None:
    layer, _, _ = reference_layer(ops.Activation("silu"))
    choice = ops.choose(layer, torch.device("meta"))  # no backend computes there
    assert choice.backend == "torch" and [name for name, _ in choice.refused] == list(ops.ORDER)
    assert all(reason for _, reason in choice.refused)


KNOWN = {
    "qwen3_moe": ops.Activation("silu"),
    "gpt_oss": ops.Activation("silu", interleaved=True, alpha=1.702, limit=7.0, shift=1.0),
    "minimax_m3_vl_text": ops.Activation("silu", alpha=1.702, limit=7.0, shift=1.0),
    "deepseek_v4": ops.Activation("silu", limit=10.0),
    "hy_v4": ops.Activation("silu", limit=10.0),
    "gemma4_text": ops.Activation("gelu_tanh"),
    "nemotron_h": ops.Activation("relu2", gated=False),
    "lfm2_moe": ops.Activation("silu"),
    "beam": ops.Activation("silu"),
    "inkling2_text": None,  # soft caps
}


@pytest.mark.parametrize("model_type", KNOWN)
def test_activations_are_told_by_what_they_compute(model_type: str) -> None:
    model = families.tiny_model(model_type)
    module = Experts.replacing([module for module in model.modules() if is_experts(module)][-1])
    assert recognise(module) == KNOWN[model_type]


def test_an_activation_that_is_almost_known_is_not_taken_for_it() -> None:
    class Almost:
        has_gate, is_concatenated, limit = True, True, 7.0

        def activate(self, projected: Tensor) -> Tensor:
            gate, up = projected.chunk(2, -1)
            return gate * torch.sigmoid(1.01 * gate) * up

    assert recognise(Almost()) is None


@pytest.mark.parametrize("function", ["silu", "gelu", "gelu_tanh", "relu", "relu2"])
def test_activations_by_hand(function: str) -> None:
    activation = ops.Activation(function, interleaved=True, limit=2.0, shift=0.5)  # type: ignore[arg-type]
    values = torch.linspace(-5, 5, 41, dtype=torch.float64)
    found = ops.activate(activation, torch.stack([values, values.flip(0)], -1).flatten())
    by_hand = {
        "silu": lambda x: x / (1 + math.exp(-x)),
        "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
        "gelu_tanh": lambda x: x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "relu": lambda x: max(x, 0.0),
        "relu2": lambda x: max(x, 0.0) ** 2,
    }[function]
    for number, x in enumerate(values.tolist()):
        wanted = by_hand(min(x, 2.0)) * (max(-2.0, min(-x, 2.0)) + 0.5)
        assert abs(float(found[number]) - wanted) < 1e-9
