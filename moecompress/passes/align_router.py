"""align.router: change the router so that the compressed model sends tokens where the original model sent them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from moecompress.arch.sites import router_matrix
from moecompress.errors import CalibrationError, UnsupportedModel, message
from moecompress.numerics.activation import rounded_as
from moecompress.numerics.grids import dequantize
from moecompress.numerics.router_clip import best_clip, kept_share
from moecompress.numerics.routing import ridge
from moecompress.passes.base import Decision, LayerContext, Pass, Scope
from moecompress.stats.routers import RouterMoments, RouterSample
from moecompress.stream.router import RouterScore, RouterView, judges_of, router_scores
from moecompress.stream.train import TrainContext
from moecompress.stream.tune import batches_without_end, distillation, next_token_loss, replaced, tune
from moecompress.types import LayerFacts, LayerWeights, ModelFacts, QuantizedTensor, Scheme, TokenBatch, Weight

_SUMS = 2**28  # bytes of per-expert sums held at once; more experts mean more runs up to the router
_CODES = Scheme(8, -1, False, "int")  # EAQuant's router: one asymmetric range per row
_W8A8 = replace(_CODES, activation="int8")
_END_TO_END = ("lm_ce", "kl_logits")

#: options that only some methods have
_OPTIONS = {
    "strength": ("ridge", "topk_mse"),
    "top": ("topk_mse",),
    "router_bits": ("kl_clip",),
    "activation_bits": ("kl_clip",),
    "alpha": ("kl_clip",),
    "tokens": ("kl_clip",),
    **dict.fromkeys(("steps", "lr", "batch", "seed"), _END_TO_END),
    "teacher_tokens": ("kl_logits",),
}


class AlignRouter(Pass):
    """Router recovery on the inputs that routers get in the compressed model.

    One layer at a time: `ridge` is least squares to the original router's outputs, drawn to the present router, in
    closed form. `topk_mse` the same over each token's leading experts alone (EAC-MoE, 2508.01625), solved exactly
    instead of by descent. `kl_clip` stores the router in 8-bit codes with EAQuant's clipping (2506.13329), by wish with
    its inputs rounded as well while the model runs (EAQuant's W8A8), and searched with rounded inputs. Outputs are
    matched before any scoring, so softmax, sigmoid and softplus routers, groups, normalisation and correction biases
    stay what they are. Where experts are gone, those of the others are matched: the original's choice without them.
    Where experts were merged by a softmax router, the logsumexp of theirs: the probability of all of them. A layer
    keeps its router (kl_clip: clips nothing) unless the new one, as it will be stored, has the smaller KL to the
    original one on tokens that were not learned from.

    Through the whole model, after a sweep of its own: `lm_ce` trains all routers on the calibration text (GEMQ,
    2605.23078), `kl_logits` on the original model's predictions (router distillation, 2603.02217). Kept is the best of
    five checks on tokens that were not learned from, or nothing.

    The place of the first three is before the quantizer of the experts (and after one of attention): then they make up
    for what the layers before have lost, and the quantizer's statistics follow the new routing. The last two come last.
    """

    name: ClassVar[str] = "align.router"
    paper: ClassVar[str] = "2508.01625"
    changes: ClassVar[frozenset[str]] = frozenset({"router"})
    takes_turned: ClassVar[bool] = True

    method: Literal["ridge", "topk_mse", "kl_clip", "lm_ce", "kl_logits"] = Field(
        "ridge", description="how the new router is found"
    )
    strength: float = Field(
        1e-2, ge=0, description="pull to the present router, as a share of the mean squared input (ridge, topk_mse)"
    )
    top: float = Field(2.0, ge=1, description="experts per token that count, in multiples of the chosen (topk_mse)")
    router_bits: Literal[8] | None = Field(None, description="8: store the router in 8-bit codes (kl_clip alone)")
    activation_bits: Literal[8] | None = Field(
        None, description="8: round what the router receives, too, per token while the model runs (kl_clip alone)"
    )
    alpha: float = Field(
        0.0, ge=0, le=1, description="share of the experts not chosen that the KL looks at, too (kl_clip)"
    )
    tokens: int = Field(2048, ge=1, description="sampled tokens per layer on which clippings are judged (kl_clip)")
    steps: int = Field(100, ge=1, description="updates of all routers (lm_ce, kl_logits)")
    lr: float = Field(1e-4, gt=0, description="first step of Adam; falls to 0 (lm_ce, kl_logits)")
    batch: int = Field(4, ge=1, description="sequences per update (lm_ce, kl_logits)")
    teacher_tokens: int = Field(64, ge=1, description="likeliest tokens kept of every prediction (kl_logits)")
    seed: int = Field(0, ge=0, description="of the order of the sequences (lm_ce, kl_logits)")
    min_gain: float = Field(
        0.0, ge=0, lt=1, description="share of the KL (end to end: of the loss) that must go, or nothing is changed"
    )
    calibration: str = Field("default", description="the calibration set to use")

    @model_validator(mode="after")
    def _options_fit(self) -> AlignRouter:
        for option in sorted(self.model_fields_set & _OPTIONS.keys()):
            if self.method not in _OPTIONS[option]:
                allowed = " and ".join(_OPTIONS[option])
                raise ValueError(f"{option}: method {self.method} has no such option; it belongs to {allowed}")
        if self.method == "kl_clip" and self.router_bits is None:
            raise ValueError("method kl_clip chooses the range of 8-bit codes; add router_bits: 8, or use ridge")
        return self

    @property
    def decides(self) -> Scope:
        return Scope.TRAIN if self.method in _END_TO_END else Scope.LAYER

    @property
    def needs_data(self) -> bool:
        return True

    def check(self, facts: ModelFacts) -> list[str]:
        if any(layer.site is not None and layer.site.shared_ids is not None for layer in facts.moe_layers):
            return ["ids of the router share experts (router: expert_map): its place is before the merge"]
        merged = [layer.site for layer in facts.moe_layers if layer.site is not None and layer.site.merged]
        if self.method not in _END_TO_END and merged and (facts.scoring != "softmax" or merged[0].extra_rows):
            kind = "rows of shared experts beside theirs" if facts.scoring == "softmax" else f"{facts.scoring} scoring"
            return [
                f"method {self.method}: experts are merged, and with {kind} no output stands for several of them "
                "(works: lm_ce, kl_logits; or put align.router before the merge)"
            ]
        without = [layer.index for layer in facts.moe_layers if router_matrix(layer) is None]
        problems = [f"layers {without} have no single matrix between hidden state and experts"] if without else []
        renormalised = facts.config.get("norm_topk_prob", True) is not False
        if (
            self.method in _END_TO_END
            and renormalised
            and any(layer.site is not None and layer.site.top_k == 1 for layer in facts.moe_layers)
        ):
            problems.append(
                f"method {self.method}: with one expert per token its weight is always 1, so no gradient reaches the "
                "router (works: ridge, topk_mse)"
            )
        return problems

    def schemes(self, layer: LayerFacts) -> Mapping[str, Scheme]:
        found = router_matrix(layer)
        return {found[0]: self._codes} if found is not None and self.method == "kl_clip" else {}

    @property
    def _codes(self) -> Scheme:
        return _CODES if self.activation_bits is None else _W8A8

    def statistics_bytes(self, layer: LayerFacts) -> int:
        found = router_matrix(layer)
        if found is None:
            return 0
        rows, inputs = layer.shapes[found[0]]
        square = (inputs + 1) ** 2
        if self.method == "kl_clip":
            return 3 * 8 * self.tokens * (inputs + 3 * rows)
        if self.method in _END_TO_END:
            return 4 * 4 * rows * (inputs + 1)
        sums = min(rows * 4 * square, max(_SUMS, 4 * square)) if self.method == "topk_mse" else 4 * square
        return sums + 3 * 8 * square + 5 * 8 * rows * (inputs + 1)

    def decide(self, context: Any) -> Decision:
        """Tensors: the new router under the layer's own names (end to end: `<layer>.<name>`); in codes: `<name>.codes`,
        `.scales`, `.zeros`. None where everything stays."""
        if isinstance(context, TrainContext):
            return self._tuned(context)
        assert isinstance(context, LayerContext)
        if context.layer.site is None:
            return Decision({})
        view = context.router()
        before = view.score({})
        if self.method == "kl_clip":
            return self._clipped(context, view, before)
        made, said = self._solved(context, view)
        tensors = view.tensors(made)
        after = view.score(tensors)
        accepted = after.kl < before.kl * (1 - self.min_gain)
        change = float((made - view.matrix).norm() / view.matrix.norm())
        note = {**said, **self._note(view.heldout, before, after), "accepted": accepted, "change": change}
        return Decision({"router": note}, tensors if accepted else {})

    def apply(self, context: LayerContext, decision: Decision) -> LayerWeights:
        found = router_matrix(context.layer)
        if not decision.tensors or found is None:
            return context.weights
        names = (name for name in found if name is not None)
        if self.method == "kl_clip":
            codes, scales, zeros = (decision.tensors[f"{found[0]}.{part}"] for part in ("codes", "scales", "zeros"))
            return context.weights.with_tensors({found[0]: QuantizedTensor(codes, scales, zeros, self._codes)})
        prefix = f"{context.layer.index}." if self.method in _END_TO_END else ""
        return context.weights.with_tensors({name: decision.tensors[prefix + name] for name in names})

    def _note(self, heldout: bool, before: RouterScore, after: RouterScore) -> dict[str, Any]:
        return {
            "method": self.method,
            "judged_on": "held-out sequences" if heldout else "every 8th calibration sequence",
            "kl": [before.kl, after.kl],
            "agreement": [before.agreement, after.agreement],
        }

    def _solved(self, context: LayerContext, view: RouterView) -> tuple[Tensor, dict[str, Any]]:
        """The least-squares router, float64 [R, C], and the fewest tokens that a row was made from."""
        site = context.layer.site
        assert site is not None
        top = math.ceil(self.top * site.top_k) if self.method == "topk_mse" else None
        size = view.outputs if top is None else max(1, _SUMS // (4 * view.columns**2))
        made, tokens = view.matrix.double(), []
        for first in range(0, view.outputs, size):
            span = (first, min(first + size, view.outputs))
            sums = view.collect(RouterMoments(view.columns, span, top))
            tokens += sums["tokens"].tolist()
            made[slice(*span)] = self._rows(context, made[slice(*span)], sums)
        return made, {"fewest_tokens": min(tokens)}

    def _rows(self, context: LayerContext, rows: Tensor, sums: Mapping[str, Tensor]) -> Tensor:
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

    def _clipped(self, context: LayerContext, view: RouterView, before: RouterScore) -> Decision:
        """Codes with the best clipping, or with none where that is no worse on the judging tokens."""
        site = context.layer.site
        assert site is not None
        sample = view.collect(RouterSample(self.tokens, view.columns, view.outputs))
        bare = view.columns - (view.bias is not None)
        bias = None if view.bias is None else view.matrix[:, -1]
        matrix, count = view.matrix[:, :bare], kept_share(site.num_experts, site.top_k, self.alpha)
        inputs, wanted = rounded_as(self._codes, sample["inputs"][:, :bare]), sample["wanted"]
        clipped = best_clip(matrix, bias, inputs, wanted, count, self._codes, context.scale_dtype)
        narrow, plain = (view.score({view.weight: codes}) for codes in (clipped.codes, clipped.plain))
        accepted = narrow.kl < plain.kl * (1 - self.min_gain)
        codes, after = (clipped.codes, narrow) if accepted else (clipped.plain, plain)
        change = float((dequantize(codes) - matrix).norm() / matrix.norm())
        note = {**self._note(view.heldout, before, after), "accepted": accepted, "change": change}
        assert codes.zeros is not None
        tensors = {"codes": codes.codes, "scales": codes.scales, "zeros": codes.zeros}
        return Decision({"router": note}, {f"{view.weight}.{part}": value for part, value in tensors.items()})

    def _tuned(self, context: TrainContext) -> Decision:
        """All routers together, on the loss at the end of the model."""
        run = context.tokens.get(self.calibration) or next(iter(context.tokens.values()))
        heldout, judge, learn = judges_of(run)
        start, dtypes = _routers(context)
        loss = next_token_loss if self.method == "lm_ce" else distillation(context, run, self.teacher_tokens)
        ids = run.tokens.ids
        batches = batches_without_end(ids, learn, min(self.batch, len(learn)), context.generator())
        judges = [TokenBatch(ids[row : row + 1], (row,)) for row in judge]
        found = tune(context, start, dtypes, loss, batches, judges, steps=self.steps, lr=self.lr)
        first, last = found.losses[0][1], dict(found.losses)[found.best]
        accepted = found.best > 0 and last < first * (1 - self.min_gain)
        source, tuned = context.source or context.model.read_layer, replaced(context, found.tensors).weights
        before, after = (
            router_scores(context.model, run, judge, source, weights) for weights in (context.weights, tuned)
        )
        notes: dict[str, Any] = {}
        for layer, scores in before.items():
            change = _change(start, found.tensors, layer)
            said = {**self._note(heldout, scores, after[layer]), "accepted": accepted, "change": change}
            notes[str(layer)] = {"router": {**said, "loss": [first, last]}}
        tensors = {f"{layer}.{name}": value for (layer, name), value in found.tensors.items()} if accepted else {}
        return Decision({"layers": notes, "losses": [list(pair) for pair in found.losses], "best": found.best}, tensors)


def _routers(context: TrainContext) -> tuple[dict[tuple[int, str], Tensor], dict[tuple[int, str], torch.dtype]]:
    """All router matrices (and their biases) as they are, float32, and the dtypes they are stored in."""
    start: dict[tuple[int, str], Tensor] = {}
    dtypes: dict[tuple[int, str], torch.dtype] = {}
    for layer in context.model.facts.moe_layers:
        weights, source = context.weights(layer.index), context.model.read_tensors(layer.index, check=False)
        for name in router_matrix(layer) or ():
            if name is not None:
                start[layer.index, name] = _plain(weights.tensors[name], layer.index, name).float()
                dtypes[layer.index, name] = _plain(source[name], layer.index, name).dtype
    return start, dtypes


def _plain(value: Weight, layer: int, name: str) -> Tensor:
    if not isinstance(value, Tensor):
        found = "the router has codes already (kl_clip before)"
        raise UnsupportedModel(message(f"layer {layer} {name}", found, then="tune before router_bits: 8"))
    return value


def _change(before: Mapping[tuple[int, str], Tensor], after: Mapping[tuple[int, str], Tensor], layer: int) -> float:
    """|after - before| / |before| over the tensors of one layer."""
    own = [key for key in before if key[0] == layer]
    missed = sum(float((after[key].float() - before[key]).square().sum()) for key in own)
    return math.sqrt(missed / sum(float(before[key].square().sum()) for key in own))
