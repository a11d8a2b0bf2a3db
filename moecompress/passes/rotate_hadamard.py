"""rotate.hadamard: the residual stream in a basis where no channel sticks out, folded into the weights around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from moecompress.errors import RecipeError, message
from moecompress.numerics.hadamard import default_block, is_known, random_signs, rotated
from moecompress.numerics.turn import turned
from moecompress.passes.base import Decision, LayerContext, Pass
from moecompress.passes.smoothing import dense
from moecompress.stream.model import StreamModel
from moecompress.stream.rebase import rotated_outer
from moecompress.stream.residual import Residual, ResidualNorm, rotated_layer
from moecompress.types import LayerFacts, LayerWeights, ModelFacts, Turn


class RotateHadamard(Pass):
    """QuaRot's offline rotation (2404.00456): x -> x Q, Q = diag(+-1) H / sqrt(H), on the whole residual stream.

    Norms are folded into what reads them; embedding, head, routers, attention, dense, routed and shared experts absorb
    Q, so nothing is added at run time and the function stays (proved on every layer, or refused). A head that shares
    the embedding's weights gets weights of its own: the final norm moves into it. H is a Hadamard matrix of order
    2^p m (Paley), or of equal blocks. `down_block` adds a rotation of what the experts' down receives, in blocks and
    while the model runs (native format). Must be the first pass: everything after it works in the new basis.
    """

    name: ClassVar[str] = "rotate.hadamard"
    paper: ClassVar[str] = "2404.00456"
    changes: ClassVar[frozenset[str]] = frozenset(
        {"attention", "dense_mlp", "experts", "norms", "router", "shared_experts"}
    )
    moves_residual: ClassVar[bool] = True

    block: int | None = Field(
        None, ge=2, description="channels rotated with each other; left out: all, or the largest power of two that fits"
    )
    down_block: int | None = Field(
        None, ge=2, description="also rotate what the experts' down receives, in blocks of this size, as it runs"
    )
    seed: int = Field(0, ge=0, description="of the random signs")

    @property
    def turns_inputs(self) -> bool:
        return self.down_block is not None

    def statistics_bytes(self, layer: LayerFacts) -> int:
        """The rotated layer in float32, held beside the source's."""
        own = sum(torch.Size(shape).numel() for shape in layer.shapes.values())
        site = layer.site
        routed = 0 if site is None else site.num_experts * site.hidden * (site.gate_up_rows + site.width)
        return 4 * (own + routed)

    def check(self, facts: ModelFacts) -> list[str]:
        problems = []
        sizes = {"block": (self.block, facts.hidden_size)}
        if facts.moe_layers and facts.moe_layers[0].site is not None:
            sizes["down_block"] = (self.down_block, facts.moe_layers[0].site.width)
        for key, (block, size) in sizes.items():
            if block is not None and (size % block or not is_known(block)):
                works = [b for b in range(2, size + 1) if size % b == 0 and is_known(b)]
                problems.append(f"{key} {block} does not rotate {size} channels (works: {', '.join(map(str, works))})")
        reasons = (facts.rotation_problem(layer.index) for layer in facts.layers)
        return problems + next(([reason] for reason in reasons if reason is not None), [])

    def outer(self, model: StreamModel) -> Mapping[str, Callable[[], Tensor]]:
        return rotated_outer(model, self._rotate(model.facts))

    def decide(self, context: LayerContext) -> Decision:
        """What reads and writes the residual stream in this layer."""
        found = context.residual(self._rotate(context.facts))
        return Decision({"norms": [asdict(n) for n in found.norms], "writers": found.writers, "routed": found.experts})

    def apply(self, context: LayerContext, decision: Decision) -> LayerWeights:
        data = decision.data
        norms = tuple(ResidualNorm(**{**norm, "readers": tuple(norm["readers"])}) for norm in data["norms"])
        found = Residual(norms, tuple(data["writers"]), data["routed"])
        weights = rotated_layer(context.weights, found, self._rotate(context.facts))
        return weights if self.down_block is None else self._with_turns(weights, self.down_block)

    def _rotate(self, facts: ModelFacts) -> Callable[[Tensor], Tensor]:
        size = facts.hidden_size
        signs = random_signs(size, torch.Generator().manual_seed(self.seed))
        block = self.block or default_block(size)
        return lambda x: rotated(x, block, signs)

    def _with_turns(self, weights: LayerWeights, block: int) -> LayerWeights:
        turn = Turn(rotated(torch.eye(block, dtype=torch.float64), block).float())
        made = []
        for number, expert in enumerate(weights.experts):
            if expert.down_turn is not None:
                where = f"layer {weights.index} expert {number} down"
                raise RecipeError(message(where, "is turned already", then="rotate once"))
            made.append(expert.with_projection("down", turned(dense(expert.down), turn)).with_turn("down", turn))
        return weights.with_experts(tuple(made))
