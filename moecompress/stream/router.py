"""The router of one layer beside the original model's: what it reads, what it should make of it, how far off it is.

The original router's outputs come from the original weights on the original stream, so they are the same targets
whatever exact transforms (scales in norms, rotations) or roundings earlier passes put into the compressed model. Those
of merged experts are one target together.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moecompress.arch.sites import router_matrix
from moecompress.arch.surgery import stands_for
from moecompress.errors import CalibrationError, UnsupportedModel, message
from moecompress.experts import Experts, materialise
from moecompress.numerics.routing import distinct, merged_outputs, routing_divergence, set_agreement
from moecompress.stats.base import RouterObservation, Statistic
from moecompress.stream.collect import BatchWatch, Collector, Recorded
from moecompress.stream.hidden import HiddenStore
from moecompress.stream.model import StreamModel
from moecompress.stream.streams import TokenRun, run_layer, start_run
from moecompress.types import ExpertWeights, LayerWeights, MoESite, Stream, TokenBatch, TokenSet, Weight

_EVERY = 8  # without held-out sequences one in so many judges and is not learned from


@dataclass(frozen=True)
class RouterScore:
    """A router against the original one on the judging tokens: mean KL in nats, mean Jaccard index of the choices."""

    kl: float
    agreement: float


@dataclass(frozen=True)
class RouterCall:
    """One call of a router, of the wanted sequences.

    rows: int64 [n]. inputs: float32 [n, H], what its matrix reads. logits: [n, E], its first output. ids: int64 [n, K].
    """

    rows: Tensor
    inputs: Tensor
    logits: Tensor
    ids: Tensor


def judges_of(run: TokenRun) -> tuple[bool, tuple[int, ...], tuple[int, ...]]:
    """(whether sequences are held out, those that judge, those to learn from). Raises CalibrationError for too few."""
    every = range(run.tokens.ids.shape[0])
    judge = run.tokens.heldout or tuple(every[::_EVERY])
    learn = tuple(sorted(set(every) - set(judge)))
    if not learn:
        found = f"{len(every)} calibration sequences, all of them for judging routers"
        raise CalibrationError(message(f"calibration '{run.tokens.name}'", found, then="add samples"))
    return bool(run.tokens.heldout), judge, learn


class RouterView:
    """The router of one layer on one token set. weights: the layer as the passes before left it.

    source: the layer that the original stream runs through, where a first pass has put both streams into another basis;
    None = the checkpoint's. judge: the held-out sequences, or every 8th one where none is held out; learn: the others.
    No statistic sees a judging sequence.
    """

    def __init__(
        self,
        model: StreamModel,
        run: TokenRun,
        stream: Stream,
        weights: LayerWeights,
        source: LayerWeights | None = None,
    ) -> None:
        """Raises UnsupportedModel for a layer without a router matrix, CalibrationError for too few sequences."""
        self._model, self._run, self._stream, self._weights = model, run, stream, weights
        facts = model.facts_of(weights)
        found = router_matrix(facts)
        if facts.site is None or found is None:
            raise UnsupportedModel(
                message(f"layer {weights.index}", "no matrix between the hidden state and the router")
            )
        self._site, (self.weight, self.bias) = facts.site, found
        self.outputs = facts.shapes[self.weight][0]
        self.columns = facts.shapes[self.weight][1] + (self.bias is not None)
        self._clusters = _clusters(model, weights)
        empty = (ExpertWeights(torch.empty(0), torch.empty(0)),) * self._source_experts  # they never run
        stored = model.read_tensors(weights.index, check=False)
        self._dtypes = {name: value.dtype for name, value in stored.items() if isinstance(value, Tensor)}
        self._source = LayerWeights(weights.index, stored if source is None else source.tensors, empty)
        self.heldout, self.judge, self.learn = judges_of(run)
        self._wanted: HiddenStore | None = None
        self._original: tuple[Tensor, Tensor] | None = None

    @property
    def matrix(self) -> Tensor:
        """The present matrix, float32 [R, C]; the bias is its last column."""
        return self._matrix(self._weights)

    def tensors(self, matrix: Tensor) -> dict[str, Tensor]:
        """A matrix [R, C] as the layer's tensors, rounded to the dtypes of the source."""
        parts = {self.weight: matrix if self.bias is None else matrix[:, :-1]}
        if self.bias is not None:
            parts[self.bias] = matrix[:, -1]
        return {name: value.to(self._dtypes[name]).contiguous() for name, value in parts.items()}

    def collect(self, statistic: Statistic) -> dict[str, Tensor]:
        """A statistic of router observations, finished, over the sequences to learn from."""
        wanted, matrix = self._targets(), self.matrix
        state = statistic.init(self._site)

        def see(call: RouterCall) -> None:
            inputs = self._extended(call.inputs)
            known = _read_rows(wanted, call.rows)
            given, (target, chosen) = inputs @ matrix.t(), (known[:, : self.outputs], known[:, self.outputs :].long())
            statistic.observe_router(state, RouterObservation(call.rows, inputs, given, target, chosen))

        self._visit(self._weights, self._stream, self.learn, see)
        return statistic.finalise(state)

    def score(self, changed: Mapping[str, Weight]) -> RouterScore:
        """The layer's router with these tensors instead of its own, on the judging sequences."""
        self._targets()
        assert self._original is not None
        found = self._calls(self._weights.with_tensors(changed), self._stream)
        return _compared(self._model, self._weights, self._original, found)

    @property
    def _source_experts(self) -> int:
        site = self._model.facts.layers[self._weights.index].site
        assert site is not None
        return site.num_experts

    def _targets(self) -> HiddenStore:
        """[N, T, R + K]: outputs of the original router for every token, then the choice it made."""
        if self._wanted is None:
            shape = (*self._run.tokens.ids.shape, self.outputs + self._site.top_k)
            store = HiddenStore(self._run.folder / f"{self._run.tokens.name}.router.f32", shape)
            store.create()
            matrix, places = self._matrix(self._source), self._places()
            logs: list[tuple[Tensor, Tensor]] = []
            judging = torch.tensor(self.judge)

            def see(call: RouterCall) -> None:
                outputs = self._aggregated(self._extended(call.inputs) @ matrix.t())
                made = torch.cat([outputs, places[call.ids].float()], 1)
                for sequence, rows in zip(*_sequences(call.rows, made, shape[1]), strict=True):
                    store.write(sequence, rows[None])
                judged = torch.isin(call.rows // shape[1], judging)
                logs.append((call.logits[judged].float(), call.ids[judged]))

            self._visit(self._source, "original", range(shape[0]), see)
            self._wanted, self._original = store, _joined(logs)
        return self._wanted

    def _calls(self, weights: LayerWeights, stream: Stream) -> tuple[Tensor, Tensor]:
        logs: list[tuple[Tensor, Tensor]] = []
        self._visit(weights, stream, self.judge, lambda call: logs.append((call.logits.float(), call.ids)))
        return _joined(logs)

    def _aggregated(self, outputs: Tensor) -> Tensor:
        """Outputs of the source's matrix -> what the present one should give; rows behind the experts' (shared experts)
        stay."""
        return torch.cat([merged_outputs(outputs, self._clusters), outputs[:, self._source_experts :]], 1)

    def _places(self) -> Tensor:
        """Expert of the source (and the id of a skipped slot) -> its place among the present ones, else `outputs`."""
        places = torch.full((self._source_experts + 1,), self.outputs)
        for place, cluster in enumerate(self._clusters):
            places[list(cluster)] = place
        return places

    def _matrix(self, weights: LayerWeights) -> Tensor:
        weight = materialise(weights.tensors[self.weight], torch.float32)
        if self.bias is None:
            return weight
        return torch.cat([weight, materialise(weights.tensors[self.bias], torch.float32)[:, None]], 1)

    def _extended(self, inputs: Tensor) -> Tensor:
        return inputs if self.bias is None else F.pad(inputs, (0, 1), value=1.0)

    def _visit(
        self, weights: LayerWeights, stream: Stream, sequences: Collection[int], see: Callable[[RouterCall], None]
    ) -> None:
        """Show `see` every call of the layer's router for these sequences; the experts do not run."""
        visit = _Visit(self._site, self.weight, sequences, see)
        run_layer(self._model, weights, self._run, stream, collector=visit, write=False, sequences=sequences)


def router_scores(
    model: StreamModel,
    run: TokenRun,
    sequences: Sequence[int],
    source: Callable[[int], LayerWeights],
    weights: Callable[[int], LayerWeights],
) -> dict[int, RouterScore]:
    """Every MoE layer's router against the original model's on these sequences, each behind its own model's layers.

    source, weights: layers of the original and of the compressed model, in the same basis. The streams of `run` stay
    as they are.
    """
    tokens = TokenSet("router-scores", run.tokens.ids[list(sequences)], {}, "")
    size = max(len(batch.rows) for batch in run.batches) * tokens.ids.shape[1]
    both: tuple[Stream, Stream] = ("original", "compressed")
    own = start_run(model, tokens, run.folder, batch_tokens=size, streams=both)
    found = {}
    for layer in model.facts.layers:
        made, logs = {both[0]: source(layer.index), both[1]: weights(layer.index)}, []
        for stream in both:
            collector = None
            if layer.site is not None:
                collector = Collector(model.facts_of(made[stream]).site, (), (), own.measured)
                logs.append(collector.log)
            run_layer(model, made[stream], own, stream, collector=collector)
        if logs:
            found[layer.index] = _compared(model, made["compressed"], logs[0].joined(), logs[1].joined())
    for stream in both:
        for generation in range(2):
            own.store(stream, generation).remove()
    return found


def _compared(
    model: StreamModel, weights: LayerWeights, original: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor]
) -> RouterScore:
    """Router logs (first output, choice) of the same tokens, the second with the experts of `weights`."""
    site = model.facts.layers[weights.index].site
    assert site is not None
    clusters = _clusters(model, weights)
    heads = torch.arange(site.num_experts + 1)
    for cluster in clusters:
        heads[list(cluster)] = cluster[0]
    heads[-1] = -1
    chosen = torch.tensor([*(cluster[0] for cluster in clusters), -1])[found[1]]
    kl = routing_divergence(original[0], found[0], model.facts.scoring, clusters)
    return RouterScore(kl, set_agreement(distinct(heads[original[1]]), chosen))


