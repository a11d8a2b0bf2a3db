"""GPTQ tensors of one matrix, as AutoGPTQ, GPTQModel, vLLM and SGLang read them (`checkpoint_format: gptq`)."""

from __future__ import annotations

import torch
from torch import Tensor

from moecompress.checkpoint.writer import Entry, tensor_entry
from moecompress.numerics.packing import pack_codes
from moecompress.types import QuantizedTensor

WIDTHS = (2, 3, 4, 8)


def gptq_entries(module: str, weight: QuantizedTensor, *, allow_lossy: bool = False) -> tuple[Entry, ...]:
    """`qweight` int32 [in*b/32, out], `qzeros` int32 [G, out*b/32], `scales` float16 [G, out], `g_idx` int32 [in].

    Value: scales[g_idx] * (q - z - 1) with the stored z = 2^(b-1) - 1 (this version of the format subtracts one).
    Raises ValueError for codes the format lacks, sizes that are no multiples of 32, and scales that float16 would
    change (allow_lossy: they are rounded).
    """
    scheme = weight.scheme
    rows, columns = weight.shape
    if not scheme.symmetric or scheme.binary or weight.zeros is not None or scheme.bits not in WIDTHS:
        raise ValueError(f"{module}: {scheme}; allowed: symmetric codes of 2, 3, 4 or 8 bits")
    if rows % 32 or columns % 32:
        raise ValueError(f"{module}: {rows} x {columns}; GPTQ's packing needs multiples of 32")
    scales = weight.scales.to(torch.float16)
    if not bool(scales.isfinite().all()) or not allow_lossy and not torch.equal(scales.float(), weight.scales.float()):
        raise ValueError(f"{module}: scales that float16 cannot hold exactly (--allow-lossy rounds them)")
    size = columns // scheme.groups(columns)
    zeros = torch.full((scales.shape[1], rows), (1 << (scheme.bits - 1)) - 1, dtype=torch.uint8)

    def words() -> tuple[memoryview]:
        return (_words(weight.codes, scheme.bits).t().contiguous().numpy().data,)

    return (
        Entry(f"{module}.qweight", torch.int32, (columns * scheme.bits // 32, rows), words),
        tensor_entry(f"{module}.qzeros", _words(zeros, scheme.bits)),
        tensor_entry(f"{module}.scales", scales.t().contiguous()),
        tensor_entry(f"{module}.g_idx", torch.arange(columns, dtype=torch.int32) // size),
    )


def _words(codes: Tensor, bits: int) -> Tensor:
    """Packed rows as int32 [rows, columns * bits / 32]."""
    return pack_codes(codes, bits).view(torch.int32)
