"""Attention probabilities on their way to gates that protect tokens. Only eager attention has them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moecompress.experts import Experts
from moecompress.numerics.gating import received_attention


def watch_attention(layer: nn.Module, experts: Experts) -> list[RemovableHandle]:
    """From now on every attention module of a decoder layer tells the layer's experts what its tokens received."""

    def hook(_module: nn.Module, _args: Any, out: Any) -> None:
        if isinstance(out, tuple) and len(out) > 1 and isinstance(out[1], Tensor) and out[1].ndim == 4:
            experts.attention = received_attention(out[1].detach())

    found = [module for module in layer.modules() if "attention" in type(module).__name__.lower()]
    return [module.register_forward_hook(hook) for module in found]


@contextmanager
def watched_attention(layer: nn.Module, experts: Experts) -> Iterator[None]:
    """The same within a context, where the experts' gate protects tokens."""
    handles = watch_attention(layer, experts) if experts.gate is not None and experts.gate.protect else []
    try:
        yield
    finally:
        experts.attention = None
        for handle in handles:
            handle.remove()
