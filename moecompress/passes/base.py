"""What a pass is: parameters that are its recipe keys, and three functions - check, decide, apply.

`check` sees facts and no tensors. `decide` sees the finished statistics of its scope and returns a small Decision
that can be inspected, edited and replayed. `apply` is pure: (weights, decision) -> weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from moecompress.arch.sites import NormFold
from moecompress.stats.base import Statistic
from moecompress.stream.model import StreamModel
from moecompress.stream.residual import Residual, Rotate
from moecompress.stream.router import RouterView
from moecompress.types import ExpertWeights, LayerFacts, LayerWeights, ModelFacts, Scheme, Stream

TARGETS = ("routed_experts", "attention", "shared_experts", "dense_mlp")
Target = Literal["routed_experts", "attention", "shared_experts", "dense_mlp"]


class Scope(Enum):
    """When a pass can decide."""

    LAYER = "layer"  # when the statistics of its layer are complete
    MODEL = "model"  # after the sweep over all layers: a barrier
    TRAIN = "train"  # needs gradients through several layers: a barrier, too


@dataclass(frozen=True)
class Decision:
    """What a pass decided: JSON-able data plus named tensors (router rows, masks, rotations). Replayable.

    data: for MODEL and TRAIN passes it holds all layers under their index; `apply` sees the whole decision.
    """

    data: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def of_layer(self, index: int) -> Mapping[str, Any]:
        """The data of one layer: all of it, or what a MODEL pass keeps under the layer's index."""
        return self.data.get("layers", {}).get(str(index), self.data)  # type: ignore[no-any-return]


Forward = Callable[[ExpertWeights, Tensor], Tensor]
ForwardRounded = Callable[[ExpertWeights, Tensor, Scheme], Tensor]
RowsToHidden = Callable[[Tensor], Tensor]


class Collect(Protocol):
    """Runs the layer with these weights once more; finished statistics by name. calibration: another token set."""

    def __call__(
        self, wanted: Sequence[Statistic], weights: LayerWeights, calibration: str | None = None
    ) -> Mapping[str, Mapping[str, Tensor]]: ...


@dataclass(frozen=True)
class LayerContext:
    """What a LAYER pass (and every `apply`) may look at.

    weights: the layer as the passes before left it. statistics: finished, by name, on the pass's stream.
    forward: one expert with candidate weights on inputs [n, H] -> outputs [n, H], by the family's own activation.
    forward_rounded: the same with the inputs of matrices that have no codes yet rounded as the scheme says.
    activate: the expert's activation, [n, 2I] (or [n, I]) -> [n, I], differentiable.
    scale_dtype: the dtype in which scales are stored. generator: independent of order and of resuming.
    block_error: rows int64 [m] (global token positions) -> float32 [m, H], the original stream's layer output minus the
    compressed stream's with the weights of this context: what a better layer could still make up for. Only for
    passes that set `needs_block_error`; raises LookupError otherwise.
    allocation: bits of every expert by projection, from an allocate.* pass before this one; None without one.
    quantizer: the pass that an allocation made here is for; None outside allocate.* passes.
    collect: runs the layer with the given weights on the pass's stream once more and returns these statistics finished:
    for passes whose statistics would not fit in memory together, or that change the layer in several steps.
    residual: finds what reads and writes the residual stream in this layer, proved with a rotation x -> x Q;
    raises UnsupportedModel where the stream cannot be rotated.
    norm_fold: finds the norm that feeds the experts and everything else that reads it, by running the layer on a probe;
    raises UnsupportedModel where a scale cannot be folded into it exactly.
    router: the layer's router beside the original model's, on the pass's token set.
    """

    facts: ModelFacts
    layer: LayerFacts
    weights: LayerWeights
    statistics: Mapping[str, Mapping[str, Tensor]]
    scale_dtype: torch.dtype
    forward: Forward
    forward_rounded: ForwardRounded
    activate: Callable[[Tensor], Tensor]
    generator: Callable[..., torch.Generator]
    block_error: RowsToHidden
    collect: Collect
    norm_fold: Callable[[], NormFold]
    residual: Callable[[Rotate], Residual]
    router: Callable[[], RouterView]
    allocation: Mapping[str, Sequence[int]] | None = None
    quantizer: Pass | None = None

    def evaluate(self, expert: int, candidate: ExpertWeights) -> float | None:
        """Relative squared output error of a candidate for one expert on the layer's token sample (`token_sample`).

        Weighted by the routing weights, so it is this expert's share of the block's error; None when the sample is
        not among the pass's statistics or holds no token of this expert.
        """
        sample = self.statistics.get("token_sample")
        if sample is None:
            return None
        return output_error(self.forward, self.weights.experts[expert], candidate, expert, sample)


