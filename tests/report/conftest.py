"""Synthetic reports of any size; every number is made from a seeded generator."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from moecompress.report.schema import Evaluation, Report

COMPONENTS = {  # share of the source bytes, and what is left of each
    "routed_experts": (0.90, 0.19),
    "attention": (0.05, 1.0),
    "shared_experts": (0.01, 1.0),
    "dense_mlp": (0.005, 1.0),
    "router": (0.002, 1.0),
    "embedding": (0.016, 1.0),
    "lm_head": (0.016, 1.0),
    "norm": (0.0005, 1.0),
    "other": (0.0005, 1.0),
}


def expert(rng: random.Random, index: int) -> dict[str, Any]:
    tokens = int(rng.lognormvariate(6, 1.3)) if rng.random() > 0.02 else 0
    pruned = rng.random() < 0.1
    bits = {"gate_up": rng.choice([1, 2, 2, 3, 3, 4]), "down": rng.choice([2, 3, 4])}
    return {
        "id": index,
        "tokens": tokens,
        "importance": rng.random() ** 3,
        "bits": {"gate_up": None, "down": None} if pruned else bits,
        "error": None if pruned else 0.3 * rng.random(),
        "weight_error": None if pruned else 0.05,
        "action": "pruned" if pruned else "quantized",
        "fallback": "rtn: 12 tokens < 64" if not pruned and tokens < 60 else None,
        "protected": None,
    }


def layer(rng: random.Random, index: int, experts: int) -> dict[str, Any]:
    rows = [expert(rng, e) for e in range(experts)]
    return {
        "layer": index,
        "experts_before": experts,
        "experts_after": sum(row["action"] != "pruned" for row in rows),
        "router": {
            "topk_agreement": 1 - 0.08 * rng.random(),
            "kl": 0.02 * rng.random(),
            "load_cv": 0.5 + rng.random(),
            "aligned": [],
        },
        "output_error": 0.01 + 0.003 * index * rng.random(),
        "notes": {},
        "use": {"experts_before": 8.0, "experts": 6 + rng.random(), "bytes_before": 4e7, "bytes": 7e6 * rng.random()},
        "experts": rows,
    }


def budget(bits: float) -> dict[str, Any]:
    """What a budget gives; the first one of a curve cannot be kept."""
    problem = "too small even for 1 bits everywhere" if bits == 1 else None
    known = {"mean_bits": bits, "stored_bits_per_weight": bits + 0.5, "predicted_cost": 9.0, "predicted_kl": 4**-bits}
    return {"budget": f"{bits:g} bits", **(dict.fromkeys(known) if problem else known), "problem": problem}


def report_data(layers: int, experts: int) -> dict[str, Any]:
    rng = random.Random(layers * 1000 + experts)
    total = layers * experts * 12_000_000
    return {
        "schema": "moecompress.report/1",
        "model": {
            "name": "example/Moe-7B-demo",
            "source": "hub",
            "revision": "0123abcd",
            "model_type": "olmoe",
            "architecture": "OlmoeForCausalLM",
        },
        "recipe": {
            "model": "example/Moe-7B-demo",
            "passes": [{"prune.easy_ep": {"keep": 0.9}}, {"quantize.gptq": {"group_size": 128}}],
            "output": {"dir": "out/demo", "format": "auto"},
        },
        "versions": {"moecompress": "0.1.0", "torch": "2.13.0"},
        "seeds": {"recipe": 0, "calibration": 7},
        "hardware": {"cpu": "8 cores, AVX-512", "memory_bytes": 68719476736, "threads": 8},
        "backend": "cpu-avx2",
        "format": "native",
        "size": {
            "source_bytes": total,
            "output_bytes": int(sum(total * a * b for a, b in COMPONENTS.values())),
            "expert_bits_per_weight": 2.71,
            "total_bits_per_weight": 4.31,
            "components": {
                k: {"source_bytes": int(total * a), "output_bytes": int(total * a * b)}
                for k, (a, b) in COMPONENTS.items()
            },
        },
        "plan": {"peak_bytes": 7_500_000_000, "disk_bytes": 9_000_000_000, "seconds": 4000.0},
        "peak_rss_bytes": 6_100_000_000,
        "seconds": 3755.5,
        "resumed": 1,
        "calibration": [
            {
                "name": "default",
                "origin": {"source": "ebss"},
                "samples": 128,
                "length": 512,
                "digest": "ab" * 32,
            }
        ],
        "passes": [
            {
                "name": "prune.easy_ep",
                "paper": "arXiv:2504.06792",
                "parameters": {"keep": 0.9},
                "seconds": 312.5,
                "peak_rss_bytes": 5_100_000_000,
            },
            {
                "name": "quantize.gptq",
                "paper": "arXiv:2210.17323",
                "parameters": {"group_size": 128, "bits": [1, 2, 3]},
                "seconds": 3001.0,
                "peak_rss_bytes": 6_100_000_000,
            },
        ],
        "layers": [layer(rng, i, experts) for i in range(layers)],
        "allocation": {
            "name": "allocate.global",
            **budget(2.5),
            "gap": 1e-6,
            "curve": [budget(1 + 0.5 * step) for step in range(7)],
        },
        "warnings": ["layer 0: 3 experts saw fewer than 64 tokens; rounded to nearest instead"],
        "loadable": {
            "transformers": {"status": "tested", "reason": "loaded in a fresh process, compared layer by layer"},
            "vllm": {"status": "no", "reason": "mixed widths per expert"},
            "sglang": {"status": "by_rule", "reason": "pack-quantized, one scheme"},
        },
    }


def evaluation_data(layers: int) -> dict[str, Any]:
    rng = random.Random(5)
    return {
        "perplexity": {
            "heldout.txt": {"value": 8.4321, "stderr": 0.051},
            "wiki.txt": {"value": 11.25, "stderr": None},
        },
        "kl": {"heldout.txt": 0.0731},
        "top1_agreement": {"heldout.txt": 0.914},
        "router_agreement": [1 - 0.1 * rng.random() for _ in range(layers)],
        "tasks": {"piqa": {"acc": {"value": 0.781, "stderr": 0.0096}}},
        "samples": "samples/",
        "backend": "cpu-avx2",
        "versions": {"lm_eval": "0.4.9"},
        "limit": 200,
        "reference": "example/Moe-7B-demo",
    }


@pytest.fixture
def make_report() -> Callable[[int, int], Report]:
    return lambda layers, experts: Report.model_validate(report_data(layers, experts))


@pytest.fixture
def make_data() -> Callable[[int, int], dict[str, Any]]:
    return report_data


@pytest.fixture
def make_evaluation() -> Callable[[int], Evaluation]:
    return lambda layers: Evaluation.model_validate(evaluation_data(layers))
