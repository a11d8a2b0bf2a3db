"""What generating a token set will cost, from shapes; what cannot work is said before anything runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from moecompress.arch.quirks import RECOMPUTED, UNPARKED
from moecompress.calib.balance import pool_rows
from moecompress.calib.mix import part_specs
from moecompress.calib.options import AnswersOptions, EbssOptions, Generation
from moecompress.calib.spec import CalibrationSource, with_samples
from moecompress.errors import message
from moecompress.progress import duration
from moecompress.stream.model import StreamModel
from moecompress.stream.speed import active_weights, matmul_rate

LIMIT = 12 * 3600  # seconds; more needs `force: true`
_EXPAND = {"self": 1e9, "rtn4": 2e8, "streamed": 1e9}  # weights per second made float32 for one use
_MEMORY_RATE, _DISK_RATE = 5e9, 4e8  # bytes per second: copies inside memory; a modest disk


@dataclass(frozen=True)
class Cost:
    """seconds and disk_bytes of generating one set; parts: resident bytes by cause."""

    seconds: float
    disk_bytes: int
    parts: Mapping[str, int]


@dataclass(frozen=True)
class _Work:
    """rows that advance together, how many such batches one after another, steps of each."""

    rows: int
    batches: int
    steps: int


def all_costs(spec: CalibrationSource, model: StreamModel) -> list[Cost]:
    """What has to be generated for a set, part by part, and the pass over a pool."""
    whole = spec if spec.balance is None else with_samples(spec, pool_rows(spec))
    costs = [cost for one in (part_specs(whole) or (whole,)) if (cost := generation_cost(one, model)) is not None]
    if spec.balance is not None:
        tokens = pool_rows(spec) * spec.length
        costs.append(Cost(2 * active_weights(model.facts) * tokens / matmul_rate(), 0, {}))
    return costs


def generation_cost(spec: CalibrationSource, model: StreamModel) -> Cost | None:
    """The cost of a source that generates; None for the others."""
    options = spec.options
    if not isinstance(options, Generation):
        return None
    facts, work = model.facts, _work(spec, options)
    cached = facts.model_type not in RECOMPUTED
    tokens = work.rows * work.batches * work.steps
    cache = work.rows * work.steps * _cache_bytes(model) if cached else 0
    flops = (
        2 * (active_weights(facts) * (1 if cached else work.steps / 2) + facts.vocab_size * facts.hidden_size) * tokens
    )
    experts = sum(_expert_weights(model, layer.index) for layer in facts.moe_layers)
    passes = work.batches * work.steps
    traffic = passes * (experts / _EXPAND[options.generator] + 1.5 * cache / _MEMORY_RATE)
    if options.generator == "streamed":
        traffic += passes * (facts.source_bytes + cache) / _DISK_RATE
    return Cost(
        seconds=flops / matmul_rate() + traffic,
        disk_bytes=2 * cache if options.generator == "streamed" else 0,
        parts=_parts(model, options, work, experts, cache),
    )


def generation_problems(spec: CalibrationSource, model: StreamModel, where: str) -> list[str]:
    """Why this set cannot be generated with this model, on this machine, or not in reasonable time."""
    whole = spec if spec.balance is None else with_samples(spec, pool_rows(spec))
    return [text for one in (part_specs(whole) or (whole,)) for text in _problems(one, model, where)]


def _problems(spec: CalibrationSource, model: StreamModel, where: str) -> list[str]:
    cost, options, facts = generation_cost(spec, model), spec.options, model.facts
    if cost is None:
        return []
    problems = []
    if options.generator == "streamed" and facts.model_type in UNPARKED:
        found = f"generator 'streamed': {UNPARKED[facts.model_type]}"
        problems.append(message(where, found, then="use `generator: self` or `rtn4`"))
    sizes = {(layer.site.num_experts, layer.site.top_k) for layer in facts.moe_layers if layer.site is not None}
    if len(sizes) != 1:
        problems.append(message(where, f"layers with (experts, experts per token) {sorted(sizes)}", "equal ones"))
    if cost.seconds > LIMIT and not options.force:
        found = f"generating takes about {duration(cost.seconds)}"
        then = "use fewer `samples:`, a smaller `width:` or another generator, or `force: true`"
        problems.append(message(where, found, f"at most {duration(LIMIT)}", then))
    need, machine = sum(cost.parts.values()), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > machine:
        found = (
            f"generator '{options.generator}' needs about {need / 2**30:.1f} GiB, the machine has {machine / 2**30:.1f}"
        )
        problems.append(message(where, found, then="use `generator: rtn4` or `streamed`, or a smaller `batch:`"))
    return problems


def _work(spec: CalibrationSource, options: Generation) -> _Work:
    if isinstance(options, EbssOptions):
        batch = min(options.rows_at_once(spec.samples), spec.samples)
        return _Work(batch * options.settings().width, ceil(spec.samples / batch), spec.length)
    assert isinstance(options, AnswersOptions)
    conversations = ceil(spec.samples * spec.length / options.max_tokens)  # the most there can be
    batch = min(options.rows_at_once(spec.samples), conversations)
    return _Work(batch, ceil(conversations / batch), options.max_tokens)


def _cache_bytes(model: StreamModel) -> int:
    """Bytes that one token leaves in the cache, taking every layer for full attention in float32."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    stored = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * 4 * int(stored) * int(size) * len(model.facts.layers)


def _expert_weights(model: StreamModel, index: int) -> int:
    site = model.facts.layers[index].site
    assert site is not None
    return site.num_experts * (site.gate_up_rows * site.hidden + site.hidden * site.width)


def _parts(model: StreamModel, options: Generation, work: _Work, experts: int, cache: int) -> dict[str, int]:
    facts = model.facts
    layers, item = len(facts.layers), facts.dtype.itemsize
    others = sum(_size(shape) for layer in facts.layers for shape in layer.shapes.values())
    stored = {"self": float(item), "rtn4": 0.5625, "streamed": item / layers}[options.generator]
    share = layers if options.generator == "streamed" else 1
    return {
        "generating: experts": int(experts * stored),
        "generating: other weights, float32": 4 * others // share,
        "generating: vocabulary matrices": (1 if model.tied else 2) * facts.vocab_size * facts.hidden_size * item,
        "generating: cache": 2 * cache // share,
        "generating: log-probabilities": 3 * 4 * work.rows * facts.vocab_size,
    }


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
