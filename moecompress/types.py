"""The shared vocabulary: what a weight, a quantized weight, a layer, a token set and a model's facts are.

Letters used everywhere: E experts, K experts per token, H hidden size, I expert width, T tokens, N sequences,
G groups per row, b bits. All classes here are frozen; functions return new values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from moecompress.gate import Gate

BITS = (1, 2, 3, 4, 8)  # code widths a weight can have; 16 = kept in the source dtype, 0 = no bytes, all zero
Zero = Literal["none", "int", "float"]
Activation = Literal["none", "int4", "int8"]
Stream = Literal["original", "compressed"]
Generator = Literal["self", "rtn4", "streamed"]  # where the weights of a model that generates are
Scoring = Literal["softmax", "sigmoid", "sqrt_softplus", "probabilities"]
Projection = Literal["gate_up", "down"]
PROJECTIONS: tuple[Projection, Projection] = ("gate_up", "down")


class ExpertId(NamedTuple):
    """One routed expert of the model."""

    layer: int
    expert: int


@dataclass(frozen=True)
class Scheme:
    """How a matrix `[out, in]` is stored.

    bits: 1, 2, 3, 4, 8 (codes), 16 (no codes: the tensor in its own dtype) or 0 (nothing is stored: all zero).
    group_size: input columns that share one scale; -1 = the whole row.
    symmetric: no zero point; `zero` says what kind of zero point otherwise.
    binary: 1-bit codes mean -scale / +scale (and only then).
    activation: how the input of this matrix is rounded at run time, per token (numerics.activation).
    activation_clip: share of a token's largest |value| that the rounding of its inputs covers.
    """

    bits: int
    group_size: int = -1
    symmetric: bool = True
    zero: Zero = "none"
    binary: bool = False
    activation: Activation = "none"
    activation_clip: float = 1.0

    def __post_init__(self) -> None:
        if self.bits not in (0, *BITS, 16):
            raise ValueError(f"bits: {self.bits}; allowed: {BITS}, 16 (unquantized) or 0 (pruned)")
        if self.group_size == 0 or self.group_size < -1:
            raise ValueError(f"group_size: {self.group_size}; allowed: -1 (per channel) or a positive number")
        if self.symmetric != (self.zero == "none"):
            raise ValueError(f"symmetric={self.symmetric} contradicts zero={self.zero!r}")
        if self.binary and not (self.bits == 1 and self.symmetric):
            raise ValueError("binary codes are 1-bit and symmetric")
        if not 0 < self.activation_clip <= 1 or (self.activation == "none" and self.activation_clip != 1):
            raise ValueError(f"activation_clip {self.activation_clip}; allowed: above 0, at most 1; 1 without rounding")

    @property
    def activation_bits(self) -> int | None:
        """4 or 8; None when inputs are used as they are."""
        return None if self.activation == "none" else int(self.activation.removeprefix("int"))

    def groups(self, columns: int) -> int:
        """Groups per row of a matrix with `columns` inputs. Raises ValueError when the size does not divide."""
        if self.bits in (0, 16) or self.group_size == -1:
            return min(self.bits, 1)
        if columns % self.group_size:
            raise ValueError(f"group_size {self.group_size} does not divide {columns} input columns")
        return columns // self.group_size


@dataclass(frozen=True)
class QuantizedTensor:
    """Codes of one matrix, unpacked: one byte per weight while it is worked on.

    codes: uint8 [out, in], unsigned u in [0, 2^b - 1].
    scales: [out, G] in the dtype they are stored in (bfloat16, float16 or float32).
    zeros: None, or [out, G]: uint8 for `zero: int`, the scales' dtype for `zero: float`.
    Value: symmetric (u - 2^(b-1)) * s; binary (2u - 1) * s; with zero point (u - z) * s; of 0 bits: 0.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    scheme: Scheme

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape


Weight = Tensor | QuantizedTensor


