"""What every pass that gives codes to matrices shares: which matrices, how many bits, which groups."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from moecompress.errors import RecipeError, message
from moecompress.numerics.grids import round_to_nearest
from moecompress.passes.base import (
    TARGETS,
    LayerContext,
    Pass,
    Target,
    group_problems,
    input_columns,
    selected_linears,
)
from moecompress.types import (
    PROJECTIONS,
    Activation,
    LayerFacts,
    LayerWeights,
    ModelFacts,
    QuantizedTensor,
    Scheme,
    Weight,
)

Bits = Literal[1, 2, 3, 4, 8]
BITS: Bits = 4  # where neither the recipe nor an allocation says anything
_ROUTER = ("router", "routers", "gate", "norm", "norms", "embedding", "embeddings", "embed_tokens", "lm_head", "head")


class Quantizer(Pass):
    """Symmetric: q in [-2^(b-1), 2^(b-1)-1]; asymmetric: [0, 2^b-1] with a zero point. One symmetric bit: binary."""

    changes: ClassVar[frozenset[str]] = frozenset({"experts", "attention", "shared_experts", "dense_mlp"})
    takes_turned: ClassVar[bool] = True
    trial_hessian: ClassVar[bool] = False  # `trial` wants the second moments of the inputs

    bits: Bits | None = Field(
        None,
        description="code width of every targeted weight; 1 = binary (-s, +s); left out: what an allocate.* pass "
        "before gave each expert, and 4 for everything else",
    )
    group_size: int = Field(128, description="input columns that share one scale; -1 = one scale per output channel")
    symmetric: bool = Field(True, description="no zero points")
    activation_bits: Literal[4, 8] | None = Field(
        None, description="round what every target receives, per token while the model runs; left out: not at all"
    )
    activation_clip: float = Field(
        1.0, gt=0, le=1, description="share of a token's largest |value| that its rounding covers"
    )
    targets: tuple[Target, ...] = Field(("routed_experts",), description="what is quantized")

    @field_validator("targets", mode="before")
    @classmethod
    def _known_targets(cls, value: object) -> object:
        items = [value] if isinstance(value, str) else value
        for item in items if isinstance(items, list | tuple) else ():
            if item in _ROUTER:
                raise ValueError(
                    f"'{item}' is not quantized: a rounded router sends tokens to other experts, and routers, norms, "
                    f"embeddings and lm_head are small or sensitive; allowed: {', '.join(TARGETS)}"
                )
        return tuple(items) if isinstance(items, list | tuple) else items

    @field_validator("group_size")
    @classmethod
    def _positive_group(cls, value: int) -> int:
        return positive_group(value)

    @model_validator(mode="after")
    def _clip_needs_rounding(self) -> Quantizer:
        if self.activation_bits is None and self.activation_clip != 1:
            raise ValueError("activation_clip has nothing to clip; set activation_bits: 4 or 8")
        return self

    @property
    def scheme(self) -> Scheme:
        """How every targeted matrix is stored to which no allocation gave another width."""
        return self.scheme_at(BITS if self.bits is None else self.bits)

    def scheme_at(self, bits: int) -> Scheme:
        """How this pass stores a matrix of `bits`, and how the matrix's inputs are rounded."""
        return self.with_activation(scheme_of(bits, self.group_size, self.symmetric))

    @property
    def input_rounding(self) -> tuple[int, float] | None:
        """(bits, clip) of the rounding of inputs, None without."""
        return None if self.activation_bits is None else (self.activation_bits, self.activation_clip)

    def with_activation(self, scheme: Scheme) -> Scheme:
        """The scheme with the pass's rounding of inputs."""
        if self.activation_bits is None or scheme.bits == 0:
            return scheme
        kind: Activation = "int4" if self.activation_bits == 4 else "int8"
        return replace(scheme, activation=kind, activation_clip=self.activation_clip)

    def scheme_for(self, context: LayerContext, expert: int | None, name: str) -> Scheme:
        """How one matrix is stored: projection `name` of an expert, or a Linear (expert None).

        Raises RecipeError when the allocation was made for another number of experts.
        """
        if self.bits is not None or expert is None or context.allocation is None:
            return self.scheme
        widths, experts = context.allocation[name], len(context.weights.experts)
        if len(widths) != experts:
            found = f"the allocation has {len(widths)} experts, the layer {experts}"
            where = f"layer {context.weights.index} {self.name}"
            raise RecipeError(message(where, found, then="allocate after pruning and merging"))
        return self.scheme_at(widths[expert])

    def trial(self, weight: Tensor, bits: int, hessian: Tensor | None, scale_dtype: torch.dtype) -> QuantizedTensor:
        """What this pass makes of one matrix (float32 [out, in]) at `bits`, for allocators that compare widths.

        hessian: sum x x^T of its inputs, [in, in]; only for passes with `trial_hessian`.
        """
        return round_to_nearest(weight, self.scheme_at(bits), grid="mse", scale_dtype=scale_dtype)

    def check(self, facts: ModelFacts) -> list[str]:
        problems = group_problems(input_columns(facts, self.targets), self.group_size)
        for target in self.targets:
            if target != "routed_experts" and not any(selected_linears(layer, [target]) for layer in facts.layers):
                problems.append(f"targets: this model has no {target}")
        return problems

    def schemes(self, layer: LayerFacts) -> Mapping[str, Scheme]:
        chosen = dict.fromkeys(selected_linears(layer, self.targets), self.scheme)
        if layer.site is not None and "routed_experts" in self.targets:
            chosen.update(dict.fromkeys(PROJECTIONS, self.scheme))
        return chosen


def scheme_of(bits: int, group_size: int, symmetric: bool) -> Scheme:
    """The scheme behind three recipe keys: integer zero points when asymmetric, binary for one symmetric bit."""
    return Scheme(bits, group_size, symmetric, "none" if symmetric else "int", bits == 1 and symmetric)


def positive_group(value: int) -> int:
    """A group size as a recipe may give it. Raises ValueError for 0 and for negative numbers other than -1."""
    if value == 0 or value < -1:
        raise ValueError(f"{value} is not a group size; allowed: 16, 32, 64, 128, ... or -1 (per channel)")
    return value


def with_rounded(
    weights: LayerWeights,
    names: Collection[str],
    rounded: Callable[[Tensor, Scheme], QuantizedTensor],
    scheme: Callable[[int | None, str], Scheme],
) -> LayerWeights:
    """The layer with `rounded` applied, in float32, to every named matrix one by one.

    names: linear weights, and `gate_up` for both projections of all experts. scheme: of (expert or None, name).
    Matrices that already have codes keep them: the pass that made them owns them.
    """

    def one(weight: Weight, expert: int | None, name: str) -> Weight:
        return rounded(weight.float(), scheme(expert, name)) if isinstance(weight, Tensor) else weight

    if "gate_up" in names:
        made = []
        for index, expert in enumerate(weights.experts):
            for projection in PROJECTIONS:
                expert = expert.with_projection(projection, one(expert.projection(projection), index, projection))
            made.append(expert)
        weights = weights.with_experts(tuple(made))
    return weights.with_tensors(
        {name: one(weights.tensors[name], None, name) for name in names if name not in PROJECTIONS}
    )
