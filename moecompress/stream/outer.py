"""Weights outside the decoder layers (embedding, final norm, head): read when their module is called, then dropped.

Modules that are never called (a vision tower) are never read. The two vocabulary matrices stay in their stored dtype:
the embedding converts the rows it looks up, the head converts a block of rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_ROWS = 8192  # rows of the output matrix converted to float32 at a time

Read = Callable[[str], Tensor]


@contextmanager
def outer_weights(model: nn.Module, layers_name: str, read: Read) -> Iterator[None]:
    """Within the context, modules outside the layers hold their weights while they run; vocabulary matrices stay."""
    vocabulary: dict[str, Tensor] = {}
    restore: list[Callable[[], None]] = []
    try:
        for name, module in model.named_modules():
            own = [*module._parameters, *(k for k in module._buffers if k not in module._non_persistent_buffers_set)]
            own = [key for key in own if _is_meta(module, key)]
            if not own or name == layers_name or name.startswith(layers_name + "."):
                continue
            full = {key: f"{name}.{key}" if name else key for key in own}
            if isinstance(module, nn.Embedding):
                restore.append(_lazy_embedding(module, full["weight"], read, vocabulary))
            elif isinstance(module, nn.Linear) and module.out_features > _ROWS:
                restore.append(_chunked_linear(module, full, read, vocabulary))
            else:
                restore.append(_lazy_module(module, full, read))
        yield
    finally:
        for undo in restore:
            undo()


def _is_meta(module: nn.Module, key: str) -> bool:
    value = module._parameters.get(key, module._buffers.get(key))
    return value is not None and value.is_meta


def _hold(module: nn.Module, key: str, value: Tensor) -> None:
    if key in module._parameters:
        module._parameters[key] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[key] = value


def _as_float32(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def _lazy_module(module: nn.Module, names: dict[str, str], read: Read) -> Callable[[], None]:
    empty = {key: module._parameters.get(key, module._buffers.get(key)) for key in names}

    def load(*_: Any) -> None:
        for key, name in names.items():
            _hold(module, key, _as_float32(read(name)))

    def drop(*_: Any) -> None:
        for key, value in empty.items():
            held: Any = module._parameters if key in module._parameters else module._buffers
            held[key] = value

    handles = [module.register_forward_pre_hook(load), module.register_forward_hook(drop, always_call=True)]

    def undo() -> None:
        for handle in handles:
            handle.remove()
        drop()

    return undo


def _lazy_embedding(module: nn.Embedding, name: str, read: Read, held: dict[str, Tensor]) -> Callable[[], None]:
    """The module's own forward on a float32 table of only the rows it needs, with renumbered ids."""
    empty, padding = module._parameters["weight"], module.padding_idx

    def forward(ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if name not in held:
            held[name] = read(name)
        rows, local = torch.unique(ids, return_inverse=True)
        try:
            _hold(module, "weight", held[name][rows].float())
            module.padding_idx = None  # only matters for gradients, and its row was renumbered
            return type(module).forward(module, local, *args, **kwargs)
        finally:
            module._parameters["weight"], module.padding_idx = empty, padding

    setattr(module, "forward", forward)  # noqa: B010 - an instance attribute, undone below
    return lambda: module.__dict__.pop("forward", None)


def _chunked_linear(
    module: nn.Linear, names: dict[str, str], read: Read, held: dict[str, Tensor]
) -> Callable[[], None]:
    def forward(inputs: Tensor) -> Tensor:
        for name in names.values():
            if name not in held:
                held[name] = read(name)
        weight = held[names["weight"]]
        bias = held[names["bias"]].float() if "bias" in names else None
        blocks = [
            F.linear(inputs.float(), weight[at : at + _ROWS].float(), None if bias is None else bias[at : at + _ROWS])
            for at in range(0, weight.shape[0], _ROWS)
        ]
        return torch.cat(blocks, dim=-1)

    setattr(module, "forward", forward)  # noqa: B010 - an instance attribute, undone below
    return lambda: module.__dict__.pop("forward", None)
