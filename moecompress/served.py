"""A checkpoint as it is served: the whole model in memory, packed, in its own dtype, on the best kernels there are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moecompress.errors import RecipeError, message
from moecompress.experts import PackedExperts
from moecompress.packed import backend_name
from moecompress.stream.model import StreamModel
from moecompress.tasks import open_in_memory


class Served:
    """Gives what the streamed evaluation gives: logits of every sequence, and the experts that its tokens were sent to.

    Raises RecipeError for a checkpoint in another format (nothing of it is packed), MachineError when it does not fit
    into memory.
    """

    def __init__(self, model: StreamModel, device: str, activation_bits: int | None) -> None:
        """model: the same checkpoint, opened for streaming, which knows its layers."""
        if model.native is None:
            found = "kernels run packed weights"
            raise RecipeError(message(str(model.root), found, "the native format", "evaluate it streamed"))
        self._loaded: Any = open_in_memory(Path(model.root), device, activation_bits)[0].eval()
        modules = dict(self._loaded.named_modules())
        self._experts: dict[int, PackedExperts | None] = {}  # of every MoE layer
        for layer in model.facts.layers:
            if layer.site is not None:
                module = modules.get(f"{layer.name}.{layer.site.experts}")
                self._experts[layer.index] = module if isinstance(module, PackedExperts) else None
        for experts in self._experts.values():
            if experts is not None:
                experts.sent = []

    @property
    def backend(self) -> str:
        """Who computes, for eval.json."""
        return backend_name(self._loaded)

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(ids int64 [1, T], logits float32 [1, T, V]) of every sequence of ids [N, T]."""
        for row in ids.split(1):
            out = self._loaded(input_ids=row.to(self._loaded.device), use_cache=False)
            yield row, out.logits.float().cpu()

    def chosen(self) -> dict[int, Tensor | None]:
        """Of every MoE layer, the experts int64 [tokens, K] of all that ran, -1: skipped; None: it is not packed."""
        found: dict[int, Tensor | None] = dict.fromkeys(self._experts)
        for index, experts in self._experts.items():
            if experts is not None:
                ids = torch.cat(experts.sent or []).long()
                found[index] = ids.masked_fill(ids == len(experts), -1)
        return found
