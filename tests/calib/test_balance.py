"""`balance` on real routing: counts against the model's own router, the rule on training rows, plants, policies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engine
import planted
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from moecompress.calib import SourceSpec, build_token_set
from moecompress.calib.balance import pool_routes
from moecompress.calib.options import AnswersOptions, Balance
from moecompress.calib.spec import Rows
from moecompress.calib.workshop import Workshop
from moecompress.errors import CalibrationError
from moecompress.stream.model import StreamModel, open_model

DEMO = Path(__file__).resolve().parents[1] / "checkpoints" / "bench-a"
LENGTH = 16


@pytest.fixture(scope="module")
def demo() -> StreamModel:
    return open_model(DEMO)


@pytest.fixture(scope="module")
def pool() -> Tensor:
    """Half of the rows repeat one token: their routing is narrow."""
    ids = engine.random_ids(24, LENGTH, vocabulary=4096)
    ids[::2] = ids[::2, :1]
    return ids


def own_routes(path: Path, ids: Tensor) -> Tensor:
    """int64 [N, L, E] by the model's own router."""
    made = []
    router = [layer.mlp.gate.weight.detach() for layer in engine.own_model(path).model.layers]
    for weight, inputs in zip(router, planted.router_inputs(path, ids), strict=True):
        top = (inputs @ weight.t()).topk(4).indices.view(ids.shape[0], -1)
        made.append(torch.nn.functional.one_hot(top, len(weight)).sum(1))
    return torch.stack(made, 1)


def build(model: StreamModel, ids: Tensor, folder: Path, samples: int = 6, **options: Any) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"ids": ids}, folder / "ids.safetensors")
    heldout = options.pop("heldout", 0.0)
    balance = Balance(**{"pool": ids.shape[0] / samples, **options})
    spec = SourceSpec(
        "tokens", (folder / "ids.safetensors",), samples=samples, length=LENGTH, heldout=heldout, balance=balance
    )
    workshop = Workshop(model, folder / "scratch", folder / "kept")
    size = model.facts.vocab_size
    return build_token_set("b", spec, None, vocab_size=size, cache_dir=folder / "kept", workshop=workshop)


def test_routes_of_the_pool_are_the_routers_and_only_selected_tokens_count(
    demo: StreamModel, pool: Tensor, tmp_path: Path
) -> None:
    workshop = Workshop(demo, tmp_path / "scratch", tmp_path / "kept")
    found = pool_routes(Rows(pool, {}), workshop)
    assert torch.equal(found, own_routes(DEMO, pool))
    assert not (tmp_path / "scratch" / "pool").exists()
    marks = torch.zeros_like(pool, dtype=torch.bool)
    marks[:, 3:5] = True
    part = pool_routes(Rows(pool, {}, marks), workshop)
    assert bool((part.sum(-1) == 2 * 4).all()) and bool((part <= found).all())


