"""The reload check: what it must notice, what it must not mind, and why it asks layers and experts one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import engine
import families
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moecompress import finish
from moecompress.checkpoint.native import decode, encode
from moecompress.errors import OutputError
from moecompress.load import load
from moecompress.recipe import load_recipe
from moecompress.reload import Found, Probe, compare
from moecompress.run import run
from moecompress.stream.model import open_model
from moecompress.stream.probe import EACH, balanced_ids, expert_errors, flow_errors
from moecompress.types import ExpertWeights, QuantizedTensor

EXPERT = 5
Change = Callable[[ExpertWeights], ExpertWeights]


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"), [(64, 4, 16), (64, 8, 128), (64, 1, 8), (12, 2, 60), (64, 6, 6)]
)
def test_every_expert_is_asked_often_and_beside_others(tokens: int, top_k: int, experts: int) -> None:
    ids = balanced_ids(tokens, top_k, experts)
    assert ids.shape[1:] == (tokens, top_k)
    flat = ids.reshape(-1, top_k)
    assert int(torch.bincount(flat.flatten(), minlength=experts).min()) >= EACH
    assert all(len(set(row)) == top_k for row in flat.tolist())
    if top_k in (2, 4) and top_k < experts:
        for expert in range(experts):
            rows = flat[(flat == expert).any(1)]
            others = [set(row.tolist()) - {expert} for row in rows]
            assert not set.intersection(*others), "no neighbour in all of an expert's tokens"


def test_an_experts_error_is_that_of_its_best_token() -> None:
    ids = balanced_ids(16, 2, 8)
    wanted = torch.randn(*ids.shape[:2], 6, generator=torch.Generator().manual_seed(0))
    wrong = (ids == 3).any(-1)
    found = wanted + 0.01 * wrong[..., None]
    errors = expert_errors(found, wanted, ids)
    assert errors[3] > 1e-3 and int((errors > 0).sum()) == 1, "its neighbours have tokens without it"
    tie = torch.zeros_like(wrong)
    tie[0, 3] = True
    assert float(expert_errors(wanted + 0.5 * tie[..., None], wanted, ids).max()) == 0
    found[0, wrong[0], 0] = torch.nan
    assert torch.isinf(expert_errors(found, wanted, ids)[3])


def test_layers_are_measured_by_what_they_add() -> None:
    entered = [torch.ones(1, 4, 3) * 100, torch.ones(1, 4, 3) * 101]
    first, second = flow_errors(entered, {0: entered[0], 1: entered[1] + 0.1})
    assert float(first.max()) == 0
    assert torch.allclose(second, torch.full((4,), 0.1, dtype=torch.float64), rtol=1e-4)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """Outputs whose experts round their inputs to 8 and 4 bits, and the probes their runs have kept."""
    root = tmp_path_factory.mktemp("reload")
    source = families.save_tiny("qwen3_moe", root / "model")
    found: dict[int, Any] = {}
    for bits in (8, 4):
        with pytest.MonkeyPatch.context() as patch:
            engine.reload_here(patch)
            original = finish.reload_check

            def kept(job: Any, bits: int = bits, original: Any = original) -> Any:
                done = original(job)
                found[bits] = Probe.read(job.run.probe)
                return done

            patch.setattr(finish, "reload_check", kept)
            (root / str(bits)).mkdir()
            passes = [{"quantize.rtn": {"bits": 4, "group_size": 16, "activation_bits": bits}}]
            out = run(load_recipe(engine.write_recipe(root / str(bits), source, passes)))
        found[bits] = (out, found[bits])
    return found


def _changed(out: Path, folder: Path, change: Change) -> Path:
    """A copy of a native output in which one expert of the second layer is another."""
    folder.mkdir()
    for path in out.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    model = open_model(out)
    assert model.native is not None
    prefix = next(name for name in model.native.experts if ".1." in name)
    layout = model.native.experts[prefix].records[0]
    for path in out.glob("*.safetensors"):
        tensors = load_file(path)
        if f"{prefix}.rec0" in tensors:
            rows = tensors[f"{prefix}.rec0"]
            rows[EXPERT] = encode(layout, change(decode(layout, rows[EXPERT])))
        save_file(tensors, folder / path.name, {"format": "pt"})
    return folder


def _one_down_scale(expert: ExpertWeights) -> ExpertWeights:
    """The largest scale of `down`, one of hundreds, off by about 1 %."""
    assert isinstance(expert.down, QuantizedTensor)
    scales = expert.down.scales.clone()
    at = int(scales.float().abs().argmax())
    scales.view(-1)[at] *= 1.01
    assert 0.005 < float(scales.view(-1)[at]) / float(expert.down.scales.view(-1)[at]) - 1 < 0.015
    return replace(expert, down=replace(expert.down, scales=scales))


def _all_up_scales(expert: ExpertWeights) -> ExpertWeights:
    assert isinstance(expert.gate_up, QuantizedTensor)
    return replace(expert, gate_up=replace(expert.gate_up, scales=expert.gate_up.scales * 1.01))


@pytest.mark.parametrize("change", [_one_down_scale, _all_up_scales], ids=lambda change: change.__name__)
@pytest.mark.parametrize("bits", [8, 4])
def test_one_percent_in_one_expert_is_found_where_inputs_are_rounded(
    made: dict[int, Any], bits: int, change: Change, tmp_path: Path
) -> None:
    from moecompress.reload import streamed, whole

    out, probe = made[bits]
    wrong = _changed(out, tmp_path / "wrong", change)
    with pytest.raises(OutputError, match=rf"layer 1: 1 experts differ.*\[{EXPERT}\]"):
        compare(probe, whole(wrong, probe))
    with pytest.raises(OutputError, match=rf"layer 1: 1 experts differ.*\[{EXPERT}\]"):
        compare(probe, streamed(wrong, probe, tmp_path / "hidden"))
    # the logits of the whole model alone would have to allow for ties, and this is far below what ties make
    median, bad = _by_logits(_logits(out, probe.ids), _logits(wrong, probe.ids))
    assert median < 2e-2 and bad < 0.5
    assert compare(probe, streamed(out, probe, tmp_path / "hidden")) < 1e-5


def _logits(root: Path, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return load(root, dtype=torch.float32)(input_ids=ids, use_cache=False).logits[0].double()


def _by_logits(wanted: Tensor, found: Tensor) -> tuple[float, float]:
    each = (wanted - found).norm(dim=-1) / wanted.norm(dim=-1)
    return float(each.median()), float((each > 0.2).double().mean())


def test_layers_and_ends_have_to_agree(made: dict[int, Any], tmp_path: Path) -> None:
    """What is no expert: a wrong norm shows in the layer it is in, wrong logits and embeddings by their names."""
    from moecompress.reload import streamed

    out, probe = made[8]
    found = streamed(out, probe, tmp_path / "hidden")
    for changed, said in (
        (replace(found, logits=found.logits * 1.01), "logits differ"),
        (replace(found, arrived={**found.arrived, 0: found.arrived[0] * 1.01}), "embeddings differ"),
        (replace(found, arrived={**found.arrived, 2: found.arrived[2] * 1.01}), "layer 1 differ"),
        (replace(found, arrived={**found.arrived, 2: found.arrived[2] * torch.nan}), "layer 1 differ"),
        (_some_tokens(found, 0.2), "of tokens differ"),
    ):
        with pytest.raises(OutputError, match=said):
            compare(probe, changed)
    assert compare(probe, _some_tokens(found, 0.03)) < 1e-5, "a few ties are no error"


def _some_tokens(found: Found, share: float) -> Found:
    arrived = {index: value.clone() for index, value in found.arrived.items()}
    for value in arrived.values():
        value[:, : int(share * value.shape[1])] *= 2
    return replace(found, arrived=arrived)
