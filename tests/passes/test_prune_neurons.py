"""Narrower experts: which neurons stay, what is made up for, and what transformers loads."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine
import families
import pytest
import torch
from pruned import execute, generates, stored
from torch import Tensor

from moecompress.passes.prune_neurons import PruneNeurons
from moecompress.stream.model import open_model
from moecompress.types import ExpertWeights, MoESite

WIDTH, H, N = 8, 5, 60
SITE = MoESite("mlp.experts", "mlp.gate", 2, 1, H, WIDTH)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    engine.reload_here(monkeypatch)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(step: PruneNeurons, received: Tensor, gates: Tensor) -> Any:
    """Two experts; the second had no tokens and is judged by the first one's."""
    experts = tuple(ExpertWeights(drawn(2 * WIDTH, H, seed=i), drawn(H, WIDTH, seed=i + 9)) for i in range(2))
    weighted = received * gates[:, None]
    hessian = torch.stack([weighted.T @ weighted, torch.zeros(WIDTH, WIDTH)])
    found = {"hessian": hessian, "tokens": torch.tensor([N, 0]), "pooled": hessian[0]}
    weights = SimpleNamespace(experts=experts, with_experts=lambda made: SimpleNamespace(experts=made))
    return SimpleNamespace(layer=SimpleNamespace(site=SITE), weights=weights, statistics={step.needs()[0].name: found})


def test_the_neurons_that_add_least_go() -> None:
    step, received, gates = PruneNeurons(keep=5, compensate=False), drawn(N, WIDTH, seed=3), drawn(N, seed=4).abs()
    context = layer(step, received, gates)
    decision, made = step.process(context)
    for number, expert in enumerate(context.weights.experts):
        lost = []
        for k in range(WIDTH):
            change = torch.outer(received[:, k] * gates, expert.down[:, k])
            lost.append(float(change.square().sum()))
        wanted = sorted(sorted(range(WIDTH), key=lambda k: -lost[k])[:5])
        assert decision.tensors["neurons"][number].tolist() == wanted
        assert torch.equal(made.experts[number].down, expert.down[:, wanted])
        rows = [*wanted, *(WIDTH + k for k in wanted)]
        assert torch.equal(made.experts[number].gate_up, expert.gate_up[rows])
        again = step.restored(context.layer, decision, number, made.experts[number])
        assert torch.equal(again.down[:, wanted], expert.down[:, wanted]) and again.down.shape == expert.down.shape


def test_down_is_fitted_to_what_was_lost() -> None:
    received, gates = drawn(N, WIDTH, seed=3) @ (torch.eye(WIDTH) + 0.5 * drawn(WIDTH, WIDTH, seed=8)), drawn(N).abs()
    errors = []
    for compensate in (True, False):
        step = PruneNeurons(keep=5, compensate=compensate, damp=1e-9)
        context = layer(step, received, gates)
        decision, made = step.process(context)
        index = decision.tensors["neurons"][0]
        wanted = (received @ context.weights.experts[0].down.T) * gates[:, None]
        found = (received[:, index] @ made.experts[0].down.T) * gates[:, None]
        errors.append(float((found - wanted).square().sum()))
    inputs = (received * gates[:, None])[:, index].double()
    best = torch.linalg.lstsq(inputs, wanted.double()).solution
    assert errors[0] == pytest.approx(float((inputs @ best - wanted).square().sum()), rel=1e-4)
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "gpt_oss", "nemotron_h"])
def test_transformers_loads_narrow_experts(model_type: str, tmp_path: Path) -> None:
    source = families.save_tiny(model_type, tmp_path / "model", torch.float32)
    before = open_model(source).facts.moe_layers[0].site
    passes = [{"prune.neurons": {"keep": 0.5}}]
    out = execute(tmp_path, source, passes)
    made = open_model(out)
    for facts in made.facts.moe_layers:
        assert before is not None and facts.site is not None and facts.site.width == before.width // 2
    size = engine.read_json(out / "moecompress" / "report.json")["size"]
    assert size["output_bytes"] == sum(value.nbytes for value in stored(out).values())
    assert sum(part["output_bytes"] for part in size["components"].values()) == size["output_bytes"]  # as planned
    generates(out)


def test_keeping_all_neurons_changes_nothing(tmp_path: Path) -> None:
    source = families.save_tiny("qwen3_moe", tmp_path / "model")
    out = execute(tmp_path, source, [{"prune.neurons": {"keep": 1.0}}])
    before, after = stored(source), stored(out)
    assert before.keys() == after.keys() and all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize(("model_type", "text"), [("deepseek_v3", "shared_experts"), ("jamba", "feed_forward")])
def test_other_matrices_of_that_width_are_in_the_way(model_type: str, text: str, tmp_path: Path) -> None:
    source = families.save_tiny(model_type, tmp_path / "model")
    done = engine.command("plan", engine.write_recipe(tmp_path, source, [{"prune.neurons": {"keep": 0.5}}]))
    assert done.code == 2 and text in done.out + done.err


def test_fewer_and_narrower_then_quantized(tmp_path: Path) -> None:
    source = families.save_tiny("qwen3_moe", tmp_path / "model", torch.float32)
    first = [{"prune.reap": {"keep": 6}}, {"prune.neurons": {"keep": 16}}]
    for passes in (first, first[::-1]):
        folder = tmp_path / next(iter(passes[0]))
        folder.mkdir()
        out = execute(folder, source, [*passes, {"quantize.gptq": {"bits": 4, "group_size": 16}}])
        config = engine.read_json(out / "config.json")
        assert (config["num_experts"], config["moe_intermediate_size"]) == (6, 16)
        for row in engine.read_json(out / "moecompress" / "report.json")["layers"]:
            assert 0 < row["notes"]["neurons_lost"] < 1
            kept = [e for e in row["experts"] if e["action"] == "quantized"]
            assert len(kept) == 6 and all(0 < e["weight_error"] < 1.5 for e in kept)
        generates(out)


@pytest.mark.parametrize(("options", "text"), [({"keep": 33}, "32 neurons"), ({"keep": 12}, "12 input columns of")])
def test_impossible_widths_are_refused(options: dict[str, Any], text: str, tmp_path: Path) -> None:
    source = families.save_tiny("qwen3_moe", tmp_path / "model")
    passes = [{"prune.neurons": options}, {"quantize.rtn": {"bits": 4, "group_size": 8}}]
    done = engine.command("plan", engine.write_recipe(tmp_path, source, passes))
    assert done.code == 2 and text in done.out + done.err
