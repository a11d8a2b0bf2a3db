"""EASY-EP on several domains: every domain counts alike, and demonstrations are the model's own answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import engine
import planted
import pytest
import torch
from layers import at_layer
from pruned import execute
from safetensors.torch import save_file

from moecompress.stats.routing import RoutingCounts


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    engine.reload_here(monkeypatch)


def importance(out: Path) -> torch.Tensor:
    rows = engine.read_json(out / "moecompress" / "report.json")["layers"]
    return torch.tensor([[e["importance"] for e in row["experts"]] for row in rows], dtype=torch.float64)


def sets(folder: Path, **wanted: Any) -> dict[str, Any]:
    made = {}
    for name, ids in wanted.items():
        save_file({"ids": ids.int()}, folder / f"{name}.safetensors")
        tokens = {"source": "tokens", "files": [str(folder / f"{name}.safetensors")], "heldout": 0}
        made[name] = {**tokens, "samples": ids.shape[0], "length": ids.shape[1]}
    return made


@pytest.mark.parametrize("counts", ["uniform", "global"])
def test_domains_are_normed_and_averaged(counts: str, tmp_path: Path, bench_a: Path) -> None:
    few, many = engine.random_ids(1, 32, 0, vocabulary=400), engine.random_ids(5, 32, 1, vocabulary=4000)
    known = sets(tmp_path, few=few, many=many)
    step = {"keep": 0.5, "counts": counts}
    alone = [
        importance(
            execute(tmp_path / name, bench_a, [{"prune.easy_ep": {**step, "calibration": name}}], calibration=known)
        )
        for name in known
    ]
    both = {**step, "calibration": ["few", "many"]}
    mixed = importance(execute(tmp_path / "mixed", bench_a, [{"prune.easy_ep": both}], calibration=known))
    wanted = sum(score / score.sum(1, keepdim=True) for score in alone) / 2
    torch.testing.assert_close(mixed, torch.as_tensor(wanted))


def test_a_super_expert_of_one_domain_stays(tmp_path: Path, bench_a: Path) -> None:
    """An expert that only the second domain sends over the bar is kept whatever the mean says, and told."""
    few, many = engine.random_ids(1, 8, 0, vocabulary=100), engine.random_ids(4, 32, 1, vocabulary=4000)
    known = sets(tmp_path, few=few, many=many)
    few_use, many_use = (
        at_layer(bench_a, ids, tmp_path / name, 2).collect((RoutingCounts(),))["routing_counts"]["tokens"]
        for name, ids in (("a", few), ("b", many))
    )
    unseen = int(((few_use == 0) & (many_use > 0)).nonzero()[0])
    source = planted.scaled_expert(bench_a, tmp_path / "planted", 2, unseen, 200.0)
    step = {"keep": 0.5, "calibration": ["few", "many"]}
    out = execute(tmp_path / "both", source, [{"prune.easy_ep": step}], calibration=known)
    row = engine.read_json(out / "moecompress" / "report.json")["layers"][2]["experts"][unseen]
    assert row["protected"] == "super expert"
    assert f"| 2 | {unseen} (super expert)" in (out / "moecompress" / "report.md").read_text()


def test_names_of_sets_are_checked(tmp_path: Path, bench_a: Path) -> None:
    known = sets(tmp_path, few=engine.random_ids(1, 32))
    passes = [{"prune.easy_ep": {"calibration": ["few", "man"]}}]
    done = engine.command("plan", engine.write_recipe(tmp_path, bench_a, passes, calibration=known))
    assert done.code == 2 and "'man' is no calibration set" in done.out + done.err


def test_demonstrations_are_the_models_own_answers(tmp_path: Path, bench_a: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"text": f"In the year {year} the town"}) + "\n" for year in range(1900, 1940))
    )
    spec = {"source": "answers", "files": [str(prompts)], "samples": 2, "length": 32, "max_tokens": 16, "heldout": 0}
    out = execute(tmp_path, bench_a, [{"prune.easy_ep": {"keep": 0.5}}], calibration=spec)
    origin = engine.read_json(out / "moecompress" / "report.json")["calibration"][0]["origin"]
    assert origin["source"] == "answers" and bool((importance(out) > 0).any(1).all())