@dataclass(frozen=True, eq=False)
class Turn:
    """An orthogonal change of basis of what one matrix [out, c] receives, applied while the model runs.

    x -> x T: blocks of b columns times `first`, columns taken in `order`, blocks times `second` (numerics.turn).
    first, second: float32 [b, b], b divides c. order: int32 [c], a permutation. None = left out.
    The matrix is stored turned by the same T, so that the product stays what it was.
    """

    first: Tensor
    order: Tensor | None = None
    second: Tensor | None = None


@dataclass(frozen=True)
class ExpertWeights:
    """One routed expert in canonical (Linear) layout, whatever the family stores.

    gate_up: [2I, H] (rows as the family orders them: concatenated or interleaved), or [I, H] where there is no gate.
    down: [H, I]. Biases: [2I] and [H], or None. The real hidden size of the experts may differ from the model's.
    gate_up_turn, down_turn: how the matrix's input is turned before it; the matrix is stored in that basis.
    """

    gate_up: Weight
    down: Weight
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    gate_up_turn: Turn | None = None
    down_turn: Turn | None = None

    def turn(self, name: Projection) -> Turn | None:
        return self.gate_up_turn if name == "gate_up" else self.down_turn

    def with_turn(self, name: Projection, turn: Turn | None) -> ExpertWeights:
        return replace(self, gate_up_turn=turn) if name == "gate_up" else replace(self, down_turn=turn)

    def projection(self, name: Projection) -> Weight:
        return self.gate_up if name == "gate_up" else self.down

    def with_projection(self, name: Projection, weight: Weight) -> ExpertWeights:
        return replace(self, gate_up=weight) if name == "gate_up" else replace(self, down=weight)


@dataclass(frozen=True)
class LayerWeights:
    """All weights of one decoder layer: routed experts apart, everything else by its name inside the layer.

    tensors: e.g. `self_attn.q_proj.weight`, `mlp.gate.weight`, `input_layernorm.weight`; parameters and persistent
    buffers. experts: empty for a layer without routed experts. sources: for every expert its number in the checkpoint;
    None = all of them, in order. merged: for every expert the numbers of all that were merged into it, its own among
    them; None = each is itself alone. slots: where experts are shared, for every id that the router gives the place in
    `experts` of the one that serves it; None = the ids are those places. gate: leaves out some of a token's experts;
    None = never.
    """

    index: int
    tensors: Mapping[str, Weight]
    experts: Sequence[ExpertWeights] = ()
    sources: tuple[int, ...] | None = None
    slots: tuple[int, ...] | None = None
    gate: Gate | None = None
    merged: tuple[tuple[int, ...], ...] | None = None

    def with_tensors(self, changed: Mapping[str, Weight]) -> LayerWeights:
        unknown = sorted(set(changed) - set(self.tensors))
        if unknown:
            raise KeyError(f"layer {self.index} has no tensors {unknown}")
        return replace(self, tensors={**self.tensors, **changed})

    def with_experts(self, experts: Sequence[ExpertWeights]) -> LayerWeights:
        return replace(self, experts=experts)

    @property
    def source_ids(self) -> tuple[int, ...]:
        """For every expert its number in the checkpoint."""
        return tuple(range(len(self.experts))) if self.sources is None else self.sources

    @property
    def choices(self) -> int:
        """How many ids the router gives."""
        return len(self.experts) if self.slots is None else len(self.slots)


