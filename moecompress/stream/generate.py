"""Generation: rows of tokens that grow together, one token per call, with the routing of every new token observed.

The model's own forward runs with its own cache. Where the weights are is the only difference between the generators:
`self` keeps all layers in memory as they are stored, `rtn4` keeps their experts as 4-bit codes, `streamed` reads one
layer at a time and keeps its cache on disk in between. Families whose cached forward differs from the full one (see
`quirks.RECOMPUTED`) are run from the first token every time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moecompress.arch.quirks import RECOMPUTED
from moecompress.errors import UnsupportedModel, message
from moecompress.stream.coded import rtn4
from moecompress.stream.layers import experts_of, filled_layer
from moecompress.stream.model import StreamModel
from moecompress.stream.outer import outer_weights
from moecompress.stream.parking import Parking
from moecompress.stream.prelude import replaced_layers
from moecompress.types import Generator, LayerWeights


@dataclass(frozen=True)
class Grown:
    """What one call gave. logprobs: float32 [R, V], log P of the token after each row.

    routed: int64 [L, R, t, K], the experts that the t new tokens of every row chose in each MoE layer (E = skipped).
    """

    logprobs: Tensor
    routed: Tensor


class Growing:
    """Rows of tokens and the state to extend them. Made by `growing`."""

    def __init__(self, model: StreamModel, parking: Parking | None) -> None:
        self._model, self._parking = model, parking
        self._cached = model.facts.model_type not in RECOMPUTED
        self._taps = {layer.index: _Routing() for layer in model.facts.moe_layers}
        self._cache: Any = None
        self.ids = torch.empty(0, 0, dtype=torch.int64)

    def begin(self, ids: Tensor) -> Grown:
        """Forget everything and run ids int64 [R, T], T >= 1."""
        self.ids, self._cache = ids, None
        if self._parking is not None:
            self._parking.clear()
        return self._run(ids)

    def extend(self, parents: Tensor, tokens: Tensor) -> Grown:
        """New row i is row parents[i] and tokens[i] behind it. int64 [R'] both; a parent may be named any number of
        times, or never."""
        still = parents.shape[0] == self.ids.shape[0] and torch.equal(parents, torch.arange(parents.shape[0]))
        self.ids = torch.cat([self.ids[parents], tokens[:, None]], 1)
        if self._cache is not None and not still:
            if self._parking is None:
                self._cache.reorder_cache(parents)
            else:
                self._parking.reorder(parents)
        return self._run(tokens[:, None])

    @property
    def saves(self) -> bool:
        """Whether the state is on disk, so that `save` and `restore` can be used."""
        return self._parking is not None

    def save(self, note: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep rows, cache and `tensors` on disk under the name `note`. The step after it leaves them whole, the second
        one does not: save after every step."""
        assert self._parking is not None
        self._parking.save(note, {**tensors, "ids": self.ids})

    def restore(self, note: str) -> dict[str, Tensor] | None:
        """Go on from the last `save` in the same folder and return its tensors; None where it was not under `note`."""
        assert self._parking is not None
        tensors = self._parking.load(note)
        if tensors is None:
            return None
        ids = tensors.pop("ids")
        self.begin(ids[:, :1])  # makes a cache of the right kind; its contents are replaced
        self._parking.adopt()
        self.ids = ids
        return tensors

    def _run(self, fresh: Tensor) -> Grown:
        seen = fresh if self._cached else self.ids
        options = {"past_key_values": self._cache} if self._cache is not None else {}
        with torch.no_grad(), ExitStack() as stack:
            for index, tap in self._taps.items():
                stack.enter_context(self._tapped(index, tap))
            stack.enter_context(_last_position(self._model.skeleton))
            if self._parking is not None:
                stack.enter_context(replaced_layers(self._model.layers, self._lazily))
            out = self._model.skeleton(input_ids=seen, use_cache=self._cached, **options)
        if self._cached:
            self._cache = out.past_key_values
        rows, new = fresh.shape
        routed = [tap.ids.reshape(rows, seen.shape[1], -1)[:, -new:] for tap in self._taps.values()]
        return Grown(out.logits[:, -1].float().log_softmax(-1), torch.stack(routed))

    @contextmanager
    def _tapped(self, index: int, tap: _Routing) -> Iterator[None]:
        layer = self._model.layers[index]
        site = self._model.facts.layers[index].site
        assert site is not None
        experts = experts_of(layer, site.experts)
        experts.observer = tap
        try:
            yield
        finally:
            experts.observer = None

    def _lazily(self, index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            assert self._parking is not None
            weights = self._model.read_layer(index)
            with filled_layer(self._model, weights) as layer, self._parking.present(index, kwargs.values()):
                return type(layer).forward(layer, *args, **kwargs)

        return forward


class _Routing:
    """An observer that keeps the ids of the last call."""

    ids: Tensor

    def on_routing(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        self.ids = ids

    def on_expert(self, *_: Any) -> None:
        pass


@contextmanager
def growing(model: StreamModel, generator: Generator, folder: Path) -> Iterator[Growing]:
    """Within the context the model can generate. folder: where `streamed` keeps its cache; it must not be shared.

    Raises UnsupportedModel where layers have different numbers of experts.
    """
    sizes = {(layer.site.num_experts, layer.site.top_k) for layer in model.facts.moe_layers if layer.site is not None}
    if len(sizes) != 1:
        found = f"layers with (experts, experts per token) {sorted(sizes)}"
        raise UnsupportedModel(message(f"model type '{model.facts.model_type}'", found, "equal ones, to generate"))
    with ExitStack() as stack:
        stack.enter_context(outer_weights(model.skeleton, model.layers_name, model.read_outer))
        if generator != "streamed":
            for index in range(len(model.layers)):
                stack.enter_context(filled_layer(model, _kept(model, generator, index)))
        yield Growing(model, Parking(folder, len(model.layers)) if generator == "streamed" else None)


def _kept(model: StreamModel, generator: Generator, index: int) -> LayerWeights:
    weights = model.read_layer(index)
    return weights.with_experts(rtn4(weights.experts)) if generator == "rtn4" and weights.experts else weights


@contextmanager
def _last_position(model: Any) -> Iterator[None]:
    """Within the context logits are made for the last position only."""
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(lambda _module, args: (args[0][..., -1:, :], *args[1:]))
    try:
        yield
    finally:
        handle.remove()