@pytest.mark.parametrize(("ratio", "heldout"), [(1.0, 0.0), (3.0, 0.0), (3.0, 0.25), (50.0, 0.0)])
def test_training_rows_follow_the_rule(
    ratio: float, heldout: float, demo: StreamModel, pool: Tensor, tmp_path: Path
) -> None:
    made = build(demo, pool, tmp_path, samples=8, ratio=ratio, heldout=heldout)
    wanted = -(-int(ratio * 4 * LENGTH) // 16)
    train = [row for row in range(len(made.ids)) if row not in made.heldout]
    assert len(made.heldout) == (2 if heldout else 0)
    apart = made.ids[list(made.heldout)]
    rest = torch.stack([row for row in pool if not any(torch.equal(row, other) for other in apart)])
    available, got = own_routes(DEMO, rest).sum(0), own_routes(DEMO, made.ids[train]).sum(0)
    assert bool((got >= available.clamp(max=wanted)).all())
    told = made.origin["balance"]
    assert told["rule_tokens"] == wanted and told["chosen"]["least_tokens"] == int(got.min())
    assert told["chosen"]["least_tokens"] >= told["drawn"]["least_tokens"]
    assert told["chosen"]["experts_with_enough"] == pytest.approx(float((got >= wanted).double().mean()))
    assert len(train) == told["rows"] >= 8 - len(made.heldout)
    if ratio == 50.0:
        assert len(train) == 24  # more than there is: every row that helps


def test_rows_stay_as_many_as_asked_without_grow_and_even_rows_are_more_even(
    demo: StreamModel, pool: Tensor, tmp_path: Path
) -> None:
    grown = build(demo, pool, tmp_path / "a", ratio=12.0)
    fixed = build(demo, pool, tmp_path / "b", ratio=12.0, grow=False)
    assert len(grown.ids) > 6 == len(fixed.ids)
    drawn = build(demo, pool, tmp_path / "c", ratio=0.01)
    even = build(demo, pool, tmp_path / "d", ratio=0.01, fill="even")
    sigmas = [one.origin["balance"]["chosen"]["sigma"] for one in (even, drawn)]
    assert sigmas[0] < sigmas[1] and len(even.ids) == len(drawn.ids) == 6
    assert torch.equal(build(demo, pool, tmp_path / "e", ratio=12.0).ids, grown.ids)


def test_a_planted_expert_is_found_or_missed_out_loud(tmp_path: Path) -> None:
    """Of 256 tokens two go to the new expert: the rows that hold them are chosen. In later layers it gets none."""
    ids = engine.random_ids(4, 64, vocabulary=4096)
    rare = open_model(planted.routed_expert(DEMO, tmp_path / "rare", ids, [70, 200]))
    counts = pool_routes(Rows(ids, {}), Workshop(rare, tmp_path / "scratch"))
    assert counts[:, 0, 16].tolist() == [0, 1, 0, 1]
    save_file({"ids": ids}, tmp_path / "ids.safetensors")

    def choose(**options: Any) -> Any:
        spec = SourceSpec(
            "tokens",
            (tmp_path / "ids.safetensors",),
            samples=2,
            length=64,
            heldout=0,
            balance=Balance(pool=2.0, ratio=0.1, **options),
        )
        workshop = Workshop(rare, tmp_path / "scratch", tmp_path / "kept")
        return build_token_set("b", spec, None, vocab_size=4096, cache_dir=None, workshop=workshop)

    made = choose()
    for row in (ids[1], ids[3]):
        assert any(torch.equal(row, chosen) for chosen in made.ids)
    rare = open_model(planted.routed_expert(DEMO, tmp_path / "never", ids))
    told = choose().origin["balance"]
    assert told["chosen"]["least_tokens"] == 0 and told["chosen"]["experts_with_enough"] == 1 - 4 / 68
    with pytest.raises(
        CalibrationError, match=r"4 of 68 experts.*MoE layer 0 expert 16: 0 \(pool: 0\).*coverage 0.9412"
    ):
        choose(short="error")
    choose(short="error", coverage=0.94)


def test_what_balance_needs_is_said(pool: Tensor, tmp_path: Path) -> None:
    spec = SourceSpec("tokens", (tmp_path / "x",), samples=4, length=LENGTH, balance=Balance())
    with pytest.raises(CalibrationError, match="needs the model"):
        build_token_set("b", spec, None, vocab_size=9, cache_dir=None)
    with pytest.raises(CalibrationError, match="24 sequences of 16.*asked for: 48"):
        build(open_model(DEMO), pool, tmp_path, samples=12, pool=4)


def test_a_recipe_balances_any_source_and_reports_it(
    pool: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.reload_here(monkeypatch)
    save_file({"ids": pool}, tmp_path / "ids.safetensors")
    calibration = {
        "source": "tokens",
        "files": [str(tmp_path / "ids.safetensors")],
        "samples": 8,
        "length": LENGTH,
        "balance": {"pool": 3.0, "ratio": 3.0},
    }
    recipe = engine.write_recipe(tmp_path, DEMO, [{"prune.reap": {"keep": 12}}], calibration=calibration)
    ran = engine.command("run", recipe)
    assert ran.code == 0, ran.err
    report = engine.read_json(tmp_path / "out" / "moecompress" / "report.json")["calibration"][0]
    assert report["origin"]["balance"]["pool"] == 24 and report["samples"] >= 8
    resolved = (tmp_path / "out" / "moecompress" / "recipe.yaml").read_text()
    assert "ratio: 3.0" in resolved


def test_rows_of_conversations_keep_their_masks(demo: StreamModel, tmp_path: Path) -> None:
    from moecompress.calib import load_tokenizer

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("<|endoftext|>\n".join(f"Once upon a time {i}\n" for i in range(30)))
    options = AnswersOptions(files=(str(prompts),), max_tokens=24, select="reply")
    spec = SourceSpec("answers", samples=8, length=12, options=options, balance=Balance(pool=2.0, ratio=3.0))
    workshop = Workshop(demo, tmp_path / "scratch", tmp_path / "kept")
    made = build_token_set("b", spec, load_tokenizer(DEMO), vocab_size=4096, cache_dir=None, workshop=workshop)
    assert made.selected is not None and made.selected.shape == made.ids.shape
    train = [row for row in range(len(made.ids)) if row not in made.heldout]
    counts = pool_routes(Rows(made.ids[train], {}, made.selected[train]), workshop).sum(0)
    assert made.origin["balance"]["chosen"]["least_tokens"] == int(counts.min())
