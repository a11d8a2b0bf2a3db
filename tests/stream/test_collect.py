"""What is seen of a layer's routing is what transformers' own modules do, token for token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engine
import families
import pytest
import torch
from torch import Tensor

from moecompress.stats.base import Statistic
from moecompress.stats.moments import ExpertHessian, InputMoments
from moecompress.stats.routing import RoutingCounts, TokenSample
from moecompress.stream.collect import Collector
from moecompress.stream.model import StreamModel, open_model
from moecompress.stream.streams import TokenRun, run_layer
from moecompress.types import LayerWeights, MoESite

FAMILIES = (
    "qwen3_moe qwen2_moe olmoe mixtral deepseek_v2 deepseek_v3 gpt_oss gemma4_text nemotron_h ernie4_5_moe granitemoe"
).split()
IDS = engine.random_ids(9, 12)


def last_site(model: StreamModel) -> tuple[int, MoESite]:
    facts = model.facts.moe_layers[-1]
    assert facts.site is not None
    return facts.index, facts.site


def observed(path: Path, layer: str, site: MoESite) -> dict[str, Tensor]:
    """What goes into transformers' own experts module and comes out of its router, by hooks: rows in order of IDS."""
    model = engine.own_model(path)
    seen: dict[str, list[Tensor]] = {"hidden": [], "ids": [], "weights": [], "logits": []}
    experts, router = model.get_submodule(f"{layer}.{site.experts}"), model.get_submodule(f"{layer}.{site.router}")

    def at_experts(_: Any, args: tuple[Tensor, ...]) -> None:
        for key, value in zip(("hidden", "ids", "weights"), args, strict=True):
            seen[key].append(value)

    def at_router(_: Any, __: Any, out: Any) -> None:
        seen["logits"].append((out[0] if isinstance(out, tuple) else out).reshape(-1, site.num_experts))

    experts.register_forward_pre_hook(at_experts)
    router.register_forward_hook(at_router)
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    return {key: torch.cat(values) for key, values in seen.items()}


def collect(
    model: StreamModel,
    folder: Path,
    statistics: tuple[Statistic, ...],
    heldout: float = 0.25,
    batch_tokens: int = 40,
    measure: bool = True,
) -> tuple[Collector, TokenRun]:
    index, site = last_site(model)
    run = engine.token_run(
        model, IDS, folder / f"hidden-{batch_tokens}-{heldout}", batch_tokens=batch_tokens, heldout=heldout
    )
    engine.through_layers(model, run, index)
    collector = Collector(site, statistics, run.tokens.heldout, run.measured if measure else None)
    run_layer(model, model.read_layer(index), run, "original", collector=collector, write=False)
    return collector, run


def rows_of(sequences: tuple[int, ...]) -> Tensor:
    return torch.cat([torch.arange(row * 12, row * 12 + 12) for row in sequences])


