"""Which (token, expert) pairs of a call are computed (gates, experts of which nothing is stored), and who watches."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from moecompress.checkpoint.native_gate import GateLayout
from moecompress.errors import UnsupportedModel, message
from moecompress.gate import Gate
from moecompress.numerics.activation import rounded_as
from moecompress.numerics.gating import gated, most_important
from moecompress.numerics.turn import turned
from moecompress.types import ExpertWeights, Projection, QuantizedTensor, Scheme


class ExpertObserver(Protocol):
    """What may watch the experts of one layer run. Tensors are inputs aligned with their gates, in the run's dtype."""

    def on_routing(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        """hidden [T, H], ids int64 [T, K], weights [T, K] of one call."""

    def on_expert(
        self, expert: int, rows: Tensor, weights: Tensor, inputs: Tensor, intermediate: Tensor, outputs: Tensor
    ) -> None:
        """rows int64 [n], weights [n], inputs [n, H], intermediate [n, I], unweighted outputs [n, H].

        inputs, intermediate: as gate_up and down receive them (`received`)."""


def received(weights: ExpertWeights, projection: Projection, inputs: Tensor, scheme: Scheme | None = None) -> Tensor:
    """What one matrix of an expert multiplies: its inputs [n, c] in its basis, then rounded as its scheme says.

    scheme: for a matrix without codes, how it will be stored; None = as it is, with full inputs.
    """
    weight, turn = weights.projection(projection), weights.turn(projection)
    inputs = inputs if turn is None else turned(inputs, turn)
    scheme = weight.scheme if isinstance(weight, QuantizedTensor) else scheme
    return inputs if scheme is None else rounded_as(scheme, inputs)


def share_slots(ids: Tensor, weights: Tensor, skip: int) -> tuple[Tensor, Tensor]:
    """Each expert once per token, with the sum of its weights: later slots of the same expert become `skip`, weight 0.

    ids: int64 [T, K], weights: [T, K].
    """
    same = ids[:, :, None] == ids[:, None, :]
    again = same.tril(-1).any(-1)
    total = (same * weights[:, None, :]).sum(-1)
    return ids.masked_fill(again, skip), total.masked_fill(again, 0)


class Dispatch(nn.Module):
    """The part of an experts module that takes pairs out of the dispatch by giving them the id E."""

    gate_layout: GateLayout | None = None  # of a packed module, whose gate is made once its tensor is loaded
    mask_router: nn.Parameter

    def __init__(self) -> None:
        super().__init__()
        self.observer: ExpertObserver | None = None
        self.sharing: Tensor | None = None  # int64 [ids + 1], where ids share experts: id -> place; the last: skip
        self.gate: Gate | None = None
        self.attention: Tensor | None = None  # [B, T], received by the tokens of this call; for gates that protect
        self.kept: Tensor | None = None  # [T, K] of the last call with a gate: 1 where a slot stayed
        self.sent: list[Tensor] | None = None  # where it is a list, it gets the ids [T, K] of every call, on the CPU

    @abstractmethod
    def __len__(self) -> int:
        """How many experts there are; the id that skips."""

    @abstractmethod
    def absent(self) -> Sequence[int]:
        """Experts of which nothing is stored: no token is sent to them."""

    def dispatch(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """(ids, weights) [T, K] of the pairs that are computed: the others have the id E."""
        if self.gate is None and self.gate_layout is not None:
            self.gate = self.gate_layout.gate(hidden.shape[-1], lambda: self.mask_router)
        if self.gate is not None:
            protected = self._protected(hidden) if self.gate.protect else None
            skip = len(self) if self.sharing is None else len(self.sharing) - 1
            ids, weights, self.kept = gated(hidden, ids, weights, self.gate, skip, protected)
        if self.sharing is not None:
            ids, weights = share_slots(self.sharing[ids], weights, len(self))
        for expert in self.absent():
            ids = ids.masked_fill(ids == expert, len(self))
        if self.sent is not None:
            self.sent.append(ids.to("cpu", torch.int16))
        return ids, weights

    def _protected(self, hidden: Tensor) -> Tensor:
        assert self.gate is not None
        if self.attention is None or self.attention.numel() != hidden.shape[0]:
            found = "attention probabilities are not known, and the gate protects tokens by them"
            then = "load with attn_implementation='eager'"
            raise UnsupportedModel(message(type(self).__name__, found, then=then))
        by_sequence = hidden.reshape(*self.attention.shape, -1)
        return most_important(by_sequence, self.attention, self.gate.protect).reshape(-1)
