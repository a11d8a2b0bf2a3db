"""How an allocation fits into a plan: which quantizer it is for, what is wrong with it, what sizes to expect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from moecompress.checkpoint.native import plan_record
from moecompress.errors import message
from moecompress.estimate import Estimate
from moecompress.passes.allocator import Allocator
from moecompress.passes.base import Pass
from moecompress.passes.budget import expert_shapes, expert_weights
from moecompress.passes.quantizer import BITS, Quantizer
from moecompress.stream.inventory import Owner
from moecompress.stream.model import StreamModel
from moecompress.types import LayerFacts, ModelFacts, Scheme

_SHARD_OVERHEAD = 8192  # a shard's header and the padding behind it


def allocated_to(passes: Sequence[Pass], position: int) -> Quantizer | None:
    """The quantizer that takes its widths from the allocate.* pass at `position`; None for other passes."""
    if not isinstance(passes[position], Allocator):
        return None
    later = (step for step in passes[position + 1 :] if isinstance(step, Quantizer))
    return next((step for step in later if step.bits is None and "routed_experts" in step.targets), None)


def allocation_of(passes: Sequence[Pass]) -> tuple[Allocator, Quantizer] | None:
    """The recipe's allocation and the quantizer it is for, when it has both."""
    for position, step in enumerate(passes):
        quantizer = allocated_to(passes, position)
        if isinstance(step, Allocator) and quantizer is not None:
            return step, quantizer
    return None


def allocation_problems(passes: Sequence[Pass]) -> list[str]:
    """What is wrong with the allocate.* passes of a recipe, sizes apart."""
    problems = []
    found = [position for position, step in enumerate(passes) if isinstance(step, Allocator)]
    for position in found:
        if allocated_to(passes, position) is None:
            problems.append(
                message(
                    passes[position].name,
                    "no later quantize.* takes its widths",
                    then="add a quantize.rtn, .gptq or .hqq for routed experts without `bits`",
                )
            )
    if len(found) > 1:
        problems.append(message(passes[found[1]].name, "a second allocation", "one per recipe"))
    return problems


def _fixed_bytes(
    cost: Estimate, model: StreamModel, facts: ModelFacts, schemes: Mapping[int, Mapping[str, Scheme]]
) -> int:
    """Planned bytes of the output files without the records of routed experts: other tensors, slot maps, headers."""
    records = sum(
        _record_bytes(model, layer, schemes[layer.index]["gate_up"]) for layer in facts.moe_layers if layer.site
    )
    names = sum(1 for name in model.reader.names() if ".experts." not in name)
    return cost.output_bytes - records + (len(model.facts.layers) + 1) * _SHARD_OVERHEAD + 256 * names


def with_allocation(
    cost: Estimate,
    allocation: tuple[Allocator, Quantizer],
    model: StreamModel,
    facts: ModelFacts,
    schemes: Mapping[int, Mapping[str, Scheme]],
) -> tuple[Estimate, list[str]]:
    """The estimate with the budget's mean width instead of the quantizer's own, and what is wrong with the budget.

    facts: of the output.
    """
    allocator, quantizer = allocation
    fixed = _fixed_bytes(cost, model, facts, schemes)
    pool = allocator.pool(facts, quantizer, fixed)
    problem = allocator.infeasible(facts, pool)
    if problem:
        return cost, [message(f"{allocator.name} budget '{allocator.budget}'", problem)]
    mean = min(pool.mean_bits(), float(max(allocator.bits)))
    more = int(pool.weights * (mean - BITS) / 8)
    before, after = cost.component_bytes["routed_experts"]
    bits = cost.expert_bits_per_weight
    output = cost.output_bytes + more
    changed = replace(
        cost,
        fixed_bytes=fixed,
        output_bytes=output,
        disk_bytes=int(cost.disk_bytes + 1.02 * more),
        expert_bits_per_weight=None if bits is None else bits + 8 * more / expert_weights(model.facts),
        total_bits_per_weight=cost.total_bits_per_weight * output / cost.output_bytes,
        component_bytes={**cost.component_bytes, "routed_experts": (before, after + more)},
    )
    return changed, []


def reworded(actions: Mapping[str, str], owned: Mapping[str, Owner]) -> dict[str, str]:
    """The plan's actions, with the experts' widths left open."""
    return {
        key: text.replace(f"quantize {BITS}-bit", "quantize as allocated,")
        if owned[key].role == "routed_experts"
        else text
        for key, text in actions.items()
    }


def _record_bytes(model: StreamModel, layer: LayerFacts, scheme: Scheme) -> int:
    assert layer.site is not None
    shapes = expert_shapes(layer.site)
    record = plan_record([(name, shape, scheme, model.facts.dtype) for name, shape in shapes.items()])
    return record.row_bytes * layer.site.num_experts
