"""What the plan says about generating: time, memory and families that cannot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import engine
import families
import pytest
import torch

from moecompress.calib import SourceSpec
from moecompress.calib.balance import pool_rows
from moecompress.calib.estimate import all_costs, generation_cost, generation_problems
from moecompress.calib.options import AnswersOptions, Balance
from moecompress.stream.generate import growing
from moecompress.stream.model import StreamModel, open_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> StreamModel:
    return open_model(families.save_tiny("qwen3_moe", tmp_path_factory.mktemp("estimate") / "model"))


def spec(samples: int = 8, **options: Any) -> SourceSpec:
    return SourceSpec("answers", samples=samples, length=16, options=AnswersOptions(files=("p.txt",), **options))


def test_more_than_twelve_hours_needs_force(model: StreamModel) -> None:
    def slow(force: bool) -> list[str]:
        return generation_problems(spec(10**9, batch=64, generator="streamed", force=force), model, "set 'a'")

    (problem,) = slow(force=False)
    assert "set 'a': generating takes about" in problem and "12 h 00 min" in problem and "force: true" in problem
    assert not slow(force=True)
    assert not generation_problems(spec(), model, "set 'a'")
    assert generation_cost(SourceSpec("text"), model) is None


def test_what_does_not_fit_into_memory_is_refused(model: StreamModel) -> None:
    (problem,) = generation_problems(spec(10**9, batch=10**9, force=True), model, "a")
    assert "GiB" in problem and "rtn4" in problem


def test_costs_follow_the_generator(model: StreamModel) -> None:
    costs = {name: generation_cost(spec(generator=name), model) for name in ("self", "rtn4", "streamed")}
    own, coded, streamed = (cost for cost in costs.values() if cost is not None)
    name = "generating: experts"
    assert streamed.parts[name] < own.parts[name] and coded.parts[name] < own.parts[name]
    assert own.disk_bytes == 0 < streamed.disk_bytes
    with growing(model, "self", Path("unused")) as grow:  # the bytes a token leaves in this model's cache are known
        grow.begin(engine.random_ids(1, 10))
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in grow._cache.layers)
    assert streamed.disk_bytes == 2 * held // 10 * 256  # one conversation of max_tokens, two generations of files


def test_families_that_cannot_are_refused_with_the_reason(tmp_path: Path) -> None:
    odd = open_model(families.save_tiny("qwen4_exp_text", tmp_path / "model"))
    (problem,) = generation_problems(spec(generator="streamed"), odd, "a")
    assert "positions" in problem and "rtn4" in problem
    assert not generation_problems(spec(), odd, "a")


def test_layers_of_different_widths_are_refused(model: StreamModel) -> None:
    layers = list(model.facts.layers)
    site = layers[0].site
    assert site is not None
    layers[0] = replace(layers[0], site=replace(site, num_experts=4))
    uneven = replace(model, facts=replace(model.facts, layers=tuple(layers)))
    (problem,) = generation_problems(spec(), uneven, "a")
    assert "[(4, 2), (8, 2)]" in problem


def test_a_pool_costs_what_all_its_rows_cost(model: StreamModel) -> None:
    plain, pooled = spec(generator="streamed"), replace(spec(generator="streamed"), balance=Balance(pool=32.0))
    (one,), (generated, routed) = all_costs(plain, model), all_costs(pooled, model)
    assert generated.disk_bytes > one.disk_bytes and generated.seconds > one.seconds and routed.seconds > 0
    text = SourceSpec("text", samples=8, length=16, balance=Balance(pool=2.5))
    assert pool_rows(text) == 20 and len(all_costs(text, model)) == 1


def test_the_plan_counts_generating(tmp_path: Path) -> None:
    path = families.save_tiny("qwen3_moe", tmp_path / "model", dtype=torch.float32)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hello")
    base = {"source": "answers", "files": [str(prompts)], "samples": 10**8, "max_tokens": 100, "generator": "streamed"}
    refused = engine.command("plan", engine.write_recipe(tmp_path, path, calibration=base))
    assert refused.code == 2 and "generating takes about" in refused.err + refused.out
    absent = engine.command("plan", engine.write_recipe(tmp_path, path, calibration={**base, "files": ["no.txt"]}))
    assert absent.code == 2 and "no.txt does not exist" in absent.err + absent.out
