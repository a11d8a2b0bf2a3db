"""1, 2, 3 and 4 bits mixed within the layers of the trained demo model: the file, and the model in a fresh process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import engine
import pytest
import torch
from safetensors.torch import load_file

import moecompress
from moecompress.calib.sources import resolve_text
from moecompress.calib.tokenizer import load_tokenizer
from moecompress.calib.tokens import windows
from moecompress.plan import make_plan
from moecompress.recipe import load_recipe

PASSES = [
    {"allocate.global": {"bits": [1, 2, 3, 4], "budget": "2.75 bpw", "tokens": 512, "sequences": 4}},
    {"quantize.gptq": {"group_size": 32}},
]
FRESH = """
import sys, torch, moecompress
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
experts = [m for m in model.modules() if type(m).__name__.startswith("PackedExperts")]
assert len(experts) == 4 and all(m.rec0.dtype == torch.uint8 for m in experts)
with torch.no_grad():
    logits = model(input_ids=load_file(sys.argv[2])["ids"], use_cache=False).logits
save_file({"logits": logits}, sys.argv[3])
"""


@pytest.fixture(scope="module")
def made(bench_a: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, torch.Tensor]:
    """(output directory, planned bytes, tokens)."""
    folder = tmp_path_factory.mktemp("mixed")
    tokenizer: Any = load_tokenizer(bench_a)
    text = resolve_text("python-stdlib:heldout")[:60_000]
    ids = windows(torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]), 96, 12)
    path = engine.write_recipe(folder, bench_a, PASSES, calibration=engine.token_calibration(folder, ids))
    recipe = load_recipe(path)
    planned = make_plan(recipe).estimate.output_bytes
    return moecompress.run(recipe), planned, ids


def test_every_layer_mixes_widths_and_the_file_is_as_planned(made: tuple[Path, int, torch.Tensor]) -> None:
    out, planned, _ = made
    report = engine.read_json(out / "moecompress" / "report.json")
    found = [{bits for e in row["experts"] for bits in e["bits"].values()} for row in report["layers"]]
    assert set.union(*found) == {1, 2, 3, 4} and all(len(widths) > 1 for widths in found)
    assert report["size"]["output_bytes"] == pytest.approx(planned, rel=0.001)
    assert sum(path.stat().st_size for path in out.glob("*.safetensors")) == pytest.approx(planned, rel=0.01)
    assert 2.7 < report["size"]["expert_bits_per_weight"] <= 2.75


def test_a_fresh_process_runs_packed_what_was_rounded(made: tuple[Path, int, torch.Tensor], tmp_path: Path) -> None:
    """Against transformers' own module on the expanded weights."""
    out, _, _ = made
    logits = tmp_path / "logits.safetensors"
    code = [sys.executable, "-P", "-c", FRESH, str(out), str(out.parent / "ids.safetensors"), str(logits)]
    done = subprocess.run(code, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = load_file(logits)["logits"]
    own: Any = moecompress.load(out, dtype=torch.float32, dequantize=True)
    with torch.no_grad():
        wanted = own(input_ids=made[2], use_cache=False).logits
    assert not any(type(module).__module__.startswith("moecompress") for module in own.modules())
    assert float((found - wanted).abs().max()) < 1e-3
