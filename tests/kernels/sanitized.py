"""Run by test_cuda_compile.py under AddressSanitizer: `sanitized.py LIBRARY` runs all kernels of that shim once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

import cudashim
from packed_layers import experts, linear, routing, weight

from moecompress.types import Scheme
from moecompress_kernels import cuda

WIDE = [
    (Scheme(4, 32), Scheme(4, 96)),
    (Scheme(3, 64), Scheme(3, 32)),
    (Scheme(2, 128), Scheme(8)),
    (Scheme(1, binary=True), Scheme(4, 32, False, "int")),
    (Scheme(8, 32), Scheme(3, 32, False, "float")),
]
NARROW = [(Scheme(4), Scheme(3)), (Scheme(3), Scheme(4))]


def main(library: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        cudashim.install(patch, cudashim.device(library))
        for schemes, hidden, width in ((WIDE, 256, 96), (NARROW, 72, 40)):
            packed = experts(schemes, hidden, width, bias=True)
            handle = cuda.prepare(packed.layer, packed.records, packed.slot_map, packed.biases)
            for expert in range(len(schemes)):
                cuda.record(packed.layer, handle, expert)
            for tokens, prefill in ((1, "mma"), (3, "mma"), (17, "mma"), (40, "mma"), (90, "wgmma")):
                patch.setenv(cuda.PREFILL, prefill)
                cuda.moe_mlp(packed.layer, handle, *routing(tokens, len(schemes), 2, hidden, torch.bfloat16))
        packed = linear(weight(72, 264, Scheme(3)))
        handle = cuda.prepare(packed.layer, packed.records, packed.slot_map, [])
        for tokens, prefill in ((1, "mma"), (20, "mma"), (70, "mma"), (70, "wgmma")):
            patch.setenv(cuda.PREFILL, prefill)
            cuda.packed_linear(packed.layer, handle, torch.ones(tokens, 264, dtype=torch.float16))
    print("done")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
