"""What the module tree alone says about moving scales in and out of experts: for plans, which read no weights.

A layer runs once on the meta device, where tensors have shapes and no values; that two modules are given the same
tensor shows in the storage they share.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from moecompress.errors import UnsupportedModel
from moecompress.stream.fold import fold_of, linear_in_up, refused, watched_norms
from moecompress.stream.layers import call_layer, experts_of
from moecompress.stream.model import StreamModel
from moecompress.stream.outer import outer_weights
from moecompress.stream.prelude import LayerCall, record
from moecompress.types import MoESite

_TOKENS = 8


def with_structure(model: StreamModel) -> StreamModel:
    """The model with facts that can tell whether its scales can be folded: `fold_problem` and `linear_up`."""
    structure = _Structure(model)
    problem = lru_cache(maxsize=None)(structure.fold_problem)
    return replace(model, facts=replace(model.facts, fold_problem=problem, linear_up=structure.linear_up))


class _Structure:
    """A model without weights, asked whether scales can be folded."""

    def __init__(self, model: StreamModel) -> None:
        self._model = model

    def fold_problem(self, index: int) -> str | None:
        """Why no scale can leave the norm before the experts of layer `index`; None where it can, or where the trace
        needs values (then `find_norm_fold`, which has them, decides)."""
        site = self._site(index)
        hidden, call = self._entry[0], _on_meta(self._entry[1][index])
        layer = deepcopy(self._model.layers[index]).to("meta")
        setattr(experts_of(layer, site.experts), "forward", lambda states, *_: torch.zeros_like(states))  # noqa: B010
        where = f"layer {index}"
        try:
            with torch.no_grad(), _Uses() as uses, watched_norms(layer, site, uses.inside) as (made, read):
                call_layer(layer, hidden, call)
        except (RuntimeError, UnsupportedModel):  # values decide what is computed (NotImplementedError among them)
            return None
        try:
            fold = fold_of(_with_real_norms(layer, made), site, made, read, where, _same_storage)
            if uses.has(made[fold.norm.removesuffix(".weight")]):
                raise refused(where, f"the layer itself computes with the output of {fold.norm}")
        except UnsupportedModel as error:
            return str(error)
        return None

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


class _Uses(TorchDispatchMode):
    """Remembers every tensor that is computed with outside the watched modules; views are no computation."""

    def __init__(self) -> None:
        super().__init__()
        self._depth = 0
        self._kept: list[Tensor] = []  # alive, so that no storage is used again

    def inside(self, change: int) -> None:
        self._depth += change

    def has(self, value: Tensor) -> bool:
        return any(_same_storage(value, other) for other in self._kept)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._depth == 0 and not func.is_view:
            self._kept += [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        return func(*args, **(kwargs or {}))


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
