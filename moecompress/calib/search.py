"""The search of EBSS for a batch of sentences that advance together; each is what it would be alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from moecompress.calib.options import EbssSettings
from moecompress.calib.workshop import seeded
from moecompress.numerics.ebss import add_routes, best_children, drawn, imbalance, likeliest
from moecompress.numerics.sampling import repeats


class Grows(Protocol):
    """What the search needs of a model (`stream.generate.Growing`)."""

    @property
    def ids(self) -> Tensor: ...
    @property
    def saves(self) -> bool: ...
    def begin(self, ids: Tensor) -> Any: ...
    def extend(self, parents: Tensor, tokens: Tensor) -> Any: ...
    def save(self, note: str, tensors: dict[str, Tensor]) -> None: ...
    def restore(self, note: str) -> dict[str, Tensor] | None: ...


@dataclass(frozen=True)
class Corpus:
    """Routing of the sentences finished before: counts int64 [L, E] of `tokens` tokens; both empty at first."""

    counts: Tensor | None = None
    tokens: int = 0


@dataclass
class _Beams:
    """likelihood float64 [S, B]; counts int64 [S, B, L, E]; logprobs float64 [S, B, V] of what comes next."""

    likelihood: Tensor
    counts: Tensor
    logprobs: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(frozen=True)
class Found:
    """The sentences: ids int64 [S, T], sum of log P of all but the first token float64 [S], counts int64 [S, L, E]."""

    ids: Tensor
    likelihood: Tensor
    counts: Tensor


def search(
    grow: Grows,
    firsts: Tensor,
    numbers: Sequence[int],
    settings: EbssSettings,
    length: int,
    *,
    experts: int,
    forbidden: Tensor,
    seed: int,
    corpus: Corpus,
    note: str = "",
    step: Callable[[int], None] = lambda _: None,
) -> Found:
    """Sentences of `length` tokens from their first tokens int64 [S]. numbers: of the sentences in the set, for seeds.

    experts: E. forbidden: bool [V], ids that are never chosen. corpus: for scope `corpus`. note: names this search
    where an interrupted one is continued. step: told the length reached.
    """
    count = firsts.shape[0]
    kept = grow.restore(note) if grow.saves else None
    if kept is not None:
        beams = _Beams(kept["likelihood"], kept["counts"], kept["logprobs"])
    else:
        beams = _Beams(torch.zeros(count, 1, dtype=torch.float64), torch.empty(0))
        _observe(beams, grow.begin(firsts[:, None]), experts)
    for reached in range(grow.ids.shape[1], length):
        deferred = _imbalance(beams.counts, reached, settings, corpus) / settings.tau
        logprobs = _allowed(beams.logprobs, grow.ids, settings, forbidden)
        if settings.search == "beam":
            values, tokens = likeliest(logprobs, settings.width)  # no other child can be among the best `width`
        else:
            own = [seeded(seed, f"ebss {number}", reached) for number in numbers]
            take = max(settings.draws, -(-settings.width // logprobs.shape[1]))  # enough for all beams from the start
            values, tokens = drawn(logprobs, take, settings.top_token_k, settings.temperature, own)
        parents, places, beams.likelihood = best_children(beams.likelihood, deferred, values, reached, settings.width)
        chosen = tokens[torch.arange(count)[:, None], parents, places]
        beams.counts = beams.counts[torch.arange(count)[:, None], parents]
        rows = (torch.arange(count)[:, None] * values.shape[1] + parents).flatten()
        _observe(beams, grow.extend(rows, chosen.flatten()), experts)
        if grow.saves:
            held = {"likelihood": beams.likelihood, "counts": beams.counts, "logprobs": beams.logprobs}
            grow.save(note, held)
        step(reached + 1)
    cost = -beams.likelihood / length + _imbalance(beams.counts, length, settings, corpus) / settings.tau
    best = cost.sort(dim=-1, stable=True).indices[:, 0]
    at = torch.arange(count)
    return Found(grow.ids.view(count, -1, length)[at, best], beams.likelihood[at, best], beams.counts[at, best])


def _observe(beams: _Beams, grown: Any, experts: int) -> None:
    """Take over what the model said about the newest token of every row."""
    count, width = beams.likelihood.shape
    layers = grown.routed.shape[0]
    before = beams.counts if beams.counts.numel() else torch.zeros(count, width, layers, experts, dtype=torch.int64)
    beams.counts = add_routes(before.flatten(0, 1), grown.routed[:, :, -1]).view(count, width, layers, experts)
    beams.logprobs = grown.logprobs.double().view(count, width, -1)


def _imbalance(counts: Tensor, tokens: int, settings: EbssSettings, corpus: Corpus) -> Tensor:
    wide = settings.scope == "corpus"
    return imbalance(counts, tokens, corpus.counts if wide else None, corpus.tokens if wide else 0)


def _allowed(logprobs: Tensor, ids: Tensor, settings: EbssSettings, forbidden: Tensor) -> Tensor:
    """log P with what must not be chosen at minus infinity; where the guard leaves nothing, a row goes without it."""
    made = logprobs.masked_fill(forbidden, -torch.inf)
    if settings.no_repeat_ngram or settings.max_run:
        again = repeats(ids, made.shape[-1], settings.no_repeat_ngram, settings.max_run).view_as(made)
        guarded = made.masked_fill(again, -torch.inf)
        stuck = (guarded == -torch.inf).all(-1, keepdim=True)
        made = torch.where(stuck, made, guarded)
    return made
