"""What the tests of passes that leave fewer experts share: whole runs on a few tokens, and which experts they kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import engine
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moecompress.load import load

IDS = engine.random_ids(4, 24)


def execute(folder: Path, model: Path, passes: Sequence[Any], ids: Tensor = IDS, **sections: Any) -> Path:
    """Run a recipe on these tokens; returns the output."""
    folder.mkdir(exist_ok=True)
    save_file({"ids": ids.int()}, folder / "tokens.safetensors")
    tokens = {"source": "tokens", "files": [str(folder / "tokens.safetensors")], "samples": ids.shape[0], "heldout": 0}
    sections.setdefault("calibration", {**tokens, "length": ids.shape[1]})
    done = engine.command("run", engine.write_recipe(folder, model, passes, **sections))
    assert done.code == 0, done.err
    return folder / "out"


def kept_experts(out: Path) -> list[list[int]]:
    """Of every MoE layer the experts that have weights in the output."""
    rows = engine.read_json(out / "moecompress" / "report.json")["layers"]
    return [[e["id"] for e in row["experts"] if not e["action"].startswith(("pruned", "merged"))] for row in rows]


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint directory."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def generates(out: Path) -> None:
    """Whether transformers loads an output and generates with it."""
    with torch.no_grad():
        made = load(out).generate(IDS[:1, :8], max_new_tokens=2, min_new_tokens=2, pad_token_id=0)
    assert made.shape == (1, 10)
