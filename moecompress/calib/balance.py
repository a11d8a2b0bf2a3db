"""`balance`: rows are chosen from a larger pool so that every expert gets calibration tokens (EAQuant, 2506.13329)."""

from __future__ import annotations

import random
import shutil
from math import ceil
from typing import Any

import torch
from torch import Tensor

from moecompress.calib.cache import digest_of
from moecompress.calib.options import Balance
from moecompress.calib.spec import CalibrationSource, Rows
from moecompress.calib.workshop import Kept, Made, Workshop, model_identity
from moecompress.errors import CalibrationError, message
from moecompress.numerics.ebss import sigma
from moecompress.numerics.selection import cover, fill_evenly, rule
from moecompress.stats.routing import RoutingBySequence
from moecompress.stream.collect import Collector
from moecompress.stream.streams import run_layer, start_run
from moecompress.types import TokenSet

BATCH_TOKENS = 4096
NAMED = 5  # experts that a message or report names


def pool_rows(spec: CalibrationSource) -> int:
    """Rows that the source has to give: `samples`, or the pool from which they are chosen."""
    return spec.samples if spec.balance is None else max(spec.samples, ceil(spec.samples * spec.balance.pool))


def balanced(pool: Rows, spec: CalibrationSource, held: int, where: str, workshop: Workshop) -> Rows:
    """The chosen rows: those to train on first, the `held` held-out ones last (`Rows.heldout`).

    Held-out rows are spread over the pool and not chosen for their routing. The others are counted in one pass through
    all layers; only tokens that passes may see count. Raises CalibrationError where too few experts get enough and
    `short` is `error`.
    """
    options = spec.balance
    assert isinstance(options, Balance)
    count = pool.ids.shape[0]
    apart = [(2 * i + 1) * count // (2 * held) for i in range(held)]
    candidates = [row for row in range(count) if row not in set(apart)]
    counts = pool_routes(pool, workshop)[candidates]
    site = workshop.model.facts.moe_layers[0].site
    assert site is not None
    wanted = rule(options.ratio, site.top_k, spec.length, site.num_experts)
    order = list(range(len(candidates)))
    random.Random(spec.seed).shuffle(order)
    rows = spec.samples - held
    chosen = choose(counts, wanted, rows, order, options, spec.length)
    told = {
        "rule_tokens": wanted,
        "pool": count,
        "rows": len(chosen),
        "drawn": _told(counts, order[:rows], wanted, spec.length),
        "chosen": _told(counts, chosen, wanted, spec.length),
    }
    _check(counts, chosen, wanted, options, where)
    taken = [*sorted(candidates[i] for i in chosen), *apart]
    marks = None if pool.selected is None else pool.selected[taken]
    heldout = tuple(range(len(chosen), len(taken)))
    return Rows(pool.ids[taken], {**pool.origin, "balance": told}, marks, heldout)


def choose(counts: Tensor, wanted: int, rows: int, order: list[int], options: Balance, length: int) -> list[int]:
    """Candidate numbers. counts: int64 [P, L, E]. First those that the rule needs, then `rows` in all: in the drawn
    order, or those that make use even."""
    flat = counts.flatten(1)
    need = flat.sum(0).clamp(max=wanted)
    chosen = cover(flat, need, None if options.grow else rows)
    if options.fill == "even":
        return fill_evenly(counts, chosen, rows, length)
    rest = [i for i in order if i not in set(chosen)]
    return [*chosen, *rest[: max(0, rows - len(chosen))]]


def pool_routes(pool: Rows, workshop: Workshop) -> Tensor:
    """Tokens of each row at each expert, int64 [P, L, E]: one pass through all layers, kept."""
    model, folder = workshop.model, workshop.scratch / "pool"
    parts = {"routes": digest_of(pool.ids), "model": model_identity(model.index)}
    if pool.selected is not None:
        parts["selected"] = digest_of(pool.selected)

    def make() -> Made:
        count, length = pool.ids.shape
        tokens = TokenSet("pool", pool.ids, {}, "", (), pool.selected)
        run = start_run(model, tokens, folder, batch_tokens=BATCH_TOKENS, streams=("original",))
        workshop.progress.stage(f"routing of a pool of {count} x {length} tokens", len(model.layers))
        found = []
        for index in range(len(model.layers)):
            site = model.facts.layers[index].site
            statistic = RoutingBySequence(count, length)
            collector = Collector(site, [] if site is None else [statistic])
            run_layer(model, model.read_layer(index), run, "original", collector=collector)
            if site is not None:
                found.append(collector.finished()[statistic.name]["tokens"])
            workshop.progress.step(f"layer {index}")
        shutil.rmtree(folder)
        return {"counts": torch.stack(found, 1)}, {}

    return Kept(workshop.kept, parts).whole(make)[0]["counts"]


def _told(counts: Tensor, rows: list[int], wanted: int, length: int) -> dict[str, Any]:
    total = counts[rows].sum(0)
    return {
        "least_tokens": int(total.min()),
        "sigma": float(sigma(total, max(1, len(rows)) * length)),
        "experts_with_enough": float((total >= wanted).double().mean()),
    }


def _check(counts: Tensor, chosen: list[int], wanted: int, options: Balance, where: str) -> None:
    total, available = counts[chosen].sum(0), counts.sum(0)
    short = (total < wanted).nonzero().tolist()
    enough = 1 - len(short) / total.numel()
    if enough >= options.coverage or options.short == "report":
        return
    named = [f"MoE layer {l} expert {e}: {int(total[l, e])} (pool: {int(available[l, e])})" for l, e in short[:NAMED]]  # noqa: E741
    found = f"{len(short)} of {total.numel()} experts get fewer than {wanted} tokens: {'; '.join(named)}"
    if len(short) > NAMED:
        found += "; ..."
    then = "add text, raise `pool:`, lower `ratio:` or `coverage:`, or set `short: report`"
    found += f" (coverage {enough:.4f})"
    raise CalibrationError(message(f"{where}: balance", found, f"coverage {options.coverage:g}", then))
