"""The one experts module: it serves streaming, loading and execution.

It stands where transformers' stacked experts stood and is called the same way, `(hidden [T, H], ids [T, K],
weights [T, K]) -> [T, H]`. Weights may be dense in any dtype or quantized, per expert; at most one expert is expanded
at a time and `[E, T, H]` never exists. The id `E` (number of experts) means "skip this slot". Packed weights are given
to a kernel backend when one can run them (ops.py), and stay on the path above otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moecompress import ops
from moecompress.arch.activation import recognise
from moecompress.checkpoint.native import LINEAR, RecordLayout, decode, decode_linear
from moecompress.checkpoint.native_gate import GateLayout
from moecompress.checkpoint.native_turns import TurnLayout
from moecompress.dispatch import Dispatch, received
from moecompress.errors import CheckpointError, message
from moecompress.numerics.activation import rounded_as
from moecompress.numerics.grids import is_absent
from moecompress.numerics.turn import without_turns
from moecompress.ops import Layer, materialise, routed_slots
from moecompress.packed import Packed, Unreadable, require_full_inputs
from moecompress.types import ExpertWeights, Projection, Scheme


class Experts(Dispatch):
    """Routed experts of one layer. Made from the family's own module (`replacing`), which gives the activation."""

    has_gate: bool
    _gate: Any

    def __init__(self) -> None:
        super().__init__()
        self.weights: Sequence[ExpertWeights] = ()

    @classmethod
    def replacing(cls, original: nn.Module) -> Experts:
        """An empty experts module with the activation, limits and flags of `original` (never its weights).

        The family's own `_apply_gate` is bound, so custom activations (clamps, alpha) need no code here.
        """
        gate = getattr(type(original), "_apply_gate", None)
        made = type(f"{cls.__name__}Of{type(original).__name__}", (cls,), {"_apply_gate": gate})()
        for name, value in vars(original).items():
            if not name.startswith("_") and name != "training":
                setattr(made, name, value)
        for name, child in original.named_children():
            made.add_module(name, child)
        made._is_expert_parallel = False
        made.eval()
        return made

    def __len__(self) -> int:
        return len(self.weights)

    def expert(self, index: int) -> ExpertWeights:
        """Weights of one expert, dense or quantized; packed subclasses decode here."""
        return self.weights[index]

    def activate(self, projected: Tensor) -> Tensor:
        """[n, 2I] (or [n, I] without a gate) -> [n, I], by the family's own rule."""
        return self._apply_gate(projected) if self.has_gate else self.act_fn(projected)  # type: ignore[operator]

    def run_expert(self, weights: ExpertWeights, inputs: Tensor, scheme: Scheme | None = None) -> tuple[Tensor, Tensor]:
        """One expert on `inputs` [n, H]: (what `down` received [n, I], output [n, H]), routing weight not applied.

        scheme: rounds the inputs of matrices without codes as it will once they have some.
        """
        dtype = inputs.dtype
        up_bias, down_bias = weights.gate_up_bias, weights.down_bias
        inputs = received(weights, "gate_up", inputs, scheme)
        projected = F.linear(
            inputs, materialise(weights.gate_up, dtype), None if up_bias is None else up_bias.to(dtype)
        )
        intermediate = received(weights, "down", self.activate(projected), scheme)
        output = F.linear(
            intermediate, materialise(weights.down, dtype), None if down_bias is None else down_bias.to(dtype)
        )
        if getattr(self, "has_post_expert_norm", False):
            output = self.post_expert_norm(output)  # type: ignore[operator]
        return intermediate, output

    def absent(self) -> Sequence[int]:
        known = isinstance(self.weights, tuple | list)  # others make their experts when asked, and have none absent
        return [index for index, expert in enumerate(self.weights) if is_absent(expert)] if known else ()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        ids, weights = top_k_index.reshape(-1, top_k_index.shape[-1]), top_k_weights
        ids, weights = self.dispatch(hidden_states, ids, weights.reshape(ids.shape))
        if self.observer is not None:
            self.observer.on_routing(hidden_states, ids, weights)
        out = torch.zeros_like(hidden_states)
        for expert, rows, slots in routed_slots(ids, len(self)):
            inputs = hidden_states[rows]
            gates = weights[rows, slots]
            matrices = self.expert(expert)
            intermediate, output = self.run_expert(matrices, inputs)
            if self.observer is not None:
                inputs = received(matrices, "gate_up", inputs)
                self.observer.on_expert(expert, rows, gates, inputs, intermediate, output)
            weighted = (output * gates[:, None].to(output.dtype)).to(out.dtype)
            out.scatter_add_(0, rows[:, None].expand(-1, out.shape[1]), weighted)  # 4 to 20 times index_add's speed
        return out


