"""Write a synthetic checkpoint with the shapes of a real model: random bf16 weights, a few layers.

For measuring memory and time without a download: `python scripts/make_slice.py DIR --layers 3` gives three layers of
Qwen3-30B-A3B's shape (128 experts, hidden 2048, expert width 768, vocabulary 151936), about 4.9 GB.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from moecompress.checkpoint.writer import Entry, tensor_entry, write_index, write_shard

SHAPES = {
    "qwen3-30b-a3b": {
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 6144,
        "vocab_size": 151936,
    },
}


def main() -> None:
    """Parse arguments, write one shard per layer, the rest, index and config."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sizes = SHAPES[arguments.shape]
    arguments.directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(arguments.seed)
    records = [write_shard(arguments.directory / "outer.safetensors", list(outer(sizes, generator)))]
    for index in range(arguments.layers):
        path = arguments.directory / f"layer-{index}.safetensors"
        records.append(write_shard(path, list(layer(index, sizes, generator))))
    write_index(arguments.directory, records)
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_hidden_layers": arguments.layers,
        "hidden_act": "silu",
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **sizes,
    }
    (arguments.directory / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def normal(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Entry:
    """Weights of the size that training gives: N(0, 1 / columns), made when they are written."""

    def data() -> Iterator[memoryview]:
        values = torch.randn(shape, generator=generator, dtype=torch.float32) / shape[-1] ** 0.5
        yield from tensor_entry(name, values.to(torch.bfloat16)).data()  # type: ignore[misc]

    return Entry(name, torch.bfloat16, shape, data)


def ones(name: str, size: int) -> Entry:
    """A norm's weight."""
    return tensor_entry(name, torch.ones(size, dtype=torch.bfloat16))


def outer(sizes: dict[str, int], generator: torch.Generator) -> Iterator[Entry]:
    """Embedding, final norm and head."""
    vocabulary, hidden = sizes["vocab_size"], sizes["hidden_size"]
    yield normal("model.embed_tokens.weight", (vocabulary, hidden), generator)
    yield ones("model.norm.weight", hidden)
    yield normal("lm_head.weight", (vocabulary, hidden), generator)


def layer(index: int, sizes: dict[str, int], generator: torch.Generator) -> Iterator[Entry]:
    """One decoder layer under the family's names."""
    hidden, width, head = sizes["hidden_size"], sizes["moe_intermediate_size"], sizes["head_dim"]
    queries, keys = sizes["num_attention_heads"] * head, sizes["num_key_value_heads"] * head
    name = f"model.layers.{index}"
    yield ones(f"{name}.input_layernorm.weight", hidden)
    yield ones(f"{name}.post_attention_layernorm.weight", hidden)
    yield ones(f"{name}.self_attn.q_norm.weight", head)
    yield ones(f"{name}.self_attn.k_norm.weight", head)
    for part, rows in (("q", queries), ("k", keys), ("v", keys)):
        yield normal(f"{name}.self_attn.{part}_proj.weight", (rows, hidden), generator)
    yield normal(f"{name}.self_attn.o_proj.weight", (hidden, queries), generator)
    yield normal(f"{name}.mlp.gate.weight", (sizes["num_experts"], hidden), generator)
    for expert in range(sizes["num_experts"]):
        at = f"{name}.mlp.experts.{expert}"
        yield normal(f"{at}.gate_proj.weight", (width, hidden), generator)
        yield normal(f"{at}.up_proj.weight", (width, hidden), generator)
        yield normal(f"{at}.down_proj.weight", (hidden, width), generator)


if __name__ == "__main__":
    main()
