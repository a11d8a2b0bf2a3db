"""What leaves out some of the experts that a router chose for a token: the vocabulary of gates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

GateKind = Literal["count", "ratio", "mask_router"]


@dataclass(frozen=True)
class Relaxation:
    """How a mask router chooses while it is trained: softmax((log p + Gumbel noise) / temperature).

    straight_through: the choice itself forward, its relaxation backward. seed: of the noise, None = no noise.
    """

    temperature: float
    straight_through: bool = False
    seed: int | None = None


@dataclass(frozen=True)
class Gate:
    """Which of the K experts that the router chose for a token are used: the first n by weight, n from 1 to K.

    count: n is the same for every token. ratio: slots leave from the weakest up while together they weigh less than
    `threshold` times those that stay. mask_router: n is the largest entry of a small network's output; see
    `numerics.gating`.
    renormalise: what stays is scaled to the sum of all K weights. protect: share of a sequence's tokens, those that
    receive most attention, that keep all K. relaxation: while a mask router is trained.
    """

    kind: GateKind
    renormalise: bool
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    count: int = 0
    threshold: float = 0.0
    protect: float = 0.0
    relaxation: Relaxation | None = None
