"""Statistics of real layers against plain loops over tokens and experts that follow each family's published routing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import engine
import families
import pytest
import torch
from layers import at_layer
from safetensors.torch import load_file
from torch import Tensor

from moecompress.stats.base import ExpertObservation, RoutingObservation
from moecompress.stats.experts import ExpertActivity, TokenContributions
from moecompress.stats.similarity import CoActivation, MeanOutputs, RouterGram
from moecompress.types import MoESite

IDS = engine.random_ids(3, 12)
LAYER, E, K = 2, 8, 2


@dataclass(frozen=True)
class Place:
    """Names in a family's checkpoint and how it routes: softmax over all, or sigmoid with a bias for the choice."""

    block: str = "mlp"
    router: str = "mlp.gate.weight"
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    bias: str = ""
    groups: int = 1
    scale: float = 1.0


PLACES = {
    "qwen3_moe": Place(),
    "deepseek_v3": Place(bias="mlp.gate.e_score_correction_bias", groups=2, scale=2.5),
    "minimax_m2": Place(
        "block_sparse_moe",
        "block_sparse_moe.gate.weight",
        ("w1", "w3", "w2"),
        "block_sparse_moe.e_score_correction_bias",
    ),
}


def dot(row: Tensor, x: Tensor) -> float:
    return math.fsum((row * x).tolist())


def routed(place: Place, tensors: dict[str, Tensor], x: Tensor, norm: bool) -> tuple[list[float], dict[int, float]]:
    """Logits of one token, and expert -> weight of those it chooses."""
    logits = [dot(row, x) for row in tensors[place.router]]
    if not place.bias:
        total = math.fsum(math.exp(value) for value in logits)
        chances = choice = [math.exp(value) / total for value in logits]
    else:
        chances = [1 / (1 + math.exp(-value)) for value in logits]
        choice = [chance + float(bias) for chance, bias in zip(chances, tensors[place.bias].flatten(), strict=True)]
    size = E // place.groups
    best = max(range(place.groups), key=lambda g: sum(sorted(choice[g * size : (g + 1) * size])[-2:]))
    chosen = sorted(range(best * size, (best + 1) * size), key=lambda i: -choice[i])[:K]
    total = sum(chances[i] for i in chosen) if norm else 1.0
    return logits, {i: chances[i] / total * place.scale for i in chosen}


def made(place: Place, tensors: dict[str, Tensor], expert: int, x: Tensor) -> Tensor:
    """What one expert makes of one token: down(silu(gate x) * (up x))."""
    gate, up, down = (tensors[f"{place.block}.experts.{expert}.{part}.weight"] for part in place.parts)
    middle = []
    for first, second in zip(gate, up, strict=True):
        value = dot(first, x)
        middle.append(value / (1 + math.exp(-value)) * dot(second, x))
    return down @ torch.tensor(middle, dtype=torch.float64)


def seen(path: Path) -> tuple[Tensor, Tensor, bool, float]:
    """From transformers' own forward: residual stream and the experts' input [N * T, H] of LAYER; norm_topk, scale."""
    model = engine.own_model(path)
    found: dict[str, Tensor] = {}

    def hook(_: object, args: tuple[Tensor, ...], out: Tensor) -> None:
        found["residual"], found["hidden"] = args[0].flatten(0, 1).double(), out.flatten(0, 1).double()

    model.get_submodule(f"model.layers.{LAYER}.post_attention_layernorm").register_forward_hook(hook)
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    config = model.config
    scale = getattr(config, "routed_scaling_factor", 1.0)
    return found["residual"], found["hidden"], bool(getattr(config, "norm_topk_prob", True)), scale