@pytest.mark.parametrize("model_type", FAMILIES)
def test_statistics_and_router_log_are_aligned_with_the_models_own_routing(model_type: str, tmp_path: Path) -> None:
    path = families.save_tiny(model_type, tmp_path / "model", torch.float32)
    model = open_model(path)
    index, site = last_site(model)
    wanted = observed(path, model.facts.layers[index].name, site)
    affinity = ExpertHessian("gate_up", "affinity")
    collector, run = collect(model, tmp_path, (TokenSample(10_000), RoutingCounts(), InputMoments(), affinity))
    train = rows_of(tuple(row for row in range(9) if row not in run.tokens.heldout))
    held = rows_of(run.tokens.heldout)
    assert len(held) == 24 and len(train) == 84

    sample = collector.finished()["token_sample"]
    assert torch.equal(sample["rows"], train)
    assert torch.equal(sample["ids"], wanted["ids"][train])
    torch.testing.assert_close(sample["hidden"], wanted["hidden"][train], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sample["weights"], wanted["weights"][train], atol=1e-5, rtol=1e-5)

    counts = collector.finished()["routing_counts"]
    assert torch.equal(counts["tokens"], torch.bincount(wanted["ids"][train].flatten(), minlength=site.num_experts))
    assert int(counts["total"]) == 84
    moments = collector.finished()["input_moments"]
    for expert in range(site.num_experts):
        own = wanted["hidden"][train][(wanted["ids"][train] == expert).any(-1)].abs()
        assert own.shape[0] == int(moments["tokens"][expert])
        if own.shape[0]:
            torch.testing.assert_close(moments["gate_up.abs_max"][expert], own.amax(0), atol=1e-5, rtol=1e-5)
    hessian = torch.zeros(site.num_experts, site.hidden, site.hidden, dtype=torch.float64)
    for token in train.tolist():  # slot by slot, with the number that transformers multiplies the expert's output by
        x = wanted["hidden"][token].double()
        for expert, gate in zip(wanted["ids"][token].tolist(), wanted["weights"][token].double(), strict=True):
            hessian[expert] += gate * torch.outer(x, x)
    found = collector.finished()[affinity.name]["hessian"].double()
    torch.testing.assert_close(found, hessian, atol=1e-3, rtol=1e-4)

    logits, ids = collector.log.joined()
    assert torch.equal(ids, wanted["ids"][held])
    torch.testing.assert_close(logits, wanted["logits"][held], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_the_logged_logits_choose_the_logged_experts(model_type: str, tmp_path: Path) -> None:
    model = open_model(families.save_tiny(model_type, tmp_path / "model"))
    collector, _ = collect(model, tmp_path, ())
    logits, ids = collector.log.joined()
    assert torch.equal(logits.topk(2).indices.sort().values, ids.sort().values)


@pytest.mark.parametrize("batch_tokens", [1, 30, 1000])
def test_results_do_not_depend_on_the_batches(batch_tokens: int, tmp_path: Path) -> None:
    model = open_model(families.save_tiny("qwen3_moe", tmp_path / "model"))
    wanted_collector, _ = collect(model, tmp_path, (TokenSample(20), RoutingCounts()))
    collector, _ = collect(model, tmp_path, (TokenSample(20), RoutingCounts()), batch_tokens=batch_tokens)
    for name, values in wanted_collector.finished().items():
        for key, value in values.items():
            torch.testing.assert_close(collector.finished()[name][key], value, atol=1e-5, rtol=1e-5)
    assert torch.equal(collector.log.joined()[1], wanted_collector.log.joined()[1])


def test_without_held_out_sequences_everything_counts_and_is_measured(tmp_path: Path) -> None:
    model = open_model(families.save_tiny("qwen3_moe", tmp_path / "model"))
    collector, run = collect(model, tmp_path, (RoutingCounts(),), heldout=0)
    assert run.tokens.heldout == () and run.measured == tuple(range(9))
    assert int(collector.finished()["routing_counts"]["total"]) == 108
    assert collector.log.joined()[1].shape == (108, 2)


def test_nothing_is_logged_unless_asked(tmp_path: Path) -> None:
    model = open_model(families.save_tiny("qwen3_moe", tmp_path / "model"))
    collector, _ = collect(model, tmp_path, (RoutingCounts(),), measure=False)
    assert not collector.log.logits and not collector.log.ids


def test_watching_changes_nothing(tmp_path: Path) -> None:
    model = open_model(families.save_tiny("deepseek_v3", tmp_path / "model"))
    run = engine.token_run(model, IDS, tmp_path)
    engine.through_layers(model, run)
    plain = run.store("original", len(model.layers)).read(0, 9)
    collectors = {
        facts.index: Collector(facts.site, (InputMoments(),)) for facts in model.facts.moe_layers if facts.site
    }
    engine.through_layers(model, engine.token_run(model, IDS, tmp_path / "again"), collectors=collectors)
    again = engine.token_run(model, IDS, tmp_path / "again", streams=()).store("original", len(model.layers)).read(0, 9)
    assert torch.equal(plain, again)
    assert all(int(collector.states["input_moments"]["tokens"].sum()) == 2 * 108 for collector in collectors.values())


def test_one_statistic_per_name(tmp_path: Path) -> None:
    site = last_site(open_model(families.save_tiny("qwen3_moe", tmp_path)))[1]
    with pytest.raises(ValueError, match="token_sample"):
        Collector(site, (TokenSample(4), TokenSample(8)))


def test_weights_without_experts_are_for_the_layers_own_module(tmp_path: Path) -> None:
    """Passes that look at a router alone read a layer without its experts."""
    model = open_model(families.save_tiny("deepseek_v3", tmp_path / "model"))
    assert model.module_of(LayerWeights(2, model.read_tensors(2))) is model.layers[2]
