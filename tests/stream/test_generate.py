"""Generation with a cache against the model's own full forward on every prefix: all families, all generators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engine
import families
import pytest
import torch
from torch import Tensor

from moecompress.arch.quirks import UNPARKED
from moecompress.numerics.grids import dequantize, find_grid, quantize
from moecompress.stream.coded import rtn4
from moecompress.stream.generate import growing
from moecompress.stream.model import open_model
from moecompress.types import PROJECTIONS, Scheme

PARENTS = torch.tensor([1, 0, 0])


def prefix_logprobs(own: Any, ids: Tensor, start: int) -> list[Tensor]:
    """log P [R, V] after ids[:, :t] for t = start .. T, each by a forward of its own."""
    with torch.no_grad():
        made = [
            own(input_ids=ids[:, :t], use_cache=False).logits[:, -1].float() for t in range(start, ids.shape[1] + 1)
        ]
    return [logits.log_softmax(-1) for logits in made]


@pytest.mark.parametrize("family", engine.STREAMED)
def test_every_family_grows_as_its_own_forward_says(family: str, tmp_path: Path) -> None:
    """Longer than the sliding windows and sparse indices of the tiny models (16 and 8)."""
    path = families.save_tiny(family, tmp_path / "model")
    model = open_model(path)
    ids = engine.random_ids(2, 18)
    grown_ids = ids[PARENTS]
    grown_ids[2, 15] = 5
    want = prefix_logprobs(engine.own_model(path), grown_ids, 15)
    generators = ["self"] if family in UNPARKED else ["self", "streamed"]
    for generator in generators:
        with growing(model, generator, tmp_path / generator) as grow:  # type: ignore[arg-type]
            first = grow.begin(ids[:, :15])
            assert first.routed.shape[:3] == (len(model.facts.moe_layers), 2, 15)
            found = [first.logprobs[PARENTS]]
            for t in range(15, 18):
                same = torch.arange(3)
                found.append(grow.extend(PARENTS if t == 15 else same, grown_ids[:, t]).logprobs)
            assert torch.equal(grow.ids, grown_ids)
        worst = max(float((a - b).abs().max()) for a, b in zip(found, want, strict=True))
        assert worst < 1e-3, f"{family} {generator}"


def test_routing_of_new_tokens_is_the_routers_choice(tmp_path: Path) -> None:
    path = families.save_tiny("mixtral", tmp_path / "model", dtype=torch.float32)
    own, ids, chosen = engine.own_model(path), engine.random_ids(2, 6), []
    for layer in own.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda _m, args: chosen.append(args[1].reshape(2, 6, -1)))
    with torch.no_grad():
        own(input_ids=ids, use_cache=False)
    with growing(open_model(path), "self", tmp_path) as grow:
        first = grow.begin(ids[:, :4])
        after = [grow.extend(torch.arange(2), ids[:, t]).routed for t in (4, 5)]
    assert torch.equal(torch.cat([first.routed, *after], 2), torch.stack(chosen))


def test_rtn4_keeps_experts_as_rounded_4_bit_codes(tmp_path: Path) -> None:
    model = open_model(families.save_tiny("qwen3_moe", tmp_path / "model"))
    experts = model.read_layer(1).experts
    coded = rtn4(experts)
    assert len(coded) == len(experts) and coded.nbytes * 3 < sum(
        2 * (e.gate_up.numel() + e.down.numel()) for e in experts
    )  # type: ignore[union-attr]
    scheme = Scheme(4, 32)
    for before, after in zip(experts, coded, strict=True):
        for name in PROJECTIONS:
            dense: Any = before.projection(name)
            want = quantize(dense, find_grid(dense, scheme, "minmax", torch.bfloat16), scheme)
            found: Any = after.projection(name)
            assert torch.equal(dequantize(found, torch.float32), dequantize(want, torch.float32))
    ids = engine.random_ids(2, 5)
    with growing(model, "self", tmp_path) as grow:
        exact = grow.begin(ids).logprobs
    with growing(model, "rtn4", tmp_path) as grow:
        rounded = grow.begin(ids).logprobs
    assert 0 < float((exact - rounded).abs().mean()) < 0.5  # near, and not the same


def test_a_saved_cache_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Also when the stopped process had done the step after the saved one, which writes the other files."""
    ids = engine.random_ids(3, 12)
    for family in ("qwen3_moe", "jamba", "deepseek_v4"):
        model = open_model(families.save_tiny(family, tmp_path / family))
        folder = tmp_path / f"{family}-cache"
        with growing(model, "streamed", folder) as grow:
            assert grow.restore("a") is None
            grow.begin(ids[:, :8])
            grow.extend(torch.tensor([2, 0, 1]), ids[:, 8])
            grow.save("a", {"x": ids})
            want = grow.extend(torch.tensor([1, 1]), ids[:2, 9]).logprobs
        for _ in range(2):
            with growing(model, "streamed", folder) as grow:
                assert grow.restore("b") is None
                kept = grow.restore("a")
                assert kept is not None and torch.equal(kept["x"], ids) and grow.ids.shape == (3, 9)
                found = grow.extend(torch.tensor([1, 1]), ids[:2, 9]).logprobs
                assert torch.equal(found, want), family
