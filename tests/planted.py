"""Variants of the demo checkpoint with a known answer: what a method must find, or survive, is planted by hand.

Every function writes a checkpoint directory and returns it. All but `routed_expert` compute the same function as the
demo checkpoint; an expert that is never (or rarely) chosen is so on the tokens it was planted for.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

PARTS = ("gate_proj", "up_proj", "down_proj")


def _copy(source: Path, target: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    """`source` with these tensors and config entries instead of its own."""
    shutil.copytree(source, target)
    save_file({name: value.contiguous() for name, value in tensors.items()}, target / "model.safetensors")
    entries = json.loads((target / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(entries))
    return target


def _config(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())


def _expert(layer: int, expert: int, part: str) -> str:
    return f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight"


def router_inputs(path: Path, ids: Tensor) -> list[Tensor]:
    """What the router of every layer receives for ids [N, T]: float32 [N * T, H] each."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    seen: dict[int, Tensor] = {}

    def keep(index: int) -> Any:
        return lambda _module, args: seen.__setitem__(index, args[0].reshape(-1, args[0].shape[-1]))

    for index, layer in enumerate(model.model.layers):
        layer.mlp.gate.register_forward_pre_hook(keep(index))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    return [seen[index] for index in sorted(seen)]


def routed_expert(source: Path, target: Path, ids: Tensor, chosen: Sequence[int] = ()) -> Path:
    """One more expert in every layer, the last one, with random weights: of the tokens ids [N, T] (flattened) exactly
    `chosen` go there. With nothing chosen it is never routed and the function on these tokens stays the same.

    Raises ValueError where no router row can do that.
    """
    tensors = load_file(source / "model.safetensors")
    number = _config(source)["num_experts"]
    for layer, inputs in enumerate(router_inputs(source, ids)):
        name = f"model.layers.{layer}.mlp.gate.weight"
        row = _separating_row(inputs, tensors[name].float(), _config(source)["num_experts_per_tok"], chosen)
        tensors[name] = torch.cat([tensors[name], row[None].to(tensors[name].dtype)])
        generator = torch.Generator().manual_seed(layer)
        for part in PARTS:
            like = tensors[_expert(layer, 0, part)]
            drawn = torch.randn(like.shape, generator=generator) * like.float().std()
            tensors[_expert(layer, number, part)] = drawn.to(like.dtype)
    return _copy(source, target, tensors, num_experts=number + 1)


def _separating_row(inputs: Tensor, router: Tensor, top_k: int, chosen: Sequence[int]) -> Tensor:
    """A router row whose logit is over the last chosen one's exactly for `chosen`, by a margin, on these inputs."""
    bar = (inputs @ router.t()).sort(-1, descending=True).values[:, top_k - 1]
    sign = torch.ones(len(inputs))
    sign[list(chosen)] = -1
    row = torch.zeros(inputs.shape[1], requires_grad=True)
    solver = torch.optim.LBFGS([row], max_iter=500, line_search_fn="strong_wolfe")

    def missed() -> Tensor:
        solver.zero_grad()
        loss = torch.relu(sign * (inputs @ row - bar) + 1).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    solver.step(missed)
    made = row.detach()
    if bool((sign * (inputs @ made.bfloat16().float() - bar) > -0.1).any()):
        raise ValueError("no router row separates these tokens: use fewer")
    return made


def outlier_channels(source: Path, target: Path, channels: Sequence[int], factor: float = 64.0) -> Path:
    """The experts' norm makes these channels `factor` times larger; router and experts read them smaller by as much.

    A power of two changes exponents only, so the function is the same to the last bit.
    """
    tensors = load_file(source / "model.safetensors")
    config = _config(source)
    columns = list(channels)
    for layer in range(config["num_hidden_layers"]):
        tensors[f"model.layers.{layer}.post_attention_layernorm.weight"][columns] *= factor
        tensors[f"model.layers.{layer}.mlp.gate.weight"][:, columns] /= factor
        for expert in range(config["num_experts"]):
            for part in ("gate_proj", "up_proj"):
                tensors[_expert(layer, expert, part)][:, columns] /= factor
    return _copy(source, target, tensors)


def permuted_experts(source: Path, target: Path, order: Sequence[int]) -> Path:
    """Expert i of every layer is expert order[i] of the source, router rows included."""
    tensors = load_file(source / "model.safetensors")
    made = dict(tensors)
    for layer in range(_config(source)["num_hidden_layers"]):
        name = f"model.layers.{layer}.mlp.gate.weight"
        made[name] = tensors[name][list(order)]
        for new, old in enumerate(order):
            for part in PARTS:
                made[_expert(layer, new, part)] = tensors[_expert(layer, old, part)].clone()
    return _copy(source, target, made)


def permuted_duplicates(source: Path, target: Path, seed: int = 0) -> Path:
    """Every expert twice, the second time (E + i) with its neurons in another order; twice as many experts per token.

    Both copies of a chosen expert are chosen and share its routing weight, so the function is the same.
    """
    tensors = load_file(source / "model.safetensors")
    config = _config(source)
    number, generator = config["num_experts"], torch.Generator().manual_seed(seed)
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}.mlp.gate.weight"
        tensors[name] = tensors[name].repeat(2, 1)
        for expert in range(number):
            neurons = torch.randperm(config["moe_intermediate_size"], generator=generator)
            for part in ("gate_proj", "up_proj"):
                tensors[_expert(layer, number + expert, part)] = tensors[_expert(layer, expert, part)][neurons]
            down = tensors[_expert(layer, expert, "down_proj")]
            tensors[_expert(layer, number + expert, "down_proj")] = down[:, neurons]
    return _copy(source, target, tensors, num_experts=2 * number, num_experts_per_tok=2 * config["num_experts_per_tok"])


def super_expert(source: Path, target: Path, layer: int, expert: int, neuron: int, factor: float = 1024.0) -> Path:
    """One neuron of one expert with huge activations that `down` makes small again: the same function, bit for bit."""
    tensors = load_file(source / "model.safetensors")
    tensors[_expert(layer, expert, "up_proj")][neuron] *= factor
    tensors[_expert(layer, expert, "down_proj")][:, neuron] /= factor
    return _copy(source, target, tensors)


def scaled_expert(source: Path, target: Path, layer: int, expert: int, factor: float) -> Path:
    """One expert whose outputs are `factor` times as large."""
    tensors = load_file(source / "model.safetensors")
    tensors[_expert(layer, expert, "down_proj")] *= factor
    return _copy(source, target, tensors)
