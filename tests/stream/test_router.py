"""The router of every family beside the original one: the right matrix, its real inputs, exact targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engine
import families
import layers
import pytest
import torch
from torch import Tensor

from moecompress.errors import CalibrationError
from moecompress.numerics.routing import routing_probabilities
from moecompress.stats.base import RouterObservation
from moecompress.stats.routers import RouterMoments, RouterSample
from moecompress.stream.collect import Collector
from moecompress.stream.model import open_model
from moecompress.stream.router import RouterView
from moecompress.stream.streams import run_layer

IDS = engine.random_ids(9, 12)
UNSCORED = {
    "phimoe": "sparsemixer masks all experts but those near the largest",
    "gemma4_text": "every expert has a factor of its own after the scoring",
}


def at_last_site(model_type: str, folder: Path) -> layers.AtLayer:
    path = families.save_tiny(model_type, folder / "model", torch.float32)
    return layers.at_layer(path, IDS, folder, index=open_model(path).facts.moe_layers[-1].index, batch_tokens=40)


def view(at: layers.AtLayer) -> RouterView:
    return RouterView(at.model, at.run, "compressed", at.weights)


class Spy(RouterMoments):
    """Keeps what it is shown."""

    def observe_router(self, state: Any, seen: RouterObservation) -> None:
        super().observe_router(state, seen)
        kept.append(seen)


kept: list[RouterObservation] = []


@pytest.mark.parametrize("model_type", engine.STREAMED)
def test_matrix_inputs_and_targets_of_every_family(model_type: str, tmp_path: Path) -> None:
    """On equal streams the given outputs are the wanted ones, bit for bit, and both are what the router itself makes
    its choice from; the family's scoring makes its weights of them."""
    at = at_last_site(model_type, tmp_path)
    site = at.model.facts.layers[at.index].site
    assert site is not None
    found = view(at)
    kept.clear()
    sums = found.collect(Spy(found.columns, (0, found.outputs)))
    assert not bool(sums["residual"].any()) and int(sums["tokens"].min()) == 12 * len(found.learn) > 0
    assert found.score({}).agreement == 1.0 and found.score({}).kl == 0.0
    log = Collector(site, (), measured=found.learn)
    run_layer(at.model, at.weights, at.run, "original", collector=log, write=False)
    logits, ids = log.log.joined()
    given = torch.cat([seen.given for seen in kept])[:, : site.num_experts]
    made = given.softmax(-1) if at.model.facts.scoring == "probabilities" else given
    torch.testing.assert_close(logits, made, rtol=1e-5, atol=1e-6)
    assert torch.equal(torch.cat([seen.chosen for seen in kept]).sort(1).values, ids.sort(1).values)


@pytest.mark.parametrize("model_type", [name for name in engine.STREAMED if name not in UNSCORED])
def test_the_scoring_of_every_family_is_the_one_its_weights_show(model_type: str, tmp_path: Path) -> None:
    """Two chosen experts' routing weights stand in the ratio of their probabilities, normalised or not."""
    at = at_last_site(model_type, tmp_path)
    site = at.model.facts.layers[at.index].site
    assert site is not None
    seen: list[tuple[Tensor, Tensor]] = []
    collector = Collector(site, (), measured=at.run.measured)
    watch = collector.watch

    def watched(batch: Any, experts: Any = None) -> Any:
        made = watch(batch, experts)
        routing = made.on_routing
        made.on_routing = lambda hidden, ids, weights: (  # type: ignore[method-assign]
            seen.append((ids, weights)),
            routing(hidden, ids, weights),
        )[1]
        return made

    collector.watch = watched  # type: ignore[method-assign]
    run_layer(at.model, at.weights, at.run, "original", collector=collector, write=False)
    ids, weights = (torch.cat(values) for values in zip(*seen, strict=True))
    chances = routing_probabilities(collector.log.joined()[0], at.model.facts.scoring).gather(1, ids)
    torch.testing.assert_close(
        (weights[:, 0] / weights[:, 1]).double(), chances[:, 0] / chances[:, 1], rtol=1e-4, atol=0
    )


def test_batches_do_not_matter(tmp_path: Path) -> None:
    path = families.save_tiny("deepseek_v3", tmp_path / "model", torch.float32)
    sums = []
    for size in (12, 40, 1000):
        at = layers.at_layer(path, IDS, tmp_path / str(size), index=2, batch_tokens=size)
        noisy = at.run.store("compressed", 2)
        noisy.write(0, noisy.read(0, 9) + torch.randn(9, 12, 64, generator=torch.Generator().manual_seed(0)))
        found = view(at)
        sums.append(found.collect(RouterMoments(found.columns, (0, 8))))
        sample = found.collect(RouterSample(20, found.columns, 8))
        assert sample["rows"].shape == (20,) and not set((sample["rows"] // 12).tolist()) & set(found.judge)
    for other in sums[1:]:
        for key, value in sums[0].items():
            torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-3)


def test_who_judges_is_not_learned_from(tmp_path: Path) -> None:
    path = families.save_tiny("qwen3_moe", tmp_path / "model", torch.float32)
    at = layers.at_layer(path, IDS, tmp_path, index=1)
    found = view(at)
    assert found.judge == (0, 8) and found.learn == tuple(range(1, 8)) and not found.heldout
    model = at.model
    run = engine.token_run(model, IDS, tmp_path / "held", heldout=0.3, streams=("original", "compressed"))
    held = RouterView(model, run, "compressed", model.read_layer(0))
    assert held.heldout and held.judge == run.tokens.heldout and set(held.learn) == set(range(9)) - set(held.judge)
    one = engine.token_run(model, IDS[:1], tmp_path / "one", streams=("original", "compressed"))
    with pytest.raises(CalibrationError, match="1 calibration sequences, all of them for judging"):
        RouterView(model, one, "compressed", model.read_layer(0))


def test_the_stored_dtype_is_the_sources(tmp_path: Path) -> None:
    path = families.save_tiny("gpt_oss", tmp_path / "model", torch.bfloat16)
    at = layers.at_layer(path, IDS, tmp_path, index=1)
    found = view(at)
    made = found.tensors(found.matrix + 0.001)
    assert {name: (value.dtype, tuple(value.shape)) for name, value in made.items()} == {
        "mlp.router.weight": (torch.bfloat16, (8, 64)),
        "mlp.router.bias": (torch.bfloat16, (8,)),
    }