def _clusters(model: StreamModel, weights: LayerWeights) -> tuple[tuple[int, ...], ...]:
    """For every id that the layer's router gives, the numbers in the checkpoint of the experts that it stands for.

    Raises UnsupportedModel where several of fewer ids share an expert: nothing says which ones they were.
    """
    site = model.facts.layers[weights.index].site
    if weights.slots is None:
        return stands_for(weights)
    if site is None or weights.choices != site.num_experts:
        found = f"{weights.choices} of the router's ids share {len(weights.experts)} experts"
        raise UnsupportedModel(message(f"layer {weights.index} router", found, then="align before merging"))
    return tuple((number,) for number in range(site.num_experts))


class _Visit(Collector):
    """Watches the router alone."""

    def __init__(
        self, site: MoESite, weight: str, sequences: Collection[int], see: Callable[[RouterCall], None]
    ) -> None:
        super().__init__(site, (), measured=tuple(sequences))
        self.linears, self.see = (weight,), see

    def watch(self, batch: TokenBatch, experts: Experts | None = None) -> _Watch:
        return _Watch(self, batch, frozenset(), self._measured, experts)


class _Watch(BatchWatch):
    _owner: _Visit
    _inputs: Tensor

    def on_linear(self, name: str, inputs: Tensor) -> None:
        self._inputs = inputs.reshape(-1, inputs.shape[-1])

    def on_routing(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        keep = self._measure
        assert keep is not None and self._logits is not None
        self._owner.see(RouterCall(self._rows[keep], self._inputs[keep].float(), self._logits[keep], ids[keep].long()))
        raise Recorded


def _joined(logs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([logits for logits, _ in logs]), torch.cat([ids for _, ids in logs])


def _sequences(rows: Tensor, values: Tensor, length: int) -> tuple[list[int], Tensor]:
    """Numbers of the (whole) sequences in rows [n], and values [n, C] as [sequences, T, C]."""
    return (rows[::length] // length).tolist(), values.reshape(-1, length, values.shape[-1])


def _read_rows(store: HiddenStore, rows: Tensor) -> Tensor:
    """Values [n, C] of whole sequences by the rows of their tokens."""
    length = store.shape[1]
    return torch.cat([store.read(at, at + 1)[0] for at in (rows[::length] // length).tolist()])
