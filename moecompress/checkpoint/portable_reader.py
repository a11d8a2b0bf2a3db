"""Reads `pack-quantized` checkpoints: three stored tensors appear as one under the name they replaced."""

from __future__ import annotations

import torch
from torch import Tensor

from moecompress.checkpoint.header import TensorInfo
from moecompress.checkpoint.index import CheckpointIndex
from moecompress.checkpoint.portable import PARTS, PortableConfig
from moecompress.checkpoint.reader import TensorReader
from moecompress.errors import CheckpointError, message
from moecompress.numerics.grids import dequantize
from moecompress.numerics.packing import row_bytes, unpack_codes
from moecompress.types import QuantizedTensor, Scheme, Weight


class PortableReader(TensorReader):
    """A reader in which `X.weight_packed`, `X.weight_scale` and `X.weight_shape` are one tensor `X.weight`."""

    def __init__(self, index: CheckpointIndex, config: PortableConfig) -> None:
        super().__init__(index)
        self._schemes: dict[str, Scheme] = {}
        for name in index.tensors:
            if name.endswith("." + PARTS[0]):
                module = name.removesuffix("." + PARTS[0])
                self._schemes[f"{module}.weight"] = self._described(module, config)

    def is_packed(self, name: str) -> bool:
        return name in self._schemes

    def scheme(self, name: str) -> Scheme | None:
        """The scheme of a packed matrix, None for any other tensor."""
        return self._schemes.get(name)

    def names(self) -> list[str]:
        """Logical names in file order."""
        found = dict.fromkeys(self.logical_name(name) for name in super().names())
        return list(found)

    def logical_name(self, stored: str) -> str:
        """The name under which a stored tensor is read."""
        module, _, leaf = stored.rpartition(".")
        name = f"{module}.weight"
        return name if leaf in PARTS and name in self._schemes else stored

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._schemes:
            return super().shape(name)
        scales, scheme = self._part(name, 1), self._schemes[name]
        if scheme.group_size != -1:
            return (scales.shape[0], scales.shape[1] * scheme.group_size)
        return tuple(super().read(name.removesuffix("weight") + PARTS[2]).tolist())

    def logical_dtype(self, name: str) -> torch.dtype:
        return self._part(name, 1).dtype if name in self._schemes else super().logical_dtype(name)

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        """As `TensorReader.read`; a packed matrix is dequantized and rounded to the dtype of its scales."""
        if name not in self._schemes:
            return super().read(name, start, stop)
        packed = self.read_packed(name)
        return dequantize(packed, packed.scales.dtype)[start:stop]

    def read_weight(self, name: str) -> Weight:
        """The tensor as it is stored: codes and scales of a packed matrix, the plain tensor of any other name."""
        return self.read_packed(name) if self.is_packed(name) else super().read(name)

    def read_packed(self, name: str) -> QuantizedTensor:
        """A packed matrix as codes and scales. Raises CheckpointError when its three tensors contradict each other."""
        scheme, module = self._schemes[name], name.removesuffix("weight")
        rows, columns = self.shape(name)
        stored = super().read(module + PARTS[2]).tolist()
        words, scales = super().read(module + PARTS[0]), super().read(module + PARTS[1])
        expected = [(rows, row_bytes(columns, scheme.bits) // 4), (rows, scheme.groups(columns)), [rows, columns]]
        found = [tuple(words.shape), tuple(scales.shape), stored]
        if found != expected:
            raise CheckpointError(message(name, f"packed, scale, shape are {found}", f"{expected} for {scheme}"))
        self.check_finite(module + PARTS[1], scales)
        codes = unpack_codes(words.view(torch.uint8), scheme.bits, columns)
        return QuantizedTensor(codes, scales, None, scheme)

    def _part(self, name: str, part: int) -> TensorInfo:
        return self.info(name.removesuffix("weight") + PARTS[part])

    def _described(self, module: str, config: PortableConfig) -> Scheme:
        scheme = config.scheme_of(module)
        if scheme is None:
            raise CheckpointError(message(f"{module}.weight_packed", "no config group covers it", "one"))
        present = {part for part in PARTS if f"{module}.{part}" in self._index.tensors}
        extra = [part for part in ("weight_zero_point", "weight_g_idx") if f"{module}.{part}" in self._index.tensors]
        if len(present) < len(PARTS) or extra:
            raise CheckpointError(message(module, f"has {sorted(present) + extra}", f"{list(PARTS)}"))
        packed, scales = (self.info(f"{module}.{part}") for part in PARTS[:2])
        right = packed.dtype == torch.int32 and scales.dtype in (torch.bfloat16, torch.float16, torch.float32)
        if not right or len(packed.shape) != 2 or len(scales.shape) != 2 or packed.shape[0] != scales.shape[0]:
            found = f"{packed.dtype} {list(packed.shape)} with scales {scales.dtype} {list(scales.shape)}"
            raise CheckpointError(message(packed.name, found, "int32 [out, words] with float [out, groups]"))
        return scheme
