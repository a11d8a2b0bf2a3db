"""The Fisher diagonal of layer outputs against one ordinary backward pass through the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engine
import families
import torch
from torch import Tensor

from moecompress.stream.fisher import output_fisher
from moecompress.stream.model import open_model


def test_equal_to_autograd_through_the_whole_model(tmp_path: Path) -> None:
    path = families.save_tiny("qwen3_moe", tmp_path / "model", torch.float32)
    ids = engine.random_ids(3, 10)
    model = open_model(path)
    found = output_fisher(model, model.read_layer, ids, torch.Generator().manual_seed(5), batch_tokens=20)

    whole = engine.own_model(path)
    kept: list[Tensor] = []

    def keep(_module: Any, _args: Any, out: Any) -> None:
        value = out[0] if isinstance(out, tuple) else out
        value.retain_grad()
        kept.append(value)

    for layer in whole.model.layers:
        layer.register_forward_hook(keep)
    generator = torch.Generator().manual_seed(5)
    sums = [torch.zeros(model.facts.hidden_size) for _ in whole.model.layers]
    for row in ids:
        kept.clear()
        scores = whole(input_ids=row[None], use_cache=False).logits[0].log_softmax(-1)
        drawn = torch.multinomial(scores.detach().exp(), 1, generator=generator)
        (-scores.gather(1, drawn).sum()).backward()
        for total, value in zip(sums, kept, strict=True):
            assert value.grad is not None
            total += value.grad[0].square().sum(0)
    assert sorted(found) == [layer.index for layer in model.facts.moe_layers]
    for index, values in found.items():
        assert engine.difference(values, sums[index] / ids.numel()) < 1e-3