def output_error(
    forward: Forward,
    reference: ExpertWeights,
    candidate: ExpertWeights,
    expert: int,
    sample: Mapping[str, Tensor],
) -> float | None:
    """sum_t g_t^2 |f(x_t) - f'(x_t)|^2 / sum_t g_t^2 |f(x_t)|^2 over the sampled tokens routed to `expert`.

    sample: `hidden` [n, H], `ids` [n, K], `weights` [n, K]. None when no sampled token goes there.
    """
    rows, slots = (sample["ids"] == expert).nonzero(as_tuple=True)
    if rows.numel() == 0:
        return None
    inputs, gates = sample["hidden"][rows].float(), sample["weights"][rows, slots].float()[:, None]
    wanted = forward(reference, inputs)
    error = ((forward(candidate, inputs) - wanted) * gates).double().square().sum()
    size = (wanted * gates).double().square().sum()
    return float(error / size) if float(size) > 0 else 0.0


@dataclass(frozen=True)
class ModelContext:
    """What a MODEL pass decides on: what `measure` kept of every MoE layer, by layer index.

    quantizer: the pass that an allocation is for; fixed_bytes: planned size of the output without the routed experts'
    matrices. Both only for allocate.* passes.
    fisher: mean squared gradient of the model's loss with respect to every element of a MoE layer's output, by layer,
    float32 [H], over this many calibration sequences; the layers are as the passes before left them.
    divergence: over so many sequences, KL in nats per token between that model and the same with one MoE layer replaced
    by what a function makes of it, by layer.
    """

    facts: ModelFacts
    statistics: Mapping[int, Mapping[str, Mapping[str, Tensor]]]
    generator: Callable[..., torch.Generator]
    fisher: Callable[[int], Mapping[int, Tensor]]
    divergence: Callable[[int, Callable[[LayerWeights], LayerWeights]], Mapping[int, float]]
    quantizer: Pass | None = None
    fixed_bytes: int = 0