@pytest.mark.parametrize("model_type", PLACES)
def test_statistics_of_a_layer_equal_loops(model_type: str, tmp_path: Path) -> None:
    place, path = PLACES[model_type], families.save_tiny(model_type, tmp_path / "model", torch.float32)
    prefix = f"model.layers.{LAYER}."
    source = load_file(path / "model.safetensors")
    tensors = {name.removeprefix(prefix): value.double() for name, value in source.items() if name.startswith(prefix)}
    residual, hidden, norm, scale = seen(path)
    assert scale == place.scale
    gram, pairs = [[0.0] * E for _ in range(E)], [[0] * E for _ in range(E)]
    means, powers = torch.zeros(E, 64, dtype=torch.float64), torch.zeros(E, 3, 3, dtype=torch.float64)
    scores = [0.0] * E
    for x, h in zip(residual, hidden, strict=True):
        logits, chosen = routed(place, tensors, h, norm)
        outputs = [made(place, tensors, expert, h) for expert in range(E)]
        after = x.clone()
        for i in range(E):
            means[i] += outputs[i] / len(hidden)
            for j in range(E):
                gram[i][j] += logits[i] * logits[j]
                pairs[i][j] += i in chosen and j in chosen
        for i, gate in chosen.items():
            after += gate * outputs[i]
            size = math.sqrt(dot(outputs[i], outputs[i]))
            for a in range(3):
                for b in range(3):
                    powers[i, a, b] += gate**a * size**b
        turned = max(0.0, 1 - dot(x, after) / math.sqrt(dot(x, x) * dot(after, after)))
        for i, gate in chosen.items():
            scores[i] += gate * math.sqrt(dot(outputs[i], outputs[i])) * turned
    wanted = (RouterGram(), MeanOutputs(), CoActivation(), ExpertActivity(), TokenContributions())
    found = at_layer(path, IDS, tmp_path, LAYER).collect(wanted)
    assert found["co_activation"]["pairs"].tolist() == pairs and int(found["router_gram"]["tokens"]) == len(hidden)
    assert found["mean_outputs"]["tokens"].tolist() == [len(hidden)] * E
    for value, loops in (
        (found["router_gram"]["gram"], torch.tensor(gram, dtype=torch.float64)),
        (found["mean_outputs"]["mean"], means),
        (found["expert_activity"]["powers"], powers),
        (found["token_contributions"]["score"], torch.tensor(scores, dtype=torch.float64)),
    ):
        assert float((value - loops).abs().max()) < 2e-5 * float(loops.abs().max())


def test_similarity_sums_are_float64_sums_over_batches() -> None:
    """Made-up observations in two parts, a skipped slot and an expert that sees nothing among them."""
    generator = torch.Generator().manual_seed(0)
    tokens, experts, width = 9, 4, 5
    ids = torch.tensor([[0, 1], [1, 0], [2, 4], [0, 2], [1, 2], [4, 4], [2, 1], [0, 1], [1, 4]])  # 4: skipped
    logits = torch.randn(tokens, experts, generator=generator)
    outputs = torch.randn(tokens, experts, width, generator=generator)
    site = MoESite("mlp.experts", "mlp.gate", experts, 2, width, 3)
    statistics = {item.name: (item, item.init(site)) for item in (RouterGram(), MeanOutputs(), CoActivation())}
    for rows in (torch.arange(4), torch.arange(4, tokens)):
        nothing = torch.empty(len(rows), 0)
        for item, state in statistics.values():
            item.observe_routing(
                state, RoutingObservation(nothing, ids[rows], torch.ones(len(rows), 2), logits[rows], rows)
            )
            for expert in range(3):  # expert 3 is shown nothing
                seen_by = ExpertObservation(
                    expert, rows, torch.ones(len(rows)), nothing, nothing, outputs[rows, expert]
                )
                item.observe_expert(state, seen_by)
    found = {name: item.finalise(state) for name, (item, state) in statistics.items()}
    for i in range(experts):
        for j in range(experts):
            gram = math.fsum(float(logits[t, i]) * float(logits[t, j]) for t in range(tokens))
            assert float(found["router_gram"]["gram"][i, j]) == pytest.approx(gram, rel=1e-12)
            both = sum(i in ids[t].tolist() and j in ids[t].tolist() for t in range(tokens))
            assert int(found["co_activation"]["pairs"][i, j]) == both
        for channel in range(width):
            total = math.fsum(float(outputs[t, i, channel]) for t in range(tokens)) if i < 3 else 0.0
            assert float(found["mean_outputs"]["mean"][i, channel]) == pytest.approx(total / tokens, rel=1e-12)
