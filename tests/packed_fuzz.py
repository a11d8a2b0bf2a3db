"""Layers and arguments drawn at random, the same for the same number: every scheme, size, stride and bad value."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import packed_layers as layers
import torch
from torch import Tensor

from moecompress import ops
from moecompress.types import Scheme

ACTIVATIONS = (
    layers.SILU,
    ops.Activation("silu", interleaved=True, alpha=1.702, limit=7.0, shift=1.0),
    ops.Activation("gelu", limit=0.5),
    ops.Activation("gelu_tanh"),
    ops.Activation("relu2", gated=False),
    ops.Activation("relu", gated=False),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOKENS = (0, 1, 2, 3, 5, 17, 97, 200)  # rows of one panel: 96


@dataclass(frozen=True)
class Call:
    """Arguments of `moe_mlp` and what is wrong with them. bad: tokens whose result is not finite; wrong: ids are."""

    hidden: Tensor
    ids: Tensor
    weights: Tensor
    bad: tuple[int, ...] = ()
    wrong: bool = False


def scheme(draw: random.Random, columns: int, plain: bool = False) -> Scheme:
    """plain: what the backends of devices take."""
    bits = draw.choice((1, 2, 3, 4, 8) if plain else (1, 2, 3, 4, 8, 16))
    if bits == 16:
        return Scheme(16)
    zero: Any = draw.choice(("none", "int", "float"))
    group = draw.choice([-1, *(size for size in ((32, 64) if plain else (8, 16, 32, 64)) if columns % size == 0)])
    rounding: Any = "none" if plain else draw.choice(("none", "none", "int4", "int8"))
    clip = draw.choice((1.0, 0.8)) if rounding != "none" else 1.0
    binary = bits == 1 and draw.random() < 0.5
    zero = "none" if binary else zero
    return Scheme(bits, group, zero == "none", zero, binary, rounding, clip)


def layer(seed: int, plain: bool = False) -> layers.Packed:
    """Experts of mixed schemes; sometimes several share a record."""
    draw = random.Random(seed)
    hidden, width = draw.choice((16, 40 if plain else 41, 64, 96, 160)), draw.choice((8, 24 if plain else 33, 64))
    pairs = [(scheme(draw, hidden, plain), scheme(draw, width, plain)) for _ in range(draw.randint(1, 5))]
    pairs += [pair for pair in pairs if draw.random() < 0.3]  # a record layout with more than one row
    dtype = draw.choice((torch.bfloat16, torch.float16, torch.float32))
    made = layers.experts(pairs, hidden, width, draw.choice(ACTIVATIONS), dtype, draw.random() < 0.4, seed)
    if made.biases or draw.random() < 0.7:
        return made
    again = [draw.randrange(len(pairs)) for _ in range(len(pairs) + 2)]
    weights = [made.weights[number] for number in again]
    return layers.Packed(replace(made.layer, experts=len(again)), made.records, made.slot_map[again], [], weights)


def call(packed: layers.Packed, seed: int) -> Call:
    """All experts by chance, all tokens to one expert, or to none; now and then something that is not finite."""
    draw, g = random.Random(seed + 1), layers.generator(seed)
    count, tokens, slots = packed.layer.experts, draw.choice(TOKENS), draw.randint(0, 3)
    hidden = torch.randn(tokens, packed.layer.columns, generator=g).to(draw.choice(DTYPES))
    ids = torch.randint(0, count + 1, (tokens, slots), generator=g)
    if draw.random() < 0.3:
        ids.fill_(draw.randint(0, count))
    weights = torch.randn(tokens, slots, generator=g)
    bad, wrong = [], False
    if ids.numel() and draw.random() < 0.3:
        token = draw.randrange(tokens)
        routed = bool((ids[token] < count).any())
        if draw.random() < 0.5:
            hidden[token, draw.randrange(hidden.shape[1])] = float("nan")
        else:
            weights[token, :] = draw.choice((float("nan"), float("inf"), -float("inf")))
        bad = [token] if routed else []
    if ids.numel() and draw.random() < 0.15:
        ids[draw.randrange(tokens), draw.randrange(slots)] = draw.choice((-1, count + 1, 1 << 31, 1 << 62, -(1 << 63)))
        wrong = True
    kinds = (torch.int64,) if wrong else (torch.int64, torch.int32)
    weights = weights.to(draw.choice((torch.float32, torch.float64)))
    parts = (placed(draw, one) for one in (hidden, ids.to(draw.choice(kinds)), weights))
    return Call(*parts, tuple(bad), wrong)


def placed(draw: random.Random, value: Tensor) -> Tensor:
    """The same values in memory of another form: strided, turned, in the middle of a storage, at an odd address."""
    how = draw.choice(("plain", "plain", "strided", "turned", "inside", "odd"))
    if how == "strided":
        wide = value.new_zeros(*value.shape[:-1], 2 * value.shape[-1] + 1)
        wide[..., 1::2] = value
        return wide[..., 1::2]
    if how == "turned":
        return value.movedim(0, -1).contiguous().movedim(-1, 0)
    if how == "inside":
        return torch.cat([value.new_ones(3), value.reshape(-1), value.new_ones(3)])[3:-3].view(value.shape)
    if how == "odd" and value.numel():
        memory = torch.zeros(value.nbytes + 1, dtype=torch.uint8)
        memory[1:] = value.contiguous().view(-1).view(torch.uint8)
        return torch.frombuffer(memory.numpy(), dtype=value.dtype, offset=1).view(value.shape)
    return value


def split(found: Tensor, bad: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(rows that must be finite, rows that must not)."""
    mask = torch.zeros(len(found), dtype=torch.bool)
    mask[list(bad)] = True
    return found[~mask], found[mask]
