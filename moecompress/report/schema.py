"""What report.json and eval.json contain. `None` always means "not measured"; nothing here is ever guessed.

The keys are a contract with tools that read them: add, never rename. Times are seconds, KL is in nats,
agreements and errors are fractions.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

Component = Literal[
    "routed_experts",
    "attention",
    "shared_experts",
    "dense_mlp",
    "router",
    "embedding",
    "lm_head",
    "norm",
    "other",
]
REMOVED = ("pruned", "merged")  # how `action` starts when an expert without bits is gone from the output


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=True)


class ModelInfo(_Part):
    """The source model. `source`: whether `name` is a hub id or a local directory."""

    name: str
    source: Literal["hub", "directory"]
    revision: str | None = None
    model_type: str | None = None
    architecture: str | None = None


class ComponentSize(_Part):
    """Bytes of one kind of tensor before and after."""

    source_bytes: int
    output_bytes: int


class Size(_Part):
    """Bytes of all tensors, and stored bits (codes, scales, zero points) per weight of the SOURCE model."""

    source_bytes: int | None = None
    output_bytes: int | None = None
    expert_bits_per_weight: float | None = None
    total_bits_per_weight: float | None = None
    components: dict[Component, ComponentSize] = {}


class PlanInfo(_Part):
    """What was predicted before the first tensor was read."""

    peak_bytes: int | None = None
    disk_bytes: int | None = None
    seconds: float | None = None


class PassInfo(_Part):
    """One pass of the recipe, in execution order."""

    name: str
    paper: str | None = None
    parameters: dict[str, JsonValue] = {}
    seconds: float | None = None
    peak_rss_bytes: int | None = None


class CalibrationInfo(_Part):
    """One calibration set: what made it, N sequences of T tokens, sha256 of the ids."""

    name: str = "default"
    origin: dict[str, JsonValue] = {}
    samples: int | None = None
    length: int | None = None
    digest: str | None = None


class RouterAligned(_Part):
    """What align.router did in a layer. kl, agreement: before and after, on the tokens that judged; change:
    |new - old| / |old| of its matrix; accepted: whether the layer has the new one; loss: of the whole model, before and
    after, where that was learned from."""

    method: str
    accepted: bool
    judged_on: str
    kl: tuple[float | None, float | None]
    agreement: tuple[float | None, float | None]
    change: float
    fewest_tokens: int | None = None
    loss: tuple[float, float] | None = None


class RouterInfo(_Part):
    """Original against compressed router on the same tokens. load_cv: std / mean of tokens per expert.

    aligned: what every align.router of the recipe did, in order.
    """

    topk_agreement: float | None = None
    kl: float | None = None
    load_cv: float | None = None
    aligned: tuple[RouterAligned, ...] = ()


class ExpertBits(_Part):
    """Code width per projection; 16 = the source dtype; both None = the expert is not in the output."""

    gate_up: int | None = None
    down: int | None = None


class ExpertInfo(_Part):
    """One expert of the source model. error: relative squared output error on sampled tokens; weight_error: of its
    weights. `fallback` says why it was not treated as asked (too few tokens)."""

    id: int = Field(ge=0, lt=2**16)
    tokens: int | None = None
    importance: float | None = None
    bits: ExpertBits = ExpertBits()
    error: float | None = None
    weight_error: float | None = None
    action: str = "kept"
    fallback: str | None = None
    protected: str | None = None  # why it was kept whatever its score

    @property
    def removed(self) -> bool:
        return self.bits.gate_up is None and self.bits.down is None and self.action.startswith(REMOVED)

    @property
    def uncovered(self) -> bool:
        """A coverage problem: no token at all, or a fallback had to be used."""
        return self.tokens == 0 or self.fallback is not None


class UseInfo(_Part):
    """What one token uses of a layer's routed experts, mean over tokens: their number, and their stored bytes, which
    are what decoding one sequence reads. before: of the source."""

    experts_before: float
    experts: float
    bytes_before: float
    bytes: float


class LayerInfo(_Part):
    """One MoE layer. output_error: relative error of the layer's output on held-out tokens."""

    layer: int
    experts_before: int | None = None
    experts_after: int | None = None
    router: RouterInfo = RouterInfo()
    output_error: float | None = None
    notes: dict[str, JsonValue] = {}  # what passes say about the layer (merging: how much was taken over)
    use: UseInfo | None = None
    experts: tuple[ExpertInfo, ...] = ()


class Loadability(_Part):
    """Whether a program loads the output. tested: it was loaded; by_rule: its documented rules are met."""

    status: Literal["tested", "by_rule", "no"]
    reason: str


class Loadable(_Part):
    transformers: Loadability | None = None
    vllm: Loadability | None = None
    sglang: Loadability | None = None


class BudgetInfo(_Part):
    """One budget and what its division gives; `problem` instead where it cannot be kept. predicted_kl: in nats per
    token, to second order, of rounding the routed experts; None where costs are in other units."""

    budget: str
    mean_bits: float | None = None
    stored_bits_per_weight: float | None = None
    predicted_cost: float | None = None
    predicted_kl: float | None = None
    problem: str | None = None


class AllocationInfo(BudgetInfo):
    """The division of bits among the experts. gap: proven distance to the cheapest division. curve: other budgets,
    predicted from the same statistics."""

    name: str
    gap: float | None = None
    curve: tuple[BudgetInfo, ...] = ()


class Report(_Part):
    """report.json."""

    schema_: Literal["moecompress.report/1"] = Field(default="moecompress.report/1", alias="schema")
    model: ModelInfo
    recipe: dict[str, JsonValue]
    versions: dict[str, str] = {}
    seeds: dict[str, int] = {}
    hardware: dict[str, JsonValue] = {}
    backend: str | None = None
    format: str | None = None  # what `output.format: auto` became
    size: Size = Size()
    plan: PlanInfo = PlanInfo()
    peak_rss_bytes: int | None = None
    seconds: float | None = None
    resumed: int | None = None
    calibration: tuple[CalibrationInfo, ...] = ()
    passes: tuple[PassInfo, ...] = ()
    layers: tuple[LayerInfo, ...] = ()
    allocation: AllocationInfo | None = None
    warnings: tuple[str, ...] = ()
    loadable: Loadable = Loadable()


class Metric(_Part):
    value: float | None = None
    stderr: float | None = None


class Change(_Part):
    """A paired difference, this model minus the reference, as `numerics.significance.Difference`."""

    value: float | None = None
    stderr: float | None = None
    count: int | None = None
    z: float | None = None
    higher: int | None = None
    lower: int | None = None
    p: float | None = None
    test: Literal["sign", "t"] | None = None


class Evaluation(_Part):
    """eval.json. router_agreement: one fraction per MoE layer, in order; unknown keys are left alone.

    samples, windows: files or folders beside eval.json with what each document and window gave. limit: of the tasks
    measured last; task_settings has every task's.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    perplexity: dict[str, Metric] = {}
    kl: dict[str, float | None] = {}
    top1_agreement: dict[str, float | None] = {}
    router_agreement: tuple[float | None, ...] = ()
    tasks: dict[str, dict[str, Metric]] = {}
    samples: str | None = None
    backend: str | None = None
    versions: dict[str, str] = {}
    limit: int | None = None
    reference: str | None = None
    windows: str | None = None
    tasks_paired: dict[str, dict[str, Change]] = {}
    tasks_reference: str | None = None
    task_settings: dict[str, dict[str, JsonValue]] = {}
