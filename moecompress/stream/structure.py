"""What the module tree alone says about a layer around its experts: for plans, which read no weights.

A layer runs once on the meta device, where tensors have shapes and no values; that two modules are given the same
tensor shows in the storage they share.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from moecompress.errors import UnsupportedModel
from moecompress.numerics.hadamard import default_block, random_signs, rotated
from moecompress.stream.attention import watch_attention
from moecompress.stream.fold import fold_of, linear_in_up, refused, watched_norms
from moecompress.stream.layers import call_layer, experts_of
from moecompress.stream.model import StreamModel
from moecompress.stream.outer import outer_weights
from moecompress.stream.prelude import LayerCall, record
from moecompress.stream.rebase import vocabulary
from moecompress.stream.residual import find_residual, thin_weights
from moecompress.types import MoESite

_TOKENS = 8
_LARGEST = 1 << 28  # weights of a layer, without routed experts, that are drawn to try a rotation


def with_structure(model: StreamModel) -> StreamModel:
    """The model with facts that know what is around its experts: `fold_problem`, `linear_up`, `expert_gain`."""
    structure = _Structure(model)
    around = lru_cache(maxsize=None)(structure.around)
    facts = replace(
        model.facts,
        fold_problem=lambda index: around(index).fold_problem,
        linear_up=structure.linear_up,
        rotation_problem=lru_cache(maxsize=None)(structure.rotation_problem),
        expert_gain=lambda index: around(index).gain,
        attends=lambda index: around(index).attends,
    )
    return replace(model, facts=facts)


@dataclass(frozen=True)
class Around:
    """fold_problem: why no scale can leave the norm before the experts; None where it can, or where the trace needs
    values (then `find_norm_fold`, which has them, decides). gain, attends: see `ModelFacts`."""

    fold_problem: str | None
    gain: float | None
    attends: bool


class _Structure:
    """A model without weights, whose layers are traced."""

    def __init__(self, model: StreamModel) -> None:
        self._model = model
        self._rotated: dict[Any, str | None] = {}  # by shapes and site of a layer

    def around(self, index: int) -> Around:
        """What one run of layer `index` shows."""
        site, where, trace = self._site(index), f"layer {index}", _Trace()
        hidden, call = self._entry[0], _on_meta(self._entry[1][index])
        layer = deepcopy(self._model.layers[index]).to("meta")
        experts = experts_of(layer, site.experts)
        for module in layer.modules():
            if (config := getattr(module, "config", None)) is not None:  # the copy's own
                setattr(config, "_attn_implementation", "eager")  # noqa: B010
        watch_attention(layer, experts)
        setattr(experts, "forward", lambda states, *_: trace.start(torch.zeros_like(states)))  # noqa: B010
        try:
            with torch.no_grad(), trace, watched_norms(layer, site, trace.inside) as (made, read):
                out = call_layer(layer, hidden, call)
        except (RuntimeError, UnsupportedModel):  # values decide what is computed (NotImplementedError among them)
            return Around(None, None, attends=True)
        seen = experts.attention
        gain, attends = trace.gain(out), seen is not None and seen.numel() == _TOKENS
        try:
            fold = fold_of(_with_real_norms(layer, made), site, made, read, where, _same_storage)
            if trace.used(made[fold.norm.removesuffix(".weight")]):
                raise refused(where, f"the layer itself computes with the output of {fold.norm}")
        except UnsupportedModel as error:
            return Around(str(error), gain, attends)
        return Around(None, gain, attends)

    def rotation_problem(self, index: int) -> str | None:
        """Why the residual stream cannot be rotated, as far as layer `index` tells: tried with random weights and
        narrow experts. None where it can, for a layer like one before, and for layers too large to be tried."""
        facts = self._model.facts.layers[index]
        kind = (tuple(facts.shapes.items()), facts.site)
        if kind in self._rotated or sum(torch.Size(s).numel() for s in facts.shapes.values()) > _LARGEST:
            return self._rotated.get(kind)
        size = self._model.facts.hidden_size
        signs, block = random_signs(size, torch.Generator().manual_seed(0)), default_block(size)
        hidden, calls = self._entry
        drawn = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
        self._rotated[kind] = None
        try:
            weights = thin_weights(self._model, index)
            find_residual(self._model, weights, calls[index], drawn, lambda x: rotated(x, block, signs))
            vocabulary(self._model)
        except UnsupportedModel as error:
            self._rotated[kind] = str(error)
        except RuntimeError:  # random weights are not enough: the real ones decide
            pass
        return self._rotated[kind]

    def linear_up(self, index: int) -> bool:
        """Whether scaling the up rows of layer `index`'s experts scales what `down` receives by as much."""
        site = self._site(index)
        return linear_in_up(experts_of(self._model.layers[index], site.experts).activate, site)

    def _site(self, index: int) -> MoESite:
        site = self._model.facts.layers[index].site
        assert site is not None
        return site

    @cached_property
    def _entry(self) -> tuple[Tensor, tuple[LayerCall, ...]]:
        """What enters the layers, on the meta device. Weights before them are zeros that take no memory."""

        skeleton = self._model.skeleton

        def zeros(name: str) -> Tensor:
            owner, _, leaf = name.rpartition(".")
            value = getattr(skeleton.get_submodule(owner), leaf)
            return torch.zeros((), dtype=value.dtype).expand(value.shape)

        with torch.no_grad(), outer_weights(skeleton, self._model.layers_name, zeros):
            hidden, calls = record(skeleton, self._model.layers, torch.zeros(1, _TOKENS, dtype=torch.int64))
        return hidden.to("meta"), calls


