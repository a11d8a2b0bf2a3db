"""The runtime layout, read back by its description in mc_cpu.h alone: what other readers of a blob rely on."""

from __future__ import annotations

import itertools
import struct

import packed_layers as layers
import pytest
import torch

from moecompress import ops
from moecompress.types import QuantizedTensor, Scheme
from moecompress_kernels import cpu

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
PANEL, BLOCK, TILE, LINE = 32, 16, 32, 64


def code_at(blob: bytes, tiles: int, bits: int, row: int, tile: int, column: int) -> int:
    """One code of a plain matrix: panel, tile, block, line, lane, half word, position in the half word."""
    panel, block, lane = row // PANEL, row % PANEL // BLOCK, row % BLOCK
    start = (panel * tiles + tile) * 2 * bits * LINE + block * bits * LINE

    def half(line: int) -> int:
        return int(struct.unpack_from("<H", blob, start + line * LINE + lane * 4 + 2 * (column % 2))[0])

    pair = column // 2
    if bits == 3 and pair == 15:
        return sum((half(line) >> 15) << line for line in range(3))
    per = 5 if bits == 3 else 16 // bits
    return half(pair // per) >> (pair % per * bits) & ((1 << bits) - 1)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("group", [16, 32, 64])
def test_codes_are_where_the_description_says(bits: int, group: int) -> None:
    matrix = layers.weight(40, 64, Scheme(bits, group, False, "int"))
    assert isinstance(matrix, QuantizedTensor)
    packed = layers.linear(matrix)
    blob = cpu.prepare(packed.layer, packed.records, packed.slot_map, [])[0].numpy().tobytes()
    per_group = -(-group // TILE)
    for row, column in itertools.product(range(40), range(64)):
        tile = column // group * per_group + column % group // TILE
        found = code_at(blob, 64 // group * per_group, bits, row, tile, column % group % TILE)
        assert found == int(matrix.codes[row, column]), (row, column)
    for row in range(40, 64):  # padding
        assert code_at(blob, 64 // group * per_group, bits, row, 0, 0) == 0


def test_scales_and_zeros_follow_by_panel_group_and_row() -> None:
    matrix = layers.weight(40, 64, Scheme(4, 32, False, "int"))
    assert isinstance(matrix, QuantizedTensor) and matrix.zeros is not None
    packed = layers.linear(matrix)
    blob = cpu.prepare(packed.layer, packed.records, packed.slot_map, [])[0]
    start = 2 * 2 * 2 * 4 * LINE  # panels, tiles, blocks, lines
    scales = blob[start : start + 2 * 2 * PANEL * 2].view(torch.bfloat16).view(2, 2, PANEL)
    zeros = blob[start + 256 : start + 256 + 2 * 2 * PANEL].view(2, 2, PANEL)
    for found, wanted in ((scales, matrix.scales), (zeros, matrix.zeros)):
        assert torch.equal(found.transpose(1, 2).reshape(64, 2)[:40], wanted)


@pytest.mark.parametrize("interleaved", [False, True])
def test_gate_and_up_of_one_output_share_a_panel(interleaved: bool) -> None:
    width = 20
    packed = layers.experts([(Scheme(4), Scheme(4))], 32, width, ops.Activation("silu", interleaved=interleaved))
    matrix = packed.weights[0].gate_up
    assert isinstance(matrix, QuantizedTensor)
    blob = cpu.prepare(packed.layer, packed.records, packed.slot_map, [])[0].numpy().tobytes()
    for output, up in itertools.product(range(width), (0, 1)):
        source = 2 * output + up if interleaved else up * width + output
        row = output // BLOCK * PANEL + up * BLOCK + output % BLOCK
        assert code_at(blob, 1, 4, row, 0, 5) == int(matrix.codes[source, 5])
