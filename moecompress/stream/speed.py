"""What a forward pass costs, from shapes and one small measurement."""

from __future__ import annotations

import time

import torch

from moecompress.types import ModelFacts


def active_weights(facts: ModelFacts) -> int:
    """Weights of the decoder layers that one token meets."""
    active = 0
    for layer in facts.layers:
        active += sum(shape[0] * shape[1] for shape in layer.shapes.values() if len(shape) == 2)
        if layer.site is not None:
            active += layer.site.top_k * 3 * layer.site.hidden * layer.site.width
    return active


def matmul_rate() -> float:
    """Measured float32 operations per second of one small matrix product (about 20 ms)."""
    left, right = torch.ones(256, 1024), torch.ones(1024, 1024)
    torch.matmul(left, right)
    start = time.perf_counter()
    for _ in range(3):
        torch.matmul(left, right)
    return 3 * 2 * 256 * 1024 * 1024 / max(1e-6, time.perf_counter() - start)
