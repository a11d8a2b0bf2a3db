"""Tokens per second at batch 1 of a synthetic Mixture-of-Experts model: packed weights against transformers in bf16.

    python scripts/bench_generate.py [--bits 4,3] [--threads N] [--tokens 24] [--layers 8] [--json FILE|-] [--no-bf16]

The model (1.4 billion parameters with 8 layers) is random and made in memory; its routed experts and attention are
packed, embedding and head stay bf16 (the head on the kernels, as `moecompress.load` does). Greedy generation with a
cache; the prompt's time is taken off by measuring two lengths.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bench_kernels import processor
from torch import nn

from moecompress.arch.sites import is_experts
from moecompress.checkpoint.native import LINEAR, RecordLayout, plan_record
from moecompress.dense import hold_large_linears
from moecompress.experts import PackedExperts, PackedLinear
from moecompress.packed import Packed, backend_name
from moecompress.types import Scheme

GROUP = 128


def configuration(layers: int) -> Any:
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        hidden_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=16384,
        num_experts=32,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        intermediate_size=768,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )


def random_layout(matrices: list[tuple[str, tuple[int, int]]], bits: int) -> RecordLayout:
    return plan_record([(name, shape, Scheme(bits, GROUP), torch.bfloat16) for name, shape in matrices])


def fill(module: Packed) -> None:
    """Random codes and scales of weights that keep activations about as large as they are."""
    layout = module.layouts[0]
    rows = module.rec0.data
    rows.copy_(torch.randint(0, 256, rows.shape, dtype=torch.uint8))
    for _, matrix in layout.matrices:
        _, scales, _ = matrix.views(rows)
        assert scales is not None
        scales.fill_(matrix.shape[1] ** -0.5 * 3.4 / 2**matrix.scheme.bits)


def make(layers: int, bits: int | None) -> nn.Module:
    """The model with packed weights of `bits`, or in bf16."""
    from transformers import Qwen3MoeForCausalLM

    config = configuration(layers)
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    for name, module in list(model.named_modules()):
        if bits is not None and is_experts(module):
            shapes = [("gate_up", tuple(module.gate_up_proj.shape[1:])), ("down", tuple(module.down_proj.shape[1:]))]
            packed = PackedExperts.packing(module, [random_layout(shapes, bits)], [config.num_experts], name)
            packed.slot_map.data[:, 0] = 0
            packed.slot_map.data[:, 1] = torch.arange(config.num_experts)
            fill(packed)
            packed.prepare()
            model.set_submodule(name, packed)
        elif bits is not None and isinstance(module, nn.Linear) and "self_attn" in name:
            layout = random_layout([(LINEAR, (module.out_features, module.in_features))], bits)
            linear = PackedLinear(module, layout, name)
            fill(linear)
            linear.prepare()
            model.set_submodule(name, linear)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            value = torch.empty(parameter.shape, dtype=parameter.dtype)
            value = value.fill_(1) if value.dim() == 1 else value.normal_(std=parameter.shape[-1] ** -0.5)
            owner = model.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], nn.Parameter(value, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    if bits is not None:
        hold_large_linears(model)  # as loading does
    return model


@torch.no_grad()
def speeds(models: list[Any], tokens: int, repeats: int = 5) -> list[tuple[float, float]]:
    """(median, best) tokens per second of decoding; models take turns, so that other work meets all of them alike."""
    ids = torch.arange(16)[None] + 3

    def seconds(model: Any, count: int) -> float:
        began = time.perf_counter()
        model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        return time.perf_counter() - began

    rates: list[list[float]] = [[] for _ in models]
    for model in models:
        seconds(model, 2)
    for _ in range(repeats):
        for own, model in zip(rates, models, strict=True):
            own.append(tokens / (seconds(model, tokens + 1) - seconds(model, 1)))
    return [(statistics.median(own), max(own)) for own in rates]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=lambda text: [int(part) for part in text.split(",")], default=[4, 3])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--json", help="write the rows there; - is standard output")
    parser.add_argument("--no-bf16", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows: list[dict[str, Any]] = []
    variants = [*arguments.bits, *([] if arguments.no_bf16 else [None])]
    models = [make(arguments.layers, bits) for bits in variants]
    for bits, model, (median, best) in zip(variants, models, speeds(models, arguments.tokens), strict=True):
        row = {"bits": bits or 16, "tokens_per_second": median, "best": best, "backend": backend_name(model)}
        rows.append(row)
        print(f"{row['bits']} bits: {median:.2f} tokens/s (best {best:.2f}), {row['backend']}", file=sys.stderr)
    result = {"device": processor(), "threads": arguments.threads, "layers": arguments.layers, "rows": rows}
    if arguments.json == "-":
        print(json.dumps(result, indent=1))
    elif arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
