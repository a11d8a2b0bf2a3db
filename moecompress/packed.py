"""Modules whose weights are native records: who holds the bytes while they run, and how they come back."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from moecompress import ops
from moecompress.checkpoint.native import RecordLayout
from moecompress.errors import UnsupportedModel, message
from moecompress.ops import TORCH, Choice, Layer
from moecompress.types import Scheme

STREAMED = "torch, one layer at a time (kernels run models that are loaded whole)"


class Packed(nn.Module):
    """Native records `rec0..` in a module, which a backend may hold in its own layout instead.

    While a backend holds them, the parameters `rec<k>` are empty. `restore` puts the records back, byte for byte; it is
    called before the state is read, loaded or moved, so that saving and `.to(device)` see records only.
    """

    layouts: tuple[RecordLayout, ...]
    expected: torch.dtype
    choice: Choice | None
    handle: list[Tensor]
    layer: Layer | None
    text: str  # of the layer, which is how operators take it
    takes: tuple[torch.dtype, ...] = ops.DTYPES  # what inputs the chosen backend takes: kept where graphs can read it

    def start_packed(self, dtype: torch.dtype) -> None:
        """dtype: of the model, which inputs are expected to have."""
        self.expected = dtype
        self.choice, self.handle, self.layer, self.text = None, [], None, ""
        self.register_state_dict_pre_hook(_restore)
        self.register_load_state_dict_pre_hook(_restore)

    def filled(self) -> list[int]:
        """Records that hold anything: all but those of experts of 0 bits."""
        return [k for k, layout in enumerate(self.layouts) if layout.row_bytes]

    def described(self) -> Layer | str:
        """The layer as backends see it, or the reason why it cannot be told. Here: one Linear."""
        return ops.describe_layer(self.layouts, 1)

    def slots(self) -> Tensor:
        """int32 [E, 2] = (k, row). Here: the one record of a Linear."""
        return torch.zeros(1, 2, dtype=torch.int32)

    def biases(self) -> list[Tensor]:
        """Those that the backend is to add. Here: none, a Linear adds its own."""
        return []

    def records(self) -> list[Tensor]:
        """uint8 [n_k, R_k] of each layout, no backend holding them."""
        return [getattr(self, f"rec{k}").data for k in range(len(self.layouts))]

    def drop_records(self) -> None:
        """Leave the parameters empty: a backend holds what they held."""
        for k in range(len(self.layouts)):
            parameter = getattr(self, f"rec{k}")
            parameter.data = parameter.new_empty(parameter.shape[0], 0)

    def take_records(self) -> None:
        """Fill the parameters with what the backend gives back."""
        counts = [getattr(self, f"rec{k}").shape[0] for k in range(len(self.layouts))]
        for k, (count, layout) in enumerate(zip(counts, self.layouts, strict=True)):
            getattr(self, f"rec{k}").data = self.handle[0].new_empty(count, layout.row_bytes, dtype=torch.uint8)
        for index, (k, row) in enumerate(self.slots().tolist()):
            if self.layouts[k].row_bytes:
                getattr(self, f"rec{k}").data[row] = self.record(index)

    @torch.no_grad()
    def prepare(self) -> Choice:
        """Choose a backend for inputs of the expected dtype and give it the records. Once; again after `restore`."""
        if self.choice is not None:
            return self.choice
        records = self.records()
        described = self.described()
        kept = self.filled()
        if isinstance(described, str):
            self.choice = Choice(TORCH, tuple((name, described) for name in ops.ORDER))
            return self.choice
        self.choice, self.layer = ops.choose(described, records[0].device, self.expected), described
        self.text, self.takes = described.text, ops.backend(self.choice.backend).DTYPES
        if self.choice.backend != TORCH:
            values = [records[k] for k in kept]
            slots = self.slots().data
            if len(kept) < len(records):  # experts of 0 bits get no tokens: any record stands for them
                slots = torch.tensor(
                    [[kept.index(k), row] if k in kept else [0, 0] for k, row in slots.tolist()],
                    dtype=slots.dtype,
                    device=slots.device,
                )
            held = ops.backend(self.choice.backend).prepare(described, values, slots, self.biases())
            self.handle = ops.sealed(self.choice.backend, described, held)
            self.drop_records()
        return self.choice

    @torch.no_grad()
    def restore(self) -> None:
        """Take the records back from the backend."""
        if self.handle:
            self.take_records()
        self.choice, self.handle, self.layer, self.text, self.takes = None, [], None, "", ops.DTYPES

    def record(self, index: int) -> Tensor:
        """One record, uint8 [R], whoever holds it."""
        if self.handle and self.layouts[int(self.slots()[index, 0])].row_bytes:
            assert self.choice is not None and self.layer is not None
            return ops.backend(self.choice.backend).record(self.layer, self.handle[:-1], index)
        k, row = self.slots()[index].tolist()
        return getattr(self, f"rec{k}")[row]  # type: ignore[no-any-return]

    def compiled(self, inputs: Tensor, *others: Tensor) -> bool:
        """Whether a backend other than torch runs this call, which gets `inputs` and maybe `others`; prepares at the
        first one. Where a gradient is asked for, PyTorch's own operations run.

        Inputs of a dtype that the chosen backend does not take make it give its weights to the best that does.
        """
        if getattr(getattr(self, "_hf_hook", None), "offload", False):
            return False  # its weights come and go with every call
        if inputs.dtype not in ops.DTYPES:
            return False
        if torch.is_grad_enabled() and any(value.requires_grad for value in (inputs, *others)):
            return False
        if self.choice is not None and inputs.dtype not in self.takes:
            self.restore()
        if self.choice is None:
            self.expected = inputs.dtype
            self.prepare()
        return bool(self.handle)

    def product(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        """Of a Linear, [..., in] -> [..., out], by the backend that `compiled` has found."""
        assert self.choice is not None
        out = ops.packed_linear(inputs, self.handle, self.choice.backend, self.text)
        return out if bias is None else out + bias

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = torch.empty(0, dtype=self.expected, device=self.handle[0].device if self.handle else None)
        after = fn(before)
        if (self.handle and after.device != before.device) or after.dtype != before.dtype:
            self.restore()  # to move records, or to choose for inputs of another dtype
        self.expected = after.dtype
        return super()._apply(fn, recurse)


def require_full_inputs(scheme: Scheme) -> None:
    """Raises UnsupportedModel for a matrix whose inputs are rounded: a dense weight would not do that."""
    if scheme.activation != "none":
        found = f"its inputs are rounded to {scheme.activation}"
        raise UnsupportedModel(message("dense weights of a packed matrix", found, then="run it packed"))


class Unreadable(Tensor):
    """The weight of a matrix whose inputs are rounded, for code that asks for its attributes."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Raises UnsupportedModel for everything but attributes."""
        if func.__name__ == "__get__":
            return super().__torch_function__(func, types, args, kwargs or {})
        found = "its inputs are rounded, and this family does not call the matrix, but multiplies by its weight"
        raise UnsupportedModel(message("weight of a packed matrix", found, then="leave activation_bits out for it"))


def _restore(module: Packed, *_: Any) -> None:
    module.restore()


def backends(model: nn.Module) -> list[str]:
    """Which backends run the packed modules of a model and why not better ones, most modules first; [] without any."""
    found: Counter[str] = Counter()
    for module in model.modules():
        if isinstance(module, Packed):
            choice = module.prepare()
            reasons = "; ".join(f"not {name}: {reason}" for name, reason in choice.refused)
            schemes = [matrix.scheme for layout in module.layouts for _, matrix in layout.matrices]
            rounded = "/".join(sorted({scheme.activation for scheme in schemes} - {"none"}))
            inputs = f", inputs rounded to {rounded}" if rounded else ""
            found[f"{choice.backend}, {ops.backend(choice.backend).describe()} ({reasons or 'the best'}){inputs}"] += 1
    return [f"{count} packed modules by {text}" for text, count in found.most_common()]


def backend_name(model: nn.Module) -> str:
    """What eval.json and report.json say about who computed."""
    return "; ".join(backends(model)) or "torch, dense weights"
