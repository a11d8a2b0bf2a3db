"""Experts that see few tokens or none: a whole run stays finite and names them in report, warnings and decisions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engine
import planted
import pytest
import torch
from safetensors.torch import save_file

IDS = engine.random_ids(4, 64, vocabulary=4096)


def run(folder: Path, model: Path, passes: list[Any]) -> Any:
    save_file({"ids": IDS}, folder / "ids.safetensors")
    calibration = {"source": "tokens", "files": [str(folder / "ids.safetensors")], "samples": 4, "length": 64}
    recipe = engine.write_recipe(folder, model, passes, calibration={**calibration, "heldout": 0})
    return engine.command("run", recipe)


@pytest.fixture
def never(bench_a: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    engine.reload_here(monkeypatch)
    return planted.routed_expert(bench_a, tmp_path / "model", IDS)


def test_a_never_routed_expert_is_finite_and_listed(never: Path, tmp_path: Path) -> None:
    """With smoothing before it, too: the scale shared by all experts must reach the one that no token does."""
    smooth = {"smooth.awq": {"bits": 3, "group_size": 32, "grid": "minmax", "ratios": 4}}
    done = run(tmp_path, never, [smooth, {"quantize.gptq": {"bits": 3, "group_size": 32, "min_tokens": 16}}])
    assert done.code == 0, done.err
    report = engine.read_json(tmp_path / "out" / "moecompress" / "report.json")
    for layer in report["layers"]:
        row = layer["experts"][16]
        assert row["tokens"] == 0 and row["fallback"] == "shrink" and row["bits"] == {"gate_up": 3, "down": 3}
        assert row["action"] == "quantized" and 0 < row["weight_error"] < 0.2 and row["error"] is None
        # thin experts are treated alike, others are not; routing differs a little between the two streams
        assert all(expert["fallback"] == "shrink" for expert in layer["experts"] if expert["tokens"] < 8)
        assert all(expert["fallback"] is None for expert in layer["experts"] if expert["tokens"] > 32)
        assert f"layer {layer['layer']}: no calibration token reached experts [16]" in report["warnings"]
    listed = [line for line in report["warnings"] if "fallback shrink for experts" in line]
    assert len(listed) == 4 and all("16" in line for line in listed)
    page = (tmp_path / "out" / "moecompress" / "report.md").read_text()
    assert "fallback shrink for experts" in page
    logits = engine.own_logits(tmp_path / "out", IDS)
    assert bool(torch.isfinite(logits).all())
    assert engine.difference(logits, engine.own_logits(never, IDS)) < 0.5


def test_demanded_coverage_stops_the_run_and_leaves_nothing(never: Path, tmp_path: Path) -> None:
    done = run(
        tmp_path, never, [{"quantize.gptq": {"bits": 3, "group_size": 32, "min_tokens": 1, "fallback": "error"}}]
    )
    assert done.code == 2 and "layer 0 expert 16 gate_up: 0 calibration tokens" in done.err
    assert "all_experts: true" in done.err and "Traceback" not in done.err
    assert not (tmp_path / "out").exists()


def test_all_experts_need_no_fallback(never: Path, tmp_path: Path) -> None:
    passes = [{"quantize.gptq": {"bits": 3, "group_size": 32, "all_experts": True, "fallback": "error"}}]
    done = run(tmp_path, never, passes)
    assert done.code == 0, done.err
    report = engine.read_json(tmp_path / "out" / "moecompress" / "report.json")
    assert all(layer["experts"][16]["fallback"] is None for layer in report["layers"])


@pytest.mark.parametrize(
    "quantizer, said",
    [
        ({"group_size": 48}, "works: 16, 32, 64, 128, -1"),
        ({"group_size": 32, "order": "act"}, "works: order: gar, static_groups: true, or group_size: -1"),
        ({"bits": 5}, "bits"),
    ],
)
def test_plan_refuses_what_cannot_be(quantizer: dict[str, Any], said: str, bench_a: Path, tmp_path: Path) -> None:
    save_file({"ids": IDS}, tmp_path / "ids.safetensors")
    calibration = {"source": "tokens", "files": [str(tmp_path / "ids.safetensors")], "samples": 4, "length": 64}
    recipe = engine.write_recipe(tmp_path, bench_a, [{"quantize.gptq": quantizer}], calibration=calibration)
    done = engine.command("plan", recipe)
    assert done.code == 2 and said in done.out + done.err


def test_data_is_asked_for(bench_a: Path, tmp_path: Path) -> None:
    done = engine.command("plan", engine.write_recipe(tmp_path, bench_a, [{"quantize.gptq": {"group_size": 32}}]))
    assert done.code == 2 and "needs data" in done.out + done.err and "add e.g. `calibration:" in done.out + done.err