@dataclass(frozen=True)
class MoESite:
    """Where the routed experts of one layer are, and their sizes. Names are inside the layer."""

    experts: str  # e.g. "mlp.experts"
    router: str  # e.g. "mlp.gate"
    num_experts: int
    top_k: int
    hidden: int  # input columns of gate_up
    width: int  # I, input columns of down
    gate_up_name: str = "gate_up_proj"  # "up_proj" where there is no gate
    gated: bool = True
    concatenated: bool = True
    transposed: bool = False
    has_bias: bool = False
    groups: int = 1  # equal runs of experts, of which the router first chooses `top_groups`
    top_groups: int = 1
    extra_rows: int = 0  # rows of the router after those of the routed experts (inkling: gates of shared experts)
    shared_ids: int | None = None  # ids that the router gives, where several of them share an expert
    merged: bool = False  # experts stand for several of the source's, each under one id

    @property
    def choices(self) -> int:
        """How many ids the router gives."""
        return self.num_experts if self.shared_ids is None else self.shared_ids

    @property
    def gate_up_rows(self) -> int:
        return 2 * self.width if self.gated else self.width


Role = Literal[
    "routed_experts", "router", "attention", "shared_experts", "dense_mlp", "norm", "embedding", "lm_head", "other"
]


@dataclass(frozen=True)
class LayerFacts:
    """One decoder layer: module name, MoE site (or None), and the role and shape of every tensor inside it.

    expert_dims: tensors besides the experts that have one entry per routed expert (router rows, correction biases) and
    the dimension that runs over the experts.
    """

    index: int
    name: str  # e.g. "model.layers.3"
    site: MoESite | None
    roles: Mapping[str, Role]  # tensor name inside the layer -> role; routed expert tensors are not listed
    shapes: Mapping[str, tuple[int, ...]]
    linears: tuple[str, ...]  # names of 2-D `weight`s of nn.Linear modules: what can be quantized besides experts
    expert_dims: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelFacts:
    """What is known about the model before any tensor is read.

    rotation_problem(layer): why the residual stream cannot be rotated, as far as this layer's structure tells.
    fold_problem(layer): why no scale can leave the norm before this layer's experts, as far as its structure tells.
    linear_up(layer): whether scaling the up rows scales what `down` receives by as much.
    expert_gain(layer): g where the layer's output is g times the routed experts' output plus the rest; None where
    something else comes between (a norm, several residual streams). attends(layer): whether it has softmax attention
    whose probabilities can be had.
    scoring: how a router's first output becomes a distribution over experts (`probabilities`: it is one already).
    """

    model_type: str
    architecture: str  # class name
    hidden_size: int
    vocab_size: int
    dtype: torch.dtype  # the checkpoint's main float dtype
    layers: tuple[LayerFacts, ...]
    source_bytes: int
    config: Mapping[str, Any] = field(repr=False, default_factory=dict)
    rotation_problem: Callable[[int], str | None] = field(repr=False, compare=False, default=lambda _: None)
    fold_problem: Callable[[int], str | None] = field(repr=False, compare=False, default=lambda _: None)
    linear_up: Callable[[int], bool] = field(repr=False, compare=False, default=lambda _: True)
    expert_gain: Callable[[int], float | None] = field(repr=False, compare=False, default=lambda _: 1.0)
    attends: Callable[[int], bool] = field(repr=False, compare=False, default=lambda _: True)
    scoring: Scoring = "softmax"

    @property
    def moe_layers(self) -> tuple[LayerFacts, ...]:
        return tuple(layer for layer in self.layers if layer.site is not None)


@dataclass(frozen=True)
class TokenSet:
    """Calibration or evaluation tokens: N sequences of equal length, no padding.

    ids: int64 [N, T]. origin: what made it (JSON-able; goes into manifest and report). digest: sha256 of the ids.
    heldout: indices of sequences that no pass may train on (error measurement, accept / roll back).
    selected: bool [N, T], the tokens that statistics see; None = all.
    """

    name: str
    ids: Tensor
    origin: Mapping[str, Any]
    digest: str
    heldout: tuple[int, ...] = ()
    selected: Tensor | None = None


@dataclass(frozen=True)
class TokenBatch:
    """A slice of a token set as it goes through the model. ids: int64 [B, T]; rows: indices into the set.

    selected: bool [B, T], the tokens that statistics see; None = all.
    """

    ids: Tensor
    rows: tuple[int, ...]
    selected: Tensor | None = None
