"""With a compiler, generating text from packed weights runs the compiled kernels, and nothing else."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import engine
import families
import pytest
import torch
from torch import nn

import moecompress
from moecompress import doctor
from moecompress.errors import RecipeError
from moecompress.experts import PackedExperts
from moecompress.packed import Packed, backends
from moecompress.stream.model import open_model
from moecompress_kernels import cpu

HAS_COMPILER = any(shutil.which(name) for name in ("c++", "g++", "clang++"))


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("packed")
    source = families.save_tiny("qwen3_moe", root / "source")
    step = {"quantize.rtn": {"bits": 4, "group_size": 16, "targets": ["routed_experts", "attention"]}}
    output = {"dir": str(root / "out"), "format": "native"}
    recipe = root / "recipe.yaml"
    recipe.write_text(json.dumps({"model": str(source), "passes": [step], "output": output}))
    return moecompress.run(recipe)


@pytest.mark.skipif(not HAS_COMPILER, reason="there is no compiler")
def test_a_compiler_means_compiled_kernels(native: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu.unavailable() is None
    model = moecompress.load(native)

    def never(*_: Any) -> Any:
        raise AssertionError("a packed weight was expanded")

    monkeypatch.setattr("moecompress.ops.dequantize", never)
    ids = torch.arange(5, 10)[None]
    assert model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape == (1, 9)
    packed = [module for module in model.modules() if isinstance(module, Packed)]
    assert len(packed) > families.LAYERS and all(module.choice.backend == "cpu" for module in packed)  # type: ignore[union-attr]
    assert len(backends(model)) == 1 and backends(model)[0].startswith(f"{len(packed)} packed modules by cpu, ")


@pytest.mark.skipif(not HAS_COMPILER, reason="there is no compiler")
def test_a_loaded_model_is_one_graph(native: Path) -> None:
    model = moecompress.load(native)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for length in (5, 9):
            ids = torch.arange(5, 5 + length)[None]
            assert torch.equal(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    assert all(module.choice.backend == "cpu" for module in model.modules() if isinstance(module, Packed))  # type: ignore[union-attr]


@pytest.mark.skipif(not HAS_COMPILER, reason="there is no compiler")
def test_the_report_names_who_ran_and_why_not_a_better_one(native: Path) -> None:
    """In the words of doctor."""
    said = engine.read_json(native / "moecompress" / "report.json")["backend"]
    rows = {row["backend"]: row for row in doctor.kernels()}
    assert " packed modules by cpu, " in said and rows["cpu"]["reason"].split(",")[0] in said
    for better in ("cuda", "triton"):
        reason = "the weights are on cpu" if rows[better]["available"] else rows[better]["reason"]
        assert f"not {better}: {reason}" in said, said


def test_int8_inputs_are_asked_for_named_and_not_saved(native: Path, tmp_path: Path) -> None:
    """The packed model and the streamed one round the same inputs; without being asked nothing is rounded."""
    ids = torch.arange(5, 25)[None]
    plain, asked = (moecompress.load(native, dtype=torch.float32, activation_bits=bits) for bits in (None, 8))
    with torch.no_grad():
        exact, found = plain(ids).logits, asked(ids).logits
    streamed = engine.streamed_logits(open_model(native, activation_bits=8), ids, tmp_path / "hidden")
    distance = float((found - streamed).norm() / streamed.norm())
    assert distance < 1e-5 < 1e-4 < float((found - exact).norm() / exact.norm()) < 0.1, distance
    assert all(row.endswith("inputs rounded to int8") for row in backends(asked))
    assert not any("rounded" in row for row in backends(plain))
    asked.save_pretrained(tmp_path / "saved")
    assert not any("rounded" in row for row in backends(moecompress.load(tmp_path / "saved")))


def test_int8_inputs_that_cannot_be(native: Path) -> None:
    with pytest.raises(RecipeError, match="activation_bits: 4. Allowed: 8"):
        moecompress.load(native, activation_bits=4)
    with pytest.raises(RecipeError, match="not dequantized"):
        moecompress.load(native, activation_bits=8, dequantize=True)
    for opened in (moecompress.load, open_model):
        with pytest.raises(RecipeError, match="native format"):
            opened(native.parent / "source", activation_bits=8)


def first_packed(model: nn.Module) -> Packed:
    return next(module for module in model.modules() if isinstance(module, Packed))


def test_records_are_held_once(native: Path) -> None:
    """While a backend holds the weights the records are gone, and the other way round."""
    module = first_packed(moecompress.load(native))
    if module.prepare().backend == "torch":
        pytest.skip("there is no compiler")
    assert module.rec0.numel() == 0 and module.handle
    before = module.record(0).clone()
    module.restore()
    assert module.rec0.numel() and not module.handle
    assert torch.equal(module.record(0), before)


def test_copies_and_gradients(native: Path) -> None:
    model = moecompress.load(native, dtype=torch.float32)
    ids = torch.arange(5, 10)[None]
    with torch.no_grad():
        wanted = model(ids).logits
        assert torch.equal(copy.deepcopy(model)(ids).logits, wanted)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits  # gradients are asked for: PyTorch's own operations
    assert float((logits.detach() - wanted).norm() / wanted.norm()) < 1e-5
    logits.sum().backward()
    assert embedded.grad is not None and bool(embedded.grad.abs().sum() > 0)
    router = torch.ones(3, 2, requires_grad=True)  # trained alone: what enters the experts needs no gradient
    first = next(module for module in model.modules() if isinstance(module, PackedExperts))
    first(torch.randn(3, embedded.shape[-1]), torch.tensor([[0, 1]] * 3), router).square().sum().backward()
    assert router.grad is not None and bool(router.grad.abs().sum() > 0)
    state = model.state_dict()
    model.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, wanted)


def test_weights_are_named_when_no_kernel_fits(native: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moecompress.packed.ops.unavailable", lambda name: "for a test")
    model = moecompress.load(native)
    assert all("torch" in row and "not cpu: for a test" in row for row in backends(model))
    assert isinstance(first_packed(model), nn.Module)