class PackedExperts(Packed, Experts):
    """Experts whose weights stay in native records: parameters `rec0..`, `slot_map`, the guard, and dense biases.

    Parameter names avoid words that transformers forces to float32 (scale, norm, bias, base). The guard is called
    `down_proj` in the checkpoint and `guard` here, where nothing must take it for a weight.
    """

    layouts: tuple[RecordLayout, ...]
    turns: tuple[TurnLayout, ...]
    slot_map: nn.Parameter
    guard: nn.Parameter
    has_bias: bool
    is_transposed: bool

    @classmethod
    def packing(
        cls,
        original: nn.Module,
        layouts: Sequence[RecordLayout],
        counts: Sequence[int],
        where: str,
        ids: int | None = None,
        gate: GateLayout | None = None,
        turns: Sequence[TurnLayout] = (),
    ) -> PackedExperts:
        """An empty module in place of `original`, for `counts[k]` records of each layout, on the default device.

        ids: how many the router gives (one per record by default, fewer records when ids share them); it may differ
        from the original's number of experts. Raises CheckpointError, naming `where`, when the
        layouts hold matrices of another shape than the original's.
        """
        made = cls.replacing(original)
        assert isinstance(made, cls)
        number = sum(counts) if ids is None else ids
        for name, projection in _projections(made).items():
            shape = tuple(getattr(original, name).shape[1:])
            shape = shape[::-1] if made.is_transposed else shape
            for layout in layouts:
                if (stored := layout.matrix(projection).shape) != shape:
                    found = f"{projection} records hold {list(stored)}"
                    raise CheckpointError(message(where, found, f"{list(shape)} (config.json)"))
            if made.has_bias:
                bias = getattr(original, f"{name}_bias")
                made.register_parameter(f"{name}_bias", _frozen(bias.new_empty(number, *bias.shape[1:])))
        made.layouts = tuple(layouts)
        made.start_packed(getattr(original, next(iter(_projections(made)))).dtype)
        for k, (layout, count) in enumerate(zip(layouts, counts, strict=True)):
            made.register_parameter(f"rec{k}", _frozen(torch.empty(count, layout.row_bytes, dtype=torch.uint8)))
        made.slot_map = _frozen(torch.empty(number, 2, dtype=torch.int32))
        made.guard = _frozen(torch.empty(1, dtype=torch.uint8))
        made.gate_layout = gate
        if gate is not None and gate.kind == "mask_router":
            size = gate.mask_bytes(made.layouts[0].matrix("gate_up").shape[1])
            made.mask_router = _frozen(torch.empty(size, dtype=torch.uint8))
        made.turns = tuple(turns)
        for turn in turns:
            for leaf, (dtype, shape) in turn.tensors().items():
                made.register_parameter(leaf, _frozen(torch.empty(shape, dtype=dtype)))
        return made

    def __len__(self) -> int:
        return int(self.slot_map.shape[0])

    def absent(self) -> Sequence[int]:
        empty = [k for k, layout in enumerate(self.layouts) if layout.matrix("down").scheme.bits == 0]
        return [i for i, (k, _) in enumerate(self.slot_map.tolist()) if k in empty] if empty else ()

    def expert(self, index: int) -> ExpertWeights:
        weights = decode(self.layouts[int(self.slot_map[index, 0])], self.record(index))
        for turn in self.turns:
            values = {leaf: getattr(self, leaf).data for leaf in turn.tensors()}
            weights = weights.with_turn(turn.projection, turn.turn(values, index))
        if not self.has_bias:
            return weights
        up, down = (getattr(self, f"{name}_bias")[index] for name in _projections(self))
        return replace(weights, gate_up_bias=up, down_bias=down)

    def slots(self) -> Tensor:
        return self.slot_map

    def biases(self) -> list[Tensor]:
        return [getattr(self, f"{name}_bias").data for name in _projections(self)] if self.has_bias else []

    def described(self) -> Layer | str:
        if getattr(self, "has_post_expert_norm", False):
            return "the family norms the output of every expert"
        if self.turns:
            return "its experts turn their inputs, which kernels do not"
        activation = recognise(self)
        if activation is None:
            return f"the activation of {type(self).__name__} is none that kernels know"
        layouts = [self.layouts[k] for k in self.filled()]
        if not layouts:
            return "no expert has a record"
        return ops.describe_layer(layouts, len(self), activation, self.has_bias)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if self.observer is not None or not self.compiled(hidden_states, top_k_weights):
            return super().forward(hidden_states, top_k_index, top_k_weights)
        assert self.choice is not None
        ids = top_k_index.reshape(-1, top_k_index.shape[-1])
        ids, weights = self.dispatch(hidden_states, ids, top_k_weights.reshape(ids.shape))
        return ops.moe_mlp(hidden_states, ids, weights, self.handle, self.choice.backend, self.text)

    @torch.no_grad()
    def unpack_into(self, stock: nn.Module, dtype: torch.dtype) -> None:
        """Give `stock`, the family's own (empty) module for as many experts, these weights in `dtype`.

        Raises UnsupportedModel where inputs are rounded, which the family's own module cannot do.
        """
        for layout in self.layouts:
            for _, described in layout.matrices:
                require_full_inputs(described.scheme)
        for name, projection in _projections(self).items():
            shape = getattr(stock, name).shape
            dense = torch.empty(shape, dtype=dtype, device=self.slot_map.device)
            for index in range(len(self)):
                matrix = materialise(without_turns(self.expert(index)).projection(projection), dtype)
                dense[index] = matrix.T if self.is_transposed else matrix
            setattr(stock, name, nn.Parameter(dense))
            if self.has_bias:
                setattr(stock, f"{name}_bias", getattr(self, f"{name}_bias"))
        for name, child in self.named_children():
            stock.add_module(name, child)


