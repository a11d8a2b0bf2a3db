"""The one Triton kernel: a grouped product of inputs with packed matrices, read from native records as they are.

Where TRITON_INTERPRET=1 is set when triton is imported, it runs in Triton's interpreter, on CPU tensors.
"""

from __future__ import annotations

import triton
import triton.language as tl

BINARY, INT, FLOAT = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)  # what a code means; 0: symmetric


@triton.jit
def _columns(
    x, sums, blob, codes, scales, zeros, bits, group, kind, rows, kept, start, columns,
    SCALES: tl.constexpr, OFFSETS: tl.constexpr, STRADDLE: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """[TOKENS, rows]: x [TOKENS, COLUMNS] times the columns from `start` on, which share a scale in each row.

    Codes are whole numbers in the product; scales and zero points come after it, in float32.
    """
    k = start + tl.arange(0, COLUMNS)
    bit = k * bits
    pitch = (columns * bits + 31) // 32 * 4
    byte = blob + codes + (bit >> 3)[:, None] + (rows * pitch)[None, :]
    there = (k < columns)[:, None] & kept[None, :]
    word = tl.load(byte, mask=there, other=0).to(tl.int32)
    if STRADDLE:  # codes of 3 bits may begin in one byte and end in the next
        more = there & ((bit & 7) + bits > 8)[:, None]
        word |= tl.load(byte + 1, mask=more, other=0).to(tl.int32) << 8
    middle = 1 << (bits - 1)
    code = (((word >> (bit & 7)[:, None]) & (2 * middle - 1)) - middle).to(tl.float32)
    if TOKENS == 1:
        product = tl.sum(x.to(tl.float32)[:, :, None] * code[None, :, :], 1)
    else:
        product = tl.dot(x, code.to(x.dtype), input_precision="ieee")
    index = rows * (columns // group) + start // group
    scale = tl.load((blob + scales).to(tl.pointer_type(SCALES)) + index, mask=kept, other=0.0).to(tl.float32)
    if OFFSETS:
        whole = tl.load(blob + zeros + index, mask=kept & (kind == INT), other=0).to(tl.float32)
        real = tl.load((blob + zeros).to(tl.pointer_type(SCALES)) + index, mask=kept & (kind == FLOAT), other=0.0)
        zero = tl.where(kind == INT, whole, real.to(tl.float32))
        offset = tl.where(kind >= INT, zero - middle, tl.where(kind == BINARY, -0.5, 0.0))
        product -= sums[:, None] * offset[None, :]
        scale = tl.where(kind == BINARY, 2.0 * scale, scale)
    return product * scale[None, :]


@triton.jit
def _completed(sums, steps, rows, valid, bias, at, kept):
    """Sums [TOKENS, CHANNELS] times the steps of their rows, plus the bias at `at` [CHANNELS]."""
    if steps is not None:
        sums *= tl.load(steps + rows, mask=valid, other=0.0)[:, None]
    if bias is not None:
        sums += tl.load(bias + at, mask=kept, other=0.0).to(tl.float32)[None, :]
    return sums


@triton.jit
def _activated(gate, up, alpha, limit, shift, FUNCTION: tl.constexpr, GATED: tl.constexpr):
    """f(min(gate, limit)) * (clamp(up, +-limit) + shift); comparisons are written so that NaN stays NaN."""
    gate = tl.where(gate > limit, limit, gate)
    if FUNCTION == "silu":
        gate = gate / (1.0 + tl.exp(-alpha * gate))
    elif FUNCTION == "gelu":
        gate = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865475))
    elif FUNCTION == "gelu_tanh":  # (1 + tanh(y)) / 2 = 1 / (1 + exp(-2y))
        gate = gate / (1.0 + tl.exp(-1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)))
    elif FUNCTION == "relu":
        gate = tl.where(gate < 0, 0.0, gate)
    elif FUNCTION == "relu2":
        gate = tl.where(gate < 0, 0.0, gate * gate)
    if GATED:
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
        gate = gate * (up + shift)
    return gate


