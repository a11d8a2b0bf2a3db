"""The Fisher diagonal of layer outputs against one ordinary backward pass through the whole model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine
import families
import torch
from torch import Tensor

from moecompress.calib.sources import resolve_text
from moecompress.calib.tokenizer import load_tokenizer
from moecompress.calib.tokens import windows
from moecompress.numerics.grids import round_to_nearest
from moecompress.stream.divergence import layer_divergence
from moecompress.stream.fisher import output_fisher
from moecompress.stream.layers import call_layer, filled_layer
from moecompress.stream.model import StreamModel, open_model
from moecompress.stream.outer import outer_weights
from moecompress.stream.prelude import record
from moecompress.types import PROJECTIONS, LayerWeights, Scheme


def test_equal_to_autograd_through_the_whole_model(tmp_path: Path) -> None:
    path = families.save_tiny("qwen3_moe", tmp_path / "model", torch.float32)
    ids = engine.random_ids(3, 10)
    model = open_model(path)
    found = output_fisher(model, model.read_layer, ids, torch.Generator().manual_seed(5), batch_tokens=20)

    whole = engine.own_model(path)
    kept: list[Tensor] = []

    def keep(_module: Any, _args: Any, out: Any) -> None:
        value = out[0] if isinstance(out, tuple) else out
        value.retain_grad()
        kept.append(value)

    for layer in whole.model.layers:
        layer.register_forward_hook(keep)
    generator = torch.Generator().manual_seed(5)
    sums = [torch.zeros(model.facts.hidden_size) for _ in whole.model.layers]
    for row in ids:
        kept.clear()
        scores = whole(input_ids=row[None], use_cache=False).logits[0].log_softmax(-1)
        drawn = torch.multinomial(scores.detach().exp(), 1, generator=generator)
        (-scores.gather(1, drawn).sum()).backward()
        for total, value in zip(sums, kept, strict=True):
            assert value.grad is not None
            total += value.grad[0].square().sum(0)
    assert sorted(found) == [layer.index for layer in model.facts.moe_layers]
    for index, values in found.items():
        assert engine.difference(values, sums[index] / ids.numel()) < 1e-3


def test_weighted_errors_rank_what_rounding_an_expert_does_to_the_predictions(bench_a: Path) -> None:
    """One expert of one layer rounded to 2 bits at a time: half the weighted squared error against the measured KL."""
    model, ids = open_model(bench_a), real_text(bench_a)
    fisher = output_fisher(model, model.read_layer, ids, torch.Generator().manual_seed(0))
    measured, weighted, plain = [], [], []
    for expert in range(0, 16, 2):

        def changed(weights: LayerWeights, expert: int = expert) -> LayerWeights:
            experts = list(weights.experts)
            for name in PROJECTIONS:
                made = round_to_nearest(experts[expert].projection(name).float(), Scheme(2, 32), grid="mse")  # type: ignore[union-attr]
                experts[expert] = experts[expert].with_projection(name, made)
            return weights.with_experts(tuple(experts))

        divergence = layer_divergence(model, model.read_layer, changed, ids)
        squares = changed_outputs(model, changed, ids)
        for layer, kl in divergence.items():
            measured.append(kl)
            weighted.append(0.5 * float(squares[layer] @ fisher[layer].double()))
            plain.append(float(squares[layer].sum()))
    assert rank_correlation(weighted, measured) > 0.9 > rank_correlation(plain, measured)
    assert 0.5 < sum(weighted) / sum(measured) < 2  # nats, not only an order


def real_text(path: Path) -> Tensor:
    """int64 [8, 64] of the standard library."""
    tokenizer: Any = load_tokenizer(path)
    text = resolve_text("python-stdlib:heldout")[:40_000]
    return windows(torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]), 64, 8)


def changed_outputs(
    model: StreamModel, changed: Callable[[LayerWeights], LayerWeights], ids: Tensor
) -> dict[int, Tensor]:
    """Mean over tokens of the squared change of every element of a layer's output, layer by layer: float64 [H]."""
    found = {}
    with torch.no_grad(), outer_weights(model.skeleton, model.layers_name, model.read_outer):
        hidden, calls = record(model.skeleton, model.layers, ids)
        for index, call in enumerate(calls):
            weights = model.read_layer(index)
            with filled_layer(model, changed(weights)) as layer:
                other = call_layer(layer, hidden, call)
            with filled_layer(model, weights) as layer:
                hidden = call_layer(layer, hidden, call)
            found[index] = (other - hidden).double().square().flatten(0, 1).mean(0)
    return found


def rank_correlation(first: list[float], second: list[float]) -> float:
    """Spearman's."""
    ranks = torch.stack([torch.tensor(values).argsort().argsort().double() for values in (first, second)])
    return float(torch.corrcoef(ranks)[0, 1])
