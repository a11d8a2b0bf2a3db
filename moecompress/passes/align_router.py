"""align.router: change the router so that the compressed model sends tokens where the original model sent them."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor

from moecompress.arch.sites import router_matrix
from moecompress.errors import CalibrationError, message
from moecompress.numerics.routing import ridge
from moecompress.passes.base import Decision, LayerContext, Pass
from moecompress.stats.routers import RouterMoments
from moecompress.stream.router import RouterScore, RouterView
from moecompress.types import LayerFacts, LayerWeights, ModelFacts

_SUMS = 2**28  # bytes of per-expert sums held at once; more experts mean more runs up to the router

#: options that only some methods have
_OPTIONS = {"strength": ("ridge", "topk_mse"), "top": ("topk_mse",)}


class AlignRouter(Pass):
    """Router recovery, one layer at a time, on the inputs that the router gets in the compressed model.

    `ridge`: least squares to the original router's outputs, drawn to the present router, in closed form. `topk_mse`:
    the same over each token's leading experts alone (EAC-MoE, 2508.01625), solved exactly instead of by descent.
    Outputs are matched before any scoring, so softmax, sigmoid and softplus routers, groups, normalisation and
    correction biases stay what they are. A layer keeps its router unless the new one, as it will be stored, has the
    smaller KL to the original one on tokens that were not learned from.

    Its place is before the quantizer of the experts (and after one of attention): then it makes up for what the layers
    before have lost, and the quantizer's statistics follow the new routing.
    """

    name: ClassVar[str] = "align.router"
    paper: ClassVar[str] = "2508.01625"
    changes: ClassVar[frozenset[str]] = frozenset({"router"})

    method: Literal["ridge", "topk_mse"] = Field("ridge", description="how the new router is found")
    strength: float = Field(
        1e-2, ge=0, description="pull to the present router, as a share of the mean squared input (ridge, topk_mse)"
    )
    top: float = Field(2.0, ge=1, description="experts per token that count, in multiples of the chosen (topk_mse)")
    min_gain: float = Field(0.0, ge=0, lt=1, description="share of the KL that a new router must take away to be kept")
    calibration: str = Field("default", description="the calibration set to use")

    @model_validator(mode="after")
    def _options_fit(self) -> AlignRouter:
        for option in sorted(self.model_fields_set & _OPTIONS.keys()):
            if self.method not in _OPTIONS[option]:
                raise ValueError(f"{option}: method {self.method} has no such option; it is for {_OPTIONS[option]}")
        return self

    @property
    def needs_data(self) -> bool:
        return True

    def check(self, facts: ModelFacts) -> list[str]:
        without = [layer.index for layer in facts.moe_layers if router_matrix(layer) is None]
        return [f"layers {without} have no single matrix between hidden state and experts"] if without else []

    def statistics_bytes(self, layer: LayerFacts) -> int:
        found = router_matrix(layer)
        if found is None:
            return 0
        rows, inputs = layer.shapes[found[0]]
        square = (inputs + 1) ** 2
        sums = min(rows * 4 * square, max(_SUMS, 4 * square)) if self.method == "topk_mse" else 4 * square
        return sums + 3 * 8 * square + 5 * 8 * rows * (inputs + 1)

    def decide(self, context: LayerContext) -> Decision:
        """Tensors: the new router under the layer's own names; none where it keeps what it has."""
        if context.layer.site is None:
            return Decision({})
        view = context.router()
        before = view.score({})
        made, said = self._solved(context, view)
        tensors = view.tensors(made)
        after = view.score(tensors)
        accepted = after.kl < before.kl * (1 - self.min_gain)
        change = float((made - view.matrix).norm() / view.matrix.norm())
        note = {**said, **self._note(view, before, after), "accepted": accepted, "change": change}
        return Decision({"router": note}, tensors if accepted else {})

    def apply(self, context: LayerContext, decision: Decision) -> LayerWeights:
        return context.weights.with_tensors(decision.tensors) if decision.tensors else context.weights

    def _note(self, view: RouterView, before: RouterScore, after: RouterScore) -> dict[str, Any]:
        return {
            "method": self.method,
            "judged_on": "held-out sequences" if view.heldout else "every 8th calibration sequence",
            "kl": [before.kl, after.kl],
            "agreement": [before.agreement, after.agreement],
        }

    def _solved(self, context: LayerContext, view: RouterView) -> tuple[Tensor, dict[str, Any]]:
        """The least-squares router, float64 [R, C], and the fewest tokens that a row was made from."""
        site = context.layer.site
        assert site is not None
        top = math.ceil(self.top * site.top_k) if self.method == "topk_mse" else None
        square = 4 * view.columns**2
        size = view.outputs if top is None else max(1, _SUMS // square)
        made, fewest = view.matrix.double(), None
        for first in range(0, view.outputs, size):
            span = (first, min(first + size, view.outputs))
            sums = view.collect(RouterMoments(view.columns, span, top))
            fewest = min(int(sums["tokens"].min()), fewest if fewest is not None else int(sums["tokens"].min()))
            made[slice(*span)] = self._rows(context, made[slice(*span)], sums)
        return made, {"fewest_tokens": fewest}

    def _rows(self, context: LayerContext, rows: Tensor, sums: dict[str, Tensor]) -> Tensor:
        gram, residual, made = sums["gram"], sums["residual"], rows.clone()
        try:
            if gram.dim() == 2:
                return ridge(rows, gram, residual, self.strength)
            for row in range(len(rows)):
                made[row] = ridge(rows[row : row + 1], gram[row], residual[row : row + 1], self.strength)[0]
        except ValueError as error:
            where = f"align.router, layer {context.layer.index}"
            raise CalibrationError(message(where, str(error), then="use more tokens or a larger strength")) from None
        return made