class _Trace(TorchDispatchMode):
    """Remembers what is computed with outside the watched modules (views are no computation), and what becomes of one
    tensor as long as it is only added to others and scaled by numbers."""

    def __init__(self) -> None:
        super().__init__()
        self._depth = 0
        self._kept: list[Tensor] = []  # alive, so that no storage is used again
        self._gains: list[tuple[Tensor, float]] = []
        self._lost = False

    def inside(self, change: int) -> None:
        self._depth += change

    def start(self, value: Tensor) -> Tensor:
        """Follow this tensor."""
        self._gains.append((value, 1.0))
        return value

    def used(self, value: Tensor) -> bool:
        """Whether something outside the watched modules is computed with this tensor."""
        return any(_same_storage(value, other) for other in self._kept)

    def gain(self, value: Tensor) -> float | None:
        """g where `value` holds g times the followed tensor plus other things; None where it holds something else."""
        found = [gain for other, gain in self._gains if _same_storage(value, other)]
        return found[-1] if found and not self._lost else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if self._depth == 0 and not func.is_view:
            self._kept += tensors
        before = [self.gain(value) for value in tensors]
        out = func(*args, **(kwargs or {}))
        if any(gain is not None for gain in before) and not func.is_view:
            after = _gain_after(func, before, args, kwargs or {})
            self._lost |= after is None
            if after is not None:
                self._gains.append((out, after))
        return out


def _gain_after(func: Any, before: list[float | None], args: Any, kwargs: Any) -> float | None:
    """Of a sum with something else, of a product with a number, of a copy; None for every other operation."""
    name, aten = func.overloadpacket, torch.ops.aten
    if name in (aten.add, aten.add_) and len(before) == 2 and None in before:
        return before[0] if before[1] is None else before[1] * kwargs.get("alpha", 1)
    if name in (aten.mul, aten.mul_, aten.div, aten.div_) and len(before) == 1 and before[0] is not None:
        factor = next(float(value) for value in args if not isinstance(value, Tensor))
        return before[0] * factor if name in (aten.mul, aten.mul_) else before[0] / factor
    if name in (aten.clone, aten._to_copy) and before[0] is not None:
        return before[0]
    return None


def _same_storage(one: Tensor, other: Tensor) -> bool:
    return one.numel() == other.numel() and one.untyped_storage()._cdata == other.untyped_storage()._cdata


def _on_meta(call: LayerCall) -> LayerCall:
    def moved(value: Any) -> Any:
        return value.to("meta") if isinstance(value, Tensor) else value

    return LayerCall(tree_map(moved, call.args), tree_map(moved, call.kwargs))


def _with_real_norms(layer: nn.Module, names: Any) -> nn.Module:
    """The layer with random vectors in the norms of these names, so that they can be tried out."""
    generator = torch.Generator().manual_seed(0)
    for name in names:
        norm = layer.get_submodule(name)
        norm.to_empty(device="cpu")
        for value in (*norm.parameters(), *norm.buffers()):
            value.data = torch.rand(value.shape, generator=generator) + 0.5
    return layer
