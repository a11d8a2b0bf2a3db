"""A token set on its way through the layers: its batches, layer calls and the two hidden streams on disk.

`original` runs through the source weights, `compressed` through the weights as the passes leave them. Each stream has
two files: layer l reads generation l % 2 and writes the other, so a killed run finds its input untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from moecompress.stream.collect import Collector, Recorded
from moecompress.stream.flow import residual_flow
from moecompress.stream.hidden import HiddenStore
from moecompress.stream.layers import call_layer, experts_of, filled_layer, gates_told, watched
from moecompress.stream.model import StreamModel
from moecompress.stream.outer import outer_weights
from moecompress.stream.prelude import LayerCall, logits, record, share_equal
from moecompress.types import LayerWeights, MoESite, Stream, TokenBatch, TokenSet

Step = Callable[[int], None]  # called with the number of tokens that went through a layer


@dataclass(frozen=True)
class TokenRun:
    """One token set in flight. calls[b][l] is how layer l is called for batch b."""

    tokens: TokenSet
    batches: tuple[TokenBatch, ...]
    calls: tuple[tuple[LayerCall, ...], ...]
    folder: Path
    row_shape: tuple[int, ...]

    def store(self, stream: Stream, layer: int) -> HiddenStore:
        """The hidden states of one stream that enter `layer`."""
        name = f"{self.tokens.name}.{stream}.{layer % 2}.f32"
        return HiddenStore(self.folder / name, (self.tokens.ids.shape[0], *self.row_shape))

    @property
    def measured(self) -> tuple[int, ...]:
        """Sequences on which errors are measured: the held-out ones, or all when none is held out."""
        return self.tokens.heldout or tuple(range(self.tokens.ids.shape[0]))


def batches_of(ids: Tensor, batch_tokens: int, selected: Tensor | None = None) -> tuple[TokenBatch, ...]:
    """Consecutive sequences in batches of at most `batch_tokens` tokens (at least one sequence)."""
    size = max(1, batch_tokens // ids.shape[1])
    spans = [range(at, min(at + size, ids.shape[0])) for at in range(0, ids.shape[0], size)]
    seen = [None if selected is None else selected[span.start : span.stop] for span in spans]
    pairs = zip(spans, seen, strict=True)
    return tuple(TokenBatch(ids[span.start : span.stop], tuple(span), marks) for span, marks in pairs)


def start_run(
    model: StreamModel, tokens: TokenSet, folder: Path, *, batch_tokens: int, streams: Sequence[Stream] | None
) -> TokenRun:
    """Run what comes before the layers for every batch.

    streams: which streams get their layer-0 hidden states written; None = only learn the calls (resuming).
    """
    batches = batches_of(tokens.ids, batch_tokens, tokens.selected)
    calls: list[tuple[LayerCall, ...]] = []
    run: TokenRun | None = None
    with torch.no_grad(), outer_weights(model.skeleton, model.layers_name, model.read_outer):
        for batch in batches:
            hidden, made = record(model.skeleton, model.layers, batch.ids)
            if calls and batch.ids.shape == batches[0].ids.shape:
                made = tuple(share_equal(a, b) for a, b in zip(made, calls[0], strict=True))
            calls.append(made)
            if run is None:
                run = TokenRun(tokens, batches, (), folder, tuple(hidden.shape[1:]))
                for stream in streams or ():
                    run.store(stream, 0).create()
            for stream in streams or ():
                run.store(stream, 0).write(batch.rows[0], hidden)
    assert run is not None
    return TokenRun(tokens, batches, tuple(calls), folder, run.row_shape)


def run_layer(
    model: StreamModel,
    weights: LayerWeights,
    run: TokenRun,
    stream: Stream,
    *,
    collector: Collector | None = None,
    write: bool = True,
    step: Step | None = None,
    sequences: Collection[int] | None = None,
) -> None:
    """Send one stream through one layer. write: keep the results as the next layer's input. sequences: batches without
    any of these are left out.

    A collector that only records what enters the experts stops each batch there, and nothing is written.
    """
    index = weights.index
    site = model.facts.layers[index].site
    source, target = run.store(stream, index), run.store(stream, index + 1)
    if write:
        target.create()
    with torch.no_grad(), filled_layer(model, weights) as layer:
        for batch, calls in zip(run.batches, run.calls, strict=True):
            if sequences is not None and not any(row in sequences for row in batch.rows):
                continue
            hidden = source.read(batch.rows[0], batch.rows[-1] + 1)
            with suppress(Recorded), nullcontext() if collector is None else _watching(layer, site, collector, batch):
                out = call_layer(layer, hidden, calls[index])
                if write:
                    target.write(batch.rows[0], out)
            if step is not None:
                step(batch.ids.numel())


@contextmanager
def _watching(layer: nn.Module, site: MoESite | None, collector: Collector, batch: TokenBatch) -> Iterator[None]:
    watch = collector.watch(batch, None if site is None else experts_of(layer, site.experts))
    with ExitStack() as stack:
        stack.enter_context(watched(layer, site, watch, watch.tap, collector.linears, watch.on_linear))
        if collector.gated:
            stack.enter_context(gates_told(layer, set(collector.gated.values()), watch.on_gate))
        if site is not None and collector.blocks:
            stack.enter_context(residual_flow(layer, site, watch.on_block))
        yield


def final_logits(
    model: StreamModel, run: TokenRun, stream: Stream, rows: Sequence[int] | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids int64 [1, T], logits float32 [1, T, V]) per sequence after the last layer, one sequence at a time."""
    store = run.store(stream, len(model.layers))
    wanted = range(run.tokens.ids.shape[0]) if rows is None else rows
    with outer_weights(model.skeleton, model.layers_name, model.read_outer):
        for row in wanted:
            ids = run.tokens.ids[row : row + 1]
            with torch.no_grad():  # never across a yield: the caller would run, or be left, without gradients
                found = logits(model.skeleton, model.layers, ids, store.read(row, row + 1))
            yield ids, found