@triton.jit
def _slots(block, blocks, order, count, TOKENS: tl.constexpr):
    """(expert, slots [TOKENS], which of them there are) of a block; what blocks are: see `product`."""
    if blocks is None:
        expert = block * 0
        slots = block * TOKENS + tl.arange(0, TOKENS)
        valid = slots < count
    elif order is None:
        expert = tl.load(blocks + block)
        slots = block + tl.arange(0, TOKENS)
        valid = slots < block + 1
    else:
        expert = tl.load(blocks + 3 * block)
        at = tl.load(blocks + 3 * block + 1) + tl.arange(0, TOKENS)
        valid = at < tl.load(blocks + 3 * block + 2)
        slots = tl.load(order + at, mask=valid, other=0)
    return expert, slots, valid


@triton.jit
def product(
    inputs, steps, out, blob, table, blocks, order, weights, bias,
    count, per_row, columns, width, experts, alpha, limit, shift,
    MULTIPLY: tl.constexpr, SCALES: tl.constexpr, OFFSETS: tl.constexpr, STRADDLE: tl.constexpr,
    FUNCTION: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[slot] = activation(matrix of the slot's expert @ inputs[r] * steps[r] + bias) * weight, r = slot // per_row.

    Program (c, b) gives CHANNELS values to the slots of block b. Blocks: without `blocks` TOKENS neighbours of the
    `count` rows of a Linear; without `order` one slot, whose expert is blocks[b]; else order[first:end] of expert e,
    where blocks[b] = (e, first, end). Slots of an expert that does not exist become 0. table: int64 [E, 6], see
    triton.py. inputs are multiplied as MULTIPLY. steps: of inputs that are codes, or None. FUNCTION "none" with GATED
    False: no activation.
    """
    expert, slots, valid = _slots(tl.program_id(1).to(tl.int64), blocks, order, count, TOKENS)
    exists = (expert >= 0) & (expert < experts)
    expert = tl.where(exists, expert, 0)

    channels = tl.program_id(0).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    kept = channels < width
    first = channels
    second = channels + width
    if INTERLEAVED:
        first = 2 * channels
        second = first + 1
    entry = table + 6 * expert
    codes, scales, zeros = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    bits, group, kind = (
        tl.load(entry + 3).to(tl.int32),
        tl.load(entry + 4).to(tl.int32),
        tl.load(entry + 5).to(tl.int32),
    )
    gate = tl.zeros([TOKENS, CHANNELS], tl.float32)
    up = tl.zeros([TOKENS, CHANNELS], tl.float32)
    rows = slots // per_row
    for start in range(0, tl.where(exists, columns, 0), COLUMNS):
        k = start + tl.arange(0, COLUMNS)
        there = valid[:, None] & (k < columns)[None, :]
        x = tl.load(inputs + rows[:, None] * columns + k[None, :], mask=there, other=0.0).to(MULTIPLY)
        sums = tl.sum(x.to(tl.float32), 1)
        gate += _columns(
            x, sums, blob, codes, scales, zeros, bits, group, kind, first, kept, start, columns,
            SCALES, OFFSETS, STRADDLE, TOKENS, COLUMNS,
        )  # fmt: skip
        if GATED:
            up += _columns(
                x, sums, blob, codes, scales, zeros, bits, group, kind, second, kept, start, columns,
                SCALES, OFFSETS, STRADDLE, TOKENS, COLUMNS,
            )  # fmt: skip
    biases = expert * (2 * width if GATED else width)
    gate = _completed(gate, steps, rows, valid, bias, biases + first, kept)
    if GATED:
        up = _completed(up, steps, rows, valid, bias, biases + second, kept)
    value = _activated(gate, up, alpha, limit, shift, FUNCTION, GATED)
    if weights is not None:
        value *= tl.load(weights + slots, mask=valid, other=0.0)[:, None]
    value = tl.where(exists, value, 0.0)
    target = out + slots[:, None] * width + channels[None, :]
    tl.store(target, value.to(out.dtype.element_ty), mask=valid[:, None] & kept[None, :])


INTERPRETED = not isinstance(product, triton.JITFunction)
