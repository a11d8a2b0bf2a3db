"""The residual stream around the routed experts of a layer: what the norm before them reads, and what they add."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from moecompress.errors import UnsupportedModel, message
from moecompress.types import MoESite

BlockTap = Callable[[Tensor, Tensor], None]  # residual [T, H], output of the routed experts [T, H]


@contextmanager
def residual_flow(layer: nn.Module, site: MoESite, tap: BlockTap) -> Iterator[None]:
    """Within the context every call of the layer's experts is told to `tap` with the residual stream it belongs to.

    The norm is found by its output being what the experts read, so a new family needs no entry. Raises UnsupportedModel
    (inside the layer's forward) where the experts read something else, such as a latent projection.
    """
    made: list[tuple[Tensor, Tensor]] = []  # (input, output) of the norms of this call

    def normed(_module: nn.Module, args: Any, out: Any) -> None:
        if isinstance(out, Tensor) and args and isinstance(args[0], Tensor):
            made.append((args[0], out))

    def routed(_module: nn.Module, args: Any, out: Tensor) -> None:
        before = next((x for x, y in reversed(made) if _is_view(y, args[0])), None)
        made.clear()
        if before is None or before.numel() != out.numel():
            found = "the routed experts read no norm of the residual stream"
            raise UnsupportedModel(message(type(layer).__name__, found, then="use another score, such as prune.reap"))
        tap(before.reshape(out.shape), out)

    norms = [module for module in layer.modules() if _is_norm(module, site)]
    handles = [module.register_forward_hook(normed) for module in norms]
    handles.append(layer.get_submodule(site.experts).register_forward_hook(routed))
    try:
        yield
    finally:
        made.clear()
        for handle in handles:
            handle.remove()


def _is_norm(module: nn.Module, site: MoESite) -> bool:
    weight = module._parameters.get("weight")
    return "norm" in type(module).__name__.lower() or (weight is not None and weight.shape == (site.hidden,))


def _is_view(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.numel() == other.numel()
