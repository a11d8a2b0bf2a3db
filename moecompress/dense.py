"""Large Linears that stay in bf16, multiplied by the CPU kernels: generation reads all their weights for every token.

Only where that was measured to pay: on processors with bf16 dot products and without AMX (which PyTorch uses well), for
weights too large for a cache. There, one row of inputs takes PyTorch 1.8 to 3 times as long, and 64 rows or more are
multiplied 0.85 to 1.0 times as fast as by PyTorch (kernels/README.md).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moecompress import ops
from moecompress.checkpoint.native import LINEAR, plan_record
from moecompress.ops import TORCH, Choice, Layer
from moecompress.packed import Packed
from moecompress.types import Scheme

LEAST = 1 << 22  # weights: 8 MB, more than a core's own caches


class DenseLinear(Packed):
    """A Linear with its weight `weight` [out, in] in bf16, which the backend holds as it would a record of 16 bits.

    Saving and moving see a plain `weight`. Who reads it himself gets it, and it stays with PyTorch from then on.
    """

    def __init__(self, original: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = original.out_features, original.in_features
        shape = (self.out_features, self.in_features)
        self.layouts = (plan_record([(LINEAR, shape, Scheme(16), torch.bfloat16)]),)
        self.start_packed(original.weight.dtype)
        self.weight = nn.Parameter(original.weight.data, requires_grad=False)  # as all of a packed model
        self.bias = original.bias
        self.training = original.training

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and self.__dict__.get("handle"):
            self.restore()
            self.choice = Choice(TORCH, tuple((other, "its weight is read by other code") for other in ops.ORDER))
        return super().__getattr__(name)

    def described(self) -> Layer | str:
        dtype = self._own().dtype
        return super().described() if dtype == torch.bfloat16 else f"the weight is {str(dtype).removeprefix('torch.')}"

    def records(self) -> list[Tensor]:
        return [self._own().data.contiguous().view(torch.uint8).reshape(1, -1)]

    def drop_records(self) -> None:
        self._own().data = self._own().new_empty(self.out_features, 0)

    def take_records(self) -> None:
        self._own().data = self.record(0).view(torch.bfloat16).view(self.out_features, self.in_features)

    def _own(self) -> nn.Parameter:
        """The parameter, empty while a backend holds the weight."""
        parameter = self._parameters["weight"]
        assert parameter is not None
        return parameter

    def forward(self, inputs: Tensor) -> Tensor:
        if self.compiled(inputs):
            return self.product(inputs, self.bias)
        if self.handle:
            self.restore()
        return F.linear(inputs, self._own(), self.bias)

    def __repr__(self) -> str:
        return f"DenseLinear(in_features={self.in_features}, out_features={self.out_features})"


def hold_large_linears(model: nn.Module) -> int:
    """Put DenseLinear in place of a model's large plain Linears in bf16 on the CPU; how many.

    Left alone: weights that are shared (tied embeddings), of other dtypes or devices, or moved about by accelerate's
    hooks; and all of them on machines where it does not pay.
    """
    if ops.unavailable("cpu") or not ops.holds_dense():
        return 0
    owners = Counter(id(value) for module in model.modules() for value in module._parameters.values())
    found = [(name, module) for name, module in model.named_modules() if _is_large(module, owners)]
    for name, module in found:
        assert isinstance(module, nn.Linear)
        model.set_submodule(name, DenseLinear(module))
    return len(found)


def _is_large(module: nn.Module, owners: Counter[int]) -> bool:
    if type(module) is not nn.Linear or hasattr(module, "_hf_hook"):
        return False
    weight = module.weight
    plain = weight.dtype == torch.bfloat16 and weight.device.type == "cpu"
    aligned = module.in_features % 32 == 0  # a record is then its weight, byte for byte
    return plain and aligned and weight.numel() >= LEAST and owners[id(weight)] == 1
