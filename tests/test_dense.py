"""Large Linears in bf16 on the CPU kernels: the same products, and a plain weight for who saves, moves or reads it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import moecompress
from moecompress import dense, ops
from moecompress.dense import DenseLinear, hold_large_linears
from moecompress.packed import backends

BF16 = torch.bfloat16
IDS = torch.arange(5, 21)[None]

pytestmark = pytest.mark.skipif(ops.unavailable("cpu") is not None, reason="there are no compiled kernels")


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices, and any processor, are good enough."""
    monkeypatch.setattr(dense, "LEAST", 1)
    monkeypatch.setattr(ops, "holds_dense", lambda: True)


def linear(bias: bool = False, rows: int = 80, columns: int = 96) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(columns, rows, bias=bias).to(BF16)


def inputs(rows: int, columns: int = 96) -> torch.Tensor:
    return torch.randn(2, rows, columns, generator=torch.Generator().manual_seed(rows)).to(BF16)


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 40])
def test_products_are_those_of_the_weight(rows: int, bias: bool) -> None:
    plain = linear(bias)
    held, x = DenseLinear(copy.deepcopy(plain)), inputs(rows)
    found = held(x)
    assert held.handle and held.choice is not None and held.choice.backend == "cpu"
    wanted = F.linear(x.double(), plain.weight.double(), plain.bias.double() if bias else None)
    assert (found - wanted).norm() / wanted.norm() <= 4e-3
    assert found.dtype == BF16 and found.shape == wanted.shape


@torch.no_grad()
def test_state_is_a_plain_weight_before_and_after_use() -> None:
    plain = linear(True)
    held = DenseLinear(copy.deepcopy(plain))
    before = held(inputs(3))
    for _ in range(2):
        state = held.state_dict()
        assert state.keys() == plain.state_dict().keys()
        assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())
        assert torch.equal(held(inputs(3)), before) and held.handle
    other = linear(True)
    other.weight.data.mul_(2)
    held.load_state_dict(other.state_dict())
    assert torch.allclose(held(inputs(3)).float(), other(inputs(3)).float(), rtol=2e-2, atol=1e-2)


@torch.no_grad()
def test_who_reads_the_weight_gets_it_and_pytorch_keeps_it() -> None:
    plain = linear()
    held = DenseLinear(copy.deepcopy(plain))
    held(inputs(1))
    assert torch.equal(held.weight, plain.weight) and not held.handle
    assert torch.equal(held(inputs(4)), plain(inputs(4))) and not held.handle
    assert "not cpu: its weight is read by other code" in backends(nn.Sequential(held))[0]


@torch.no_grad()
def test_another_dtype_is_computed_by_pytorch() -> None:
    plain = linear()
    held = DenseLinear(copy.deepcopy(plain))
    held(inputs(1))
    held.float()
    assert torch.equal(held(inputs(4).float()), copy.deepcopy(plain).float()(inputs(4).float()))
    assert "the weight is float32" in backends(nn.Sequential(held))[0]
    held.to(BF16)
    held(inputs(1))
    assert held.handle


def test_gradients_of_inputs_pass_through() -> None:
    plain, x, again = linear(), inputs(2).requires_grad_(), inputs(2).requires_grad_()
    held = DenseLinear(copy.deepcopy(plain))
    held(x).float().square().sum().backward()
    plain(again).float().square().sum().backward()
    assert torch.equal(x.grad, again.grad)  # type: ignore[arg-type]


def test_what_is_left_alone(everywhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    tied, embedding = linear(rows=50), nn.Embedding(50, 96, dtype=BF16)
    tied.weight = embedding.weight
    hooked = linear()
    hooked._hf_hook = object()  # type: ignore[assignment]
    model = nn.ModuleDict(
        {
            "tied": nn.ModuleList([tied, embedding]),
            "hooked": hooked,
            "float32": linear().float(),
            "odd": linear(columns=90),
            "large": linear(),
        }
    )
    monkeypatch.setattr(dense, "LEAST", 80 * 96 + 1)
    assert hold_large_linears(model) == 0
    monkeypatch.setattr(dense, "LEAST", 80 * 96)
    monkeypatch.setattr(ops, "holds_dense", lambda: False)
    assert hold_large_linears(model) == 0
    monkeypatch.setattr(ops, "holds_dense", lambda: True)
    assert hold_large_linears(model) == 1 and isinstance(model["large"], DenseLinear)


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "olmoe"])
def test_models_load_generate_and_save_with_them(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = families.save_tiny(family, tmp_path / "source", BF16)
    step = {"quantize.rtn": {"bits": 4, "group_size": 16}}
    recipe: dict[str, Any] = {"model": str(source), "passes": [step]}
    recipe["output"] = {"dir": str(tmp_path / "out"), "format": "native"}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    native = moecompress.run(tmp_path / "recipe.yaml")
    plain = moecompress.load(native)
    assert not any(isinstance(module, DenseLinear) for module in plain.modules())  # all are small
    monkeypatch.setattr(dense, "LEAST", 1)
    monkeypatch.setattr(ops, "holds_dense", lambda: True)
    model = moecompress.load(native)
    held = [module for module in model.modules() if isinstance(module, DenseLinear)]
    assert held and all(module.handle for module in held)
    exact = moecompress.load(native, dtype=torch.float32)(IDS).logits
    found, by_pytorch = (((one(IDS).logits - exact).norm() / exact.norm()).item() for one in (model, plain))
    assert found <= 1.5 * by_pytorch + 1e-3, (found, by_pytorch)
    assert model.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (1, 19)
    assert all(module.handle for module in held)  # nobody read a weight
    model.save_pretrained(tmp_path / "again")
    state, again = plain.state_dict(), moecompress.load(tmp_path / "again").state_dict()
    assert state.keys() == again.keys() and all(torch.equal(state[name], again[name]) for name in state)
