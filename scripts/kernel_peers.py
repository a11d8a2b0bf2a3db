"""What bench_kernels.py compares with: the same routed experts by other libraries, if they are installed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Experts:
    """Sizes: H, I, E, experts per token, and columns that share a scale."""

    hidden: int
    width: int
    experts: int
    per_token: int
    group: int


class Peer:
    """One library. Weights of `held` experts, enough not to stay in a cache; ids are taken modulo that number."""

    bits: tuple[int, ...] = (4, 3)

    def __init__(self, sizes: Experts, held: int) -> None:
        self.sizes, self.held = sizes, min(held, sizes.experts)
        self.weights = [self.make() for _ in range(self.held)]

    def make(self) -> tuple[Any, Any]:
        """(gate_up, down) of one expert, random."""
        raise ValueError("a peer makes its own weights")

    def linear(self, x: Tensor, weight: Any, rows: int) -> Tensor:
        """x [n, columns] -> [n, rows]."""
        raise ValueError("a peer multiplies in its own way")

    def threads(self, count: int) -> None:
        """Use this many threads; PyTorch's own number is set already."""

    def routing(self, tokens: int, turn: int) -> tuple[Tensor, Tensor, Tensor]:
        g = torch.Generator().manual_seed(turn)
        x = torch.randn(tokens, self.sizes.hidden, generator=g).bfloat16()
        per_token = self.sizes.per_token
        ids = torch.rand(tokens, self.sizes.experts, generator=g).argsort(-1)[:, :per_token] % self.held
        if tokens == 1:
            ids = (torch.arange(per_token) + turn * per_token)[None] % self.held
        return x, ids, torch.rand(tokens, per_token, generator=g).bfloat16()

    def run(self, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """The loop over experts that transformers runs on a CPU."""
        x, ids, gates = inputs
        out = torch.zeros_like(x)
        for expert in ids.unique().tolist():
            rows, slots = torch.where(ids == expert)
            up, down = self.weights[expert]
            gate, value = self.linear(x[rows], up, 2 * self.sizes.width).chunk(2, -1)
            y = self.linear(F.silu(gate) * value, down, self.sizes.hidden) * gates[rows, slots, None]
            out.index_add_(0, rows, y.to(out.dtype))
        return out


class TorchBf16(Peer):
    def __init__(self, sizes: Experts) -> None:
        super().__init__(sizes, sizes.experts)

    def make(self) -> tuple[Tensor, Tensor]:
        h, i = self.sizes.hidden, self.sizes.width
        return torch.randn(2 * i, h).bfloat16(), torch.randn(h, i).bfloat16()

    def linear(self, x: Tensor, weight: Tensor, rows: int) -> Tensor:
        return F.linear(x, weight)


class TorchInt4(Peer):
    """PyTorch's int4 weight-only product for CPUs (`_weight_int4pack_mm_for_cpu`)."""

    bits = (4,)

    def __init__(self, sizes: Experts) -> None:
        super().__init__(sizes, sizes.experts)

    def make(self) -> tuple[Any, Any]:
        return self.packed(2 * self.sizes.width, self.sizes.hidden), self.packed(self.sizes.hidden, self.sizes.width)

    def packed(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        codes = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
        grid = torch.rand(columns // self.sizes.group, rows, 2).bfloat16() * 0.01
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), grid

    def linear(self, x: Tensor, weight: tuple[Tensor, Tensor], rows: int) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight[0], self.sizes.group, weight[1])


class OnnxRuntime(Peer):
    """MatMulNBits with int8 activations (accuracy level 4, its fastest)."""

    bits = (4,)

    def __init__(self, sizes: Experts) -> None:
        import onnx  # noqa: F401
        import onnxruntime

        self.library, self.count = onnxruntime, 1
        size = 3 * sizes.hidden * sizes.width // 2
        super().__init__(sizes, max(2 * sizes.per_token, (64 << 20) // size))

    def threads(self, count: int) -> None:
        if count != self.count:
            self.count = count
            self.weights = [self.make() for _ in range(self.held)]

    def make(self) -> tuple[Any, Any]:
        return self.session(2 * self.sizes.width, self.sizes.hidden), self.session(self.sizes.hidden, self.sizes.width)

    def session(self, rows: int, columns: int) -> Any:
        import numpy as np
        from onnx import TensorProto, helper, numpy_helper

        blocks, group = columns // self.sizes.group, self.sizes.group
        codes = np.random.randint(0, 256, (rows, blocks, group // 2), dtype=np.uint8)
        scales = np.random.rand(rows * blocks).astype(np.float32) * 0.01
        node = helper.make_node(
            "MatMulNBits",
            ["x", "codes", "scales"],
            ["y"],
            domain="com.microsoft",
            K=columns,
            N=rows,
            bits=4,
            block_size=group,
            accuracy_level=4,
        )
        graph = helper.make_graph(
            [node],
            "matmul",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", columns])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", rows])],
            [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(scales, "scales")],
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        options = self.library.SessionOptions()
        options.intra_op_num_threads = self.count
        options.inter_op_num_threads = 1
        # every session has threads of its own, and dozens that spin would take the processors from each other
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return self.library.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def linear(self, x: Tensor, weight: Any, rows: int) -> Tensor:
        return torch.from_numpy(weight.run(None, {"x": x.float().numpy()})[0])


PEERS: dict[str, Callable[[Experts], Peer]] = {
    "torch bf16": TorchBf16,
    "torch int4pack": TorchInt4,
    "ONNX Runtime": OnnxRuntime,
}
