"""Exact transforms proved in float64 on transformers' own models: weights in, everything computed in float64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import engine
import torch
from torch import Tensor, nn

from moecompress.types import ExpertWeights, LayerWeights, MoESite


def widened(weights: LayerWeights) -> LayerWeights:
    """The layer in float64."""

    def wide(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    experts = tuple(ExpertWeights(*(wide(part) for part in vars(expert).values())) for expert in weights.experts)
    return replace(weights, tensors={name: wide(value) for name, value in weights.tensors.items()}, experts=experts)


def load_into(layer: nn.Module, site: MoESite | None, weights: LayerWeights) -> None:
    """Put canonical weights into transformers' own layer, in its own layout."""
    names = dict(layer.named_parameters()) | dict(layer.named_buffers())
    with torch.no_grad():
        for name, value in weights.tensors.items():
            assert isinstance(value, Tensor)
            names[name].copy_(value)
        if site is None:
            return
        module: Any = layer.get_submodule(site.experts)
        for number, expert in enumerate(weights.experts):
            for name, value in ((site.gate_up_name, expert.gate_up), ("down_proj", expert.down)):
                assert isinstance(value, Tensor)
                getattr(module, name)[number].copy_(value.t() if site.transposed else value)
                bias = expert.gate_up_bias if name == site.gate_up_name else expert.down_bias
                if bias is not None:
                    getattr(module, f"{name}_bias")[number].copy_(bias)


def double_model(path: Path) -> Any:
    """The checkpoint in float64, as transformers runs it."""
    model = engine.own_model(path).double()
    for part in model.modules():
        if hasattr(part, "config"):
            part.config._experts_implementation = "eager"  # the default has no float64
    return model


@contextmanager
def everything_in_float64() -> Iterator[None]:
    """Within the context what families insist on doing in float32 (routers, norms) is done in float64."""
    narrow, method = torch.float32, Tensor.float
    try:
        torch.float32 = torch.float64
        Tensor.float = Tensor.double  # type: ignore[method-assign]
        yield
    finally:
        torch.float32 = narrow
        Tensor.float = method  # type: ignore[method-assign]


def double_logits(model: Any, ids: Tensor) -> Tensor:
    """Logits of a float64 model, float64 throughout."""
    with torch.no_grad(), everything_in_float64():
        return model(input_ids=ids, use_cache=False).logits


def load_outer(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors outside the layers into the model; tied ones come apart."""
    for name, value in tensors.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        module._parameters[leaf] = nn.Parameter(value.to(torch.float64), requires_grad=False)
