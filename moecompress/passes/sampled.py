"""What passes share that try candidates on a token sample: the tokens of one expert, and what its `down` receives."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from moecompress.passes.base import LayerContext
from moecompress.passes.smoothing import dense
from moecompress.types import ExpertWeights


def routed_rows(sample: Mapping[str, Tensor], number: int) -> Tensor:
    """Sampled tokens of one expert, float32 [n, H]."""
    return sample["hidden"][(sample["ids"] == number).any(-1)].float()


def intermediate(context: LayerContext, expert: ExpertWeights, inputs: Tensor) -> Tensor:
    """What `down` of an expert that turns nothing receives for inputs [n, H]: float32 [n, I]."""
    projected = inputs @ dense(expert.gate_up).t()
    if expert.gate_up_bias is not None:
        projected = projected + expert.gate_up_bias.float()
    return context.activate(projected)
