"""Whatever arguments the operators get on the CPU kernels: an error, or a defined result, never a crash."""

from __future__ import annotations

from typing import Any

import packed_layers as layers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moecompress import ops
from moecompress.types import Scheme
from moecompress_kernels import cpu

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
SCHEMES = [
    (Scheme(4, 32), Scheme(3, 16)),
    (Scheme(2, 16, False, "int"), Scheme(8)),
    (Scheme(1, binary=True), Scheme(4)),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool)


@pytest.fixture(scope="module")
def made() -> tuple[layers.Packed, list[torch.Tensor]]:
    packed = layers.experts(SCHEMES)
    return packed, layers.sealed_handle(packed, "cpu")


def call(made: Any, hidden: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    packed, handle = made
    return ops.moe_mlp(hidden, ids, gates, handle, "cpu", packed.layer.text)


@given(
    tokens=st.integers(0, 5),
    columns=st.sampled_from([0, 1, 63, 64, 65]),
    slots=st.integers(0, 4),
    more=st.integers(-1, 1),
    lowest=st.integers(-2, 3),
    highest=st.integers(0, 5),
    types=st.tuples(*[st.sampled_from(DTYPES)] * 3),
    seed=st.integers(0, 9),
)
def test_any_shapes_types_and_ids(
    made: Any,
    tokens: int,
    columns: int,
    slots: int,
    more: int,
    lowest: int,
    highest: int,
    types: tuple[torch.dtype, ...],
    seed: int,
) -> None:
    g = layers.generator(seed)
    hidden = torch.randn(tokens, columns, generator=g).to(types[0])
    ids = torch.randint(lowest, max(lowest, highest) + 1, (max(0, tokens + more), slots), generator=g).to(types[1])
    gates = torch.rand(tokens, slots, generator=g).to(types[2])
    try:
        out = call(made, hidden, ids, gates)
    except ValueError as error:
        assert str(error)
        return
    assert columns == 64 and ids.shape == gates.shape and out.shape == hidden.shape and out.dtype == hidden.dtype
    assert not ids.numel() or (int(ids.min()) >= 0 and int(ids.max()) <= 3)
    assert bool(torch.isfinite(out).all())


def test_ids_out_of_range_are_named(made: Any) -> None:
    for wrong in (-1, 4, 1 << 40, -(1 << 62)):
        with pytest.raises(ValueError, match=r"0\.\.3"):
            call(made, torch.zeros(1, 64), torch.tensor([[wrong]]), torch.ones(1, 1))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_strides_do_not_matter(made: Any, dtype: torch.dtype) -> None:
    hidden, ids, gates = layers.routing(6, 3, 2, 64, dtype)
    wanted = call(made, hidden, ids, gates)
    spread = torch.zeros(6, 128, dtype=dtype)
    spread[:, ::2] = hidden
    assert torch.equal(call(made, spread[:, ::2], ids.t().contiguous().t(), gates.t().contiguous().t()), wanted)
    assert torch.equal(call(made, hidden, ids.int(), gates.double()), wanted)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_what_is_not_finite_stays_in_its_row(made: Any, bad: float, dtype: torch.dtype) -> None:
    for tokens in (3, 40):
        hidden, _, gates = layers.routing(tokens, 3, 2, 64, dtype)
        ids = torch.tensor([[0, 1]]).repeat(tokens, 1)
        wanted = call(made, hidden, ids, gates)
        hidden[1, 7] = bad
        found = call(made, hidden, ids, gates)
        assert not bool(torch.isfinite(found[1]).any())
        keep = torch.arange(tokens) != 1
        assert torch.equal(found[keep], wanted[keep])


@pytest.mark.parametrize("rounding", ["int4", "int8"])
def test_what_is_not_finite_is_not_rounded_to_something_finite(rounding: Any) -> None:
    packed = layers.linear(layers.weight(32, 64, Scheme(4, 32, activation=rounding)))
    handle = layers.sealed_handle(packed, "cpu")
    x = torch.ones(2, 64)
    x[0, 3] = float("nan")
    found = ops.packed_linear(x, handle, "cpu", packed.layer.text)
    assert bool(found[0].isnan().all()) and bool(torch.isfinite(found[1]).all())


@pytest.mark.parametrize("name", ["cpu", "torch"])
def test_a_handle_runs_what_it_was_made_for_and_nothing_else(name: str) -> None:
    """Of another layer, another backend, in parts, out of order: what would send kernels out of their memory."""
    small, wide = layers.experts(SCHEMES), layers.experts([(Scheme(4, 32), Scheme(4))] * 3, 2048)
    line, long = (layers.linear(layers.weight(32, columns, Scheme(4, 32))) for columns in (64, 4096))
    handles = [layers.sealed_handle(packed, name) for packed in (small, wide, line, long)]
    other = layers.sealed_handle(small, "torch" if name == "cpu" else "cpu")
    held, whole = handles[0], [handles[0][0][::2].contiguous(), *handles[0][1:]]
    hidden, ids, gates = layers.routing(5, 3, 2, 64, torch.float32)
    for wrong in (*handles[1:], other, held[:-1], held[1:], [held[1], held[0], *held[2:]], whole, []):
        with pytest.raises(ValueError, match=f"handle.*what {name} prepared for the same layer"):
            ops.moe_mlp(hidden, ids, gates, wrong, name, small.layer.text)
    for wrong in (handles[3], handles[0], handles[2][::-1], []):
        with pytest.raises(ValueError, match="handle"):
            ops.packed_linear(hidden, wrong, name, line.layer.text)
    with pytest.raises(ValueError, match="of a Linear. Allowed: of routed experts"):
        ops.moe_mlp(hidden, ids, gates, handles[2], name, line.layer.text)
    with pytest.raises(ValueError, match="of routed experts. Allowed: of a Linear"):
        ops.packed_linear(hidden, held, name, small.layer.text)
    for text in ("", "{}", "[]", "null", small.layer.text[:-1], small.layer.text.replace("bits", "bytes")):
        with pytest.raises(ValueError, match="the text of a layer"):
            ops.moe_mlp(hidden, ids, gates, held, name, text)


@pytest.mark.parametrize("name", ["cpu", "torch"])
def test_devices_layouts_and_gradients_that_cannot_be(name: str) -> None:
    """Of tensors that are elsewhere, `meta` here, addresses mean nothing; and a gradient would silently be missing."""
    packed = layers.experts(SCHEMES)
    handle, text = layers.sealed_handle(packed, name), packed.layer.text
    good = layers.routing(5, 3, 2, 64, torch.float32)
    for at in range(3):
        for change in (lambda one: one.to("meta"), lambda one: one.to_sparse()):
            inputs = [change(one) if number == at else one for number, one in enumerate(good)]
            with pytest.raises(ValueError, match="strided tensors on one device"):
                ops.moe_mlp(*inputs, handle, name, text)
    with pytest.raises(ValueError, match="on meta with inputs on cpu"):
        ops.moe_mlp(*good, [one.to("meta") for one in handle], name, text)
    for at in (0, 2):
        inputs = [one.clone().requires_grad_() if number == at else one for number, one in enumerate(good)]
        with pytest.raises(ValueError, match="gradients are asked for"):
            ops.moe_mlp(*inputs, handle, name, text)
        with torch.no_grad():
            assert torch.equal(ops.moe_mlp(*inputs, handle, name, text), ops.moe_mlp(*good, handle, name, text))


def test_the_number_of_threads_changes_nothing(made: Any) -> None:
    inputs = layers.routing(33, 3, 2, 64, torch.bfloat16)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 64):
            torch.set_num_threads(threads)
            found.append(call(made, *inputs))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])
