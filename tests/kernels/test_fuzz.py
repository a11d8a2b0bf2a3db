"""Layers and arguments drawn at random on the CPU kernels against PyTorch's own path, on every instruction set."""

from __future__ import annotations

import random

import packed_fuzz as fuzz
import packed_layers as layers
import pytest
import torch

from moecompress import ops
from moecompress.types import QuantizedTensor
from moecompress_kernels import cpu

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
ISAS = cpu.isas() if cpu.unavailable() is None else []
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}
SUMMED_AGAIN = 4e-2  # sums in another order may move the input of a rounded `down` to the next of its few codes
SEEDS, PIECES = 320, 4


def limit(packed: layers.Packed, dtype: torch.dtype) -> float:
    downs = [expert.down for expert in packed.weights]
    rounds = any(isinstance(down, QuantizedTensor) and down.scheme.activation != "none" for down in downs)
    return SUMMED_AGAIN if rounds else LIMIT[dtype]


@pytest.mark.parametrize("piece", range(PIECES))
def test_any_experts_and_arguments(piece: int) -> None:
    for seed in range(piece, SEEDS, PIECES):
        packed = fuzz.layer(seed)
        call, text = fuzz.call(packed, seed), packed.layer.text
        inputs = (call.hidden, call.ids, call.weights)
        mine, plain = (layers.sealed_handle(packed, name) for name in ("cpu", "torch"))
        if call.wrong:
            for name, handle in (("cpu", mine), ("torch", plain)):
                with pytest.raises(ValueError, match=r"0\.\."):
                    ops.moe_mlp(*inputs, handle, name, text)
            continue
        found, wanted = ops.moe_mlp(*inputs, mine, "cpu", text), ops.moe_mlp(*inputs, plain, "torch", text)
        assert found.shape == wanted.shape and found.dtype == wanted.dtype and found.is_contiguous()
        (finite, bad), (expected, spoilt) = fuzz.split(found, call.bad), fuzz.split(wanted, call.bad)
        assert not bool(torch.isfinite(bad).any()) and not bool(torch.isfinite(spoilt).any()), seed
        assert layers.error(finite, expected) <= limit(packed, call.hidden.dtype), seed
        assert torch.equal(ops.moe_mlp(*inputs, mine, "cpu", text).nan_to_num(), found.nan_to_num()), seed


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa[1])
def test_any_experts_on_every_instruction_set(isa: tuple[int, str]) -> None:
    for seed in range(1000, 1040):
        packed = fuzz.layer(seed)
        call = fuzz.call(packed, seed)
        if call.wrong or call.bad:
            continue
        inputs = (call.hidden.contiguous(), call.ids.long().contiguous(), call.weights.float().contiguous())
        found = cpu.moe_mlp(packed.layer, layers.handle_of(packed, cpu, "cpu"), *inputs, isa=isa[0])
        wanted = ops.moe_mlp(*inputs, layers.sealed_handle(packed, "torch"), "torch", packed.layer.text)
        assert layers.error(found, wanted) <= limit(packed, call.hidden.dtype), seed


def test_any_linear_and_inputs() -> None:
    for seed in range(160):
        draw, g = random.Random(seed), layers.generator(seed)
        rows, columns = draw.choice((1, 24, 33, 80)), draw.choice((7, 16, 64, 192))
        stored = draw.choice((torch.bfloat16, torch.float16, torch.float32))
        packed = layers.linear(layers.weight(rows, columns, fuzz.scheme(draw, columns), stored, seed))
        lead = draw.choice(((), (0,), (1,), (2, 3), (97,), (2, 0, 3), (200,)))
        inputs = torch.randn(*lead, columns, generator=g).to(draw.choice(fuzz.DTYPES))
        bad = bool(inputs.numel()) and draw.random() < 0.2
        if bad:
            inputs.view(-1, columns)[0, draw.randrange(columns)] = float("nan")
        inputs = fuzz.placed(draw, inputs) if inputs.dim() > 1 else inputs
        found, wanted = (
            ops.packed_linear(inputs, layers.sealed_handle(packed, name), name, packed.layer.text)
            for name in ("cpu", "torch")
        )
        assert found.shape == wanted.shape == (*lead, rows) and found.dtype == inputs.dtype
        found, wanted = found.reshape(-1, rows), wanted.reshape(-1, rows)
        assert not bad or not bool(torch.isfinite(found[0]).any() or torch.isfinite(wanted[0]).any()), seed
        assert layers.error(found[int(bad) :], wanted[int(bad) :]) <= LIMIT[inputs.dtype], seed
