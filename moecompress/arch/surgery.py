"""Change the number of routed experts of one layer's empty modules (a pruned or merged layer)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from moecompress.arch.quirks import router_names


def resize_experts(block: nn.Module, experts: nn.Module, model_type: str, before: int, after: int) -> None:
    """Make `block` (the parent of `experts`) expect `after` routed experts instead of `before`.

    Router tensors lose or gain rows in their first dimension of size `before` ([E, H], [E], [1, E]), correction
    biases that live on the block too; integer attributes such as `num_experts` follow. Tensors are new and empty, on
    the device of the old ones.
    """
    routers = [child for name in router_names(model_type) if isinstance(child := getattr(block, name, None), nn.Module)]
    for module in [part for router in routers for part in router.modules()]:
        for name in list(module._parameters) + list(module._buffers):
            _resize(module, name, before, after)
    for name in list(block._parameters) + list(block._buffers):
        if "bias" in name:
            _resize(block, name, before, after)
    for module in (block, experts, *(part for router in routers for part in router.modules())):
        for name in _counts(module, before):
            setattr(module, name, after)
        if isinstance(module, nn.Linear) and module.out_features == before:
            module.out_features = after


def _resize(module: nn.Module, name: str, before: int, after: int) -> None:
    value = module._parameters.get(name, module._buffers.get(name))
    if value is None or before not in value.shape:
        return
    shape = list(value.shape)
    shape[shape.index(before)] = after
    made = torch.empty(shape, dtype=value.dtype, device=value.device)
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(made, requires_grad=value.requires_grad)
    else:
        module._buffers[name] = made


def _counts(module: nn.Module, before: int) -> Iterator[str]:
    """Attributes that hold the number of routed experts: num_experts, n_routed_experts, num_local_experts, ..."""
    for name, value in list(vars(module).items()):
        if type(value) is int and value == before and name.endswith("experts") and "shared" not in name:
            yield name