class PackedLinear(Packed):
    """A Linear whose weight stays in a native record `rec0` uint8 [1, R]; expanded when used, where no kernel fits."""

    def __init__(self, original: nn.Linear, layout: RecordLayout, where: str) -> None:
        """Empty, on the default device. Raises CheckpointError, naming `where`, when the record has another shape."""
        super().__init__()
        shape, stored = (original.out_features, original.in_features), layout.matrix(LINEAR).shape
        if stored != shape:
            found = f"its record holds {list(stored)}"
            raise CheckpointError(message(where, found, f"{list(shape)} (config.json)"))
        self.out_features, self.in_features, self.layouts = *shape, (layout,)
        self.dtype = original.weight.dtype
        self.start_packed(self.dtype)
        self.rec0 = _frozen(torch.empty(1, layout.row_bytes, dtype=torch.uint8))
        self.guard = _frozen(torch.empty(1, dtype=torch.uint8))
        self.bias = original.bias

    @property
    def scheme(self) -> Scheme:
        return self.layouts[0].matrix(LINEAR).scheme

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in]."""
        return materialise(decode_linear(self.layouts[0], self.record(0)), dtype)

    @property
    def weight(self) -> Tensor:
        """The weight in the model's dtype, expanded: some families read it instead of calling the module.

        Where inputs are rounded it has a dtype, a shape and a device and is good for nothing else: who multiplies by
        himself would not round them.
        """
        if self.scheme.activation != "none":
            return torch.empty(1, dtype=self.dtype).expand(self.out_features, self.in_features).as_subclass(Unreadable)
        return self.dense(self.dtype)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The weight of a plain Linear instead of this. Raises UnsupportedModel where inputs are rounded."""
        require_full_inputs(self.scheme)
        return self.dense(dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.compiled(inputs):
            return F.linear(rounded_as(self.scheme, inputs), self.dense(inputs.dtype), self.bias)
        return self.product(inputs, self.bias)

    def __repr__(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"PackedLinear({sizes}, bits={self.scheme.bits}, activation={self.scheme.activation})"


def _projections(experts: Any) -> dict[str, Projection]:
    """Parameter name in the family's module -> projection."""
    return {"gate_up_proj" if experts.has_gate else "up_proj": "gate_up", "down_proj": "down"}


def _frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