class Pass(BaseModel):
    """Base of all passes. Fields are recipe keys; class variables say what the pass is and does."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str]
    paper: ClassVar[str]
    scope: ClassVar[Scope] = Scope.LAYER
    changes: ClassVar[frozenset[str]]
    propagate: ClassVar[Stream] = "compressed"
    expensive: ClassVar[bool] = False  # a finished layer is stored at a barrier instead of applying again
    transforms_experts: ClassVar[bool] = False  # moves scales or rotations in and out of experts; has `restored`
    removes_experts: ClassVar[bool] = False  # `kept` in a layer's decision: numbers of the experts that stay
    moves_residual: ClassVar[bool] = False  # changes the basis of the residual stream; has `outer`; comes first
    takes_turned: ClassVar[bool] = False  # may come after a pass that lets experts turn their inputs
    needs_block_error: ClassVar[bool] = False  # LAYER passes that learn from the layer's output error
    gates_experts: ClassVar[bool] = False  # gives layers a gate, which only the native format can hold

    @property
    def decides(self) -> Scope:
        """When the pass decides, as it is configured."""
        return self.scope

    def needs(self) -> tuple[Statistic, ...]:
        """Statistics this pass reads; empty = data-free."""
        return ()

    @property
    def needs_data(self) -> bool:
        """Whether the pass cannot run without calibration."""
        return bool(self.needs())

    @property
    def needs_attention(self) -> bool:
        """Whether the pass, or what it makes of the model, needs attention probabilities: eager attention."""
        return False

    @property
    def pairs_streams(self) -> bool:
        """Whether the pass reads the original stream's expert inputs beside the compressed stream's."""
        return False

    @property
    def uneven(self) -> bool:
        """Whether layers keep numbers of experts that are known only once the pass has decided (`reshape` tells the
        expected ones)."""
        return False

    @property
    def turns_inputs(self) -> bool:
        """Whether experts turn their inputs while they run after this pass (types.Turn)."""
        return False

    def statistics_bytes(self, layer: LayerFacts) -> int:
        """Bytes of the statistics this pass holds at once for one layer."""
        site = layer.site
        return 0 if site is None else sum(item.state_bytes(site) for item in self.needs())

    def added_bytes(self, layer: LayerFacts) -> int:
        """Bytes of tensors that the output has because of this pass beside the source's, for one layer."""
        return 0

    def lighter(self, facts: ModelFacts, excess: int) -> Self:
        """The same pass with the same result, holding `excess` bytes less at once if it can; by default itself."""
        return self

    def check(self, facts: ModelFacts) -> list[str]:
        """Every reason why this pass cannot run on this model; empty = it can. Sees no tensors."""
        return []

    def reshape(self, facts: ModelFacts) -> ModelFacts:
        """The model's facts after this pass: another number of experts, or the same facts."""
        return facts

    def schemes(self, layer: LayerFacts) -> Mapping[str, Scheme]:
        """Storage this pass will give to `gate_up`, `down` and linear names of one layer, as far as known now."""
        return {}

    def measure(self, context: LayerContext) -> Mapping[str, Mapping[str, Tensor]]:
        """MODEL and TRAIN passes: what is kept of one layer until the decision; by default its statistics."""
        return context.statistics

    def outer(self, model: StreamModel) -> Mapping[str, Callable[[], Tensor]]:
        """Passes that move the residual stream: how weights outside the layers are read from now on, by module name."""
        return {}

    def decide(self, context: Any) -> Decision:
        """What to do, from the context of the pass's scope."""
        return Decision({})

    def process(self, context: LayerContext) -> tuple[Decision, LayerWeights]:
        """`decide`, then `apply`. A pass whose decision falls out of the work itself does both at once here."""
        decision = self.decide(context)
        return decision, self.apply(context, decision)

    def apply(self, context: LayerContext, decision: Decision) -> LayerWeights:
        """The layer's new weights. Pure and deterministic."""
        raise RuntimeError(f"{type(self).__name__} has no apply")

    def restored(self, layer: LayerFacts, decision: Decision, number: int, expert: ExpertWeights) -> ExpertWeights:
        """Expert `number` of the output with this pass's exact transform taken back: comparable with the source's."""
        return expert


def group_problems(columns: Mapping[str, int], group_size: int) -> list[str]:
    """One line for every input size that `group_size` does not divide, naming the nearest sizes that work."""
    if group_size == -1:
        return []
    wrong = {name: size for name, size in columns.items() if size % group_size}
    if not wrong:
        return []
    fits = [g for g in (16, 32, 64, 128, 256) if all(size % g == 0 for size in columns.values())]
    works = ", ".join(map(str, fits)) or "none of 16..256"
    return [
        f"group_size {group_size} does not divide the {size} input columns of {name} (works: {works}, -1 = per channel)"
        for name, size in sorted(wrong.items())
    ]


def input_columns(facts: ModelFacts, targets: Sequence[Target]) -> dict[str, int]:
    """Input sizes of every kind of matrix that the targets select, named for messages."""
    sizes: dict[str, int] = {}
    seen: set[tuple[str, int]] = set()
    for layer in facts.layers:
        if layer.site is not None and "routed_experts" in targets:
            sizes["experts gate_up"], sizes["experts down"] = layer.site.hidden, layer.site.width
        for name in selected_linears(layer, targets):
            size = layer.shapes[name][1]
            if (name, size) not in seen:
                seen.add((name, size))
                sizes[name if name not in sizes else f"{name} of layer {layer.index}"] = size
    return sizes


def selected_linears(layer: LayerFacts, targets: Sequence[Target]) -> list[str]:
    """Linear weights of one layer (besides routed experts) whose role is among the targets."""
    return [name for name in layer.linears if layer.roles[name] in targets]
