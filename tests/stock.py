"""Load directories with transformers alone, in a process of its own that never imports moecompress.

`run_stock` returns, per directory, logits, stacked experts and Linears. Started as a script it is that process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def run_stock(
    directories: Sequence[Path], ids: Tensor, folder: Path, dtype: str = "float32"
) -> dict[Path, dict[str, Tensor]]:
    """Directory -> {"logits": [N, T, V], "<module>.gate_up_proj": [E, 2I, H], "<module>.weight": [out, in], ...}.

    As stock transformers has them once it has run, loaded in `dtype`.
    """
    save_file({"ids": ids}, folder / "ids.safetensors")
    names = [str(path) for path in directories]
    command = [sys.executable, __file__, json.dumps(names), str(folder), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {path: load_file(folder / f"{n}.safetensors") for n, path in enumerate(directories)}


def _facts(path: str, ids: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3 and "experts" in name:
            found[name] = parameter.detach().clone()
            parameter.data = parameter.to(dtype)  # experts stay in the dtype of their scales whatever is asked for
    with torch.no_grad():
        found["logits"] = torch.cat([model(input_ids=row[None], use_cache=False).logits for row in ids])
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return found | {f"{name}.weight": module.weight.detach().clone() for name, module in linears.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    tokens = load_file(Path(sys.argv[2]) / "ids.safetensors")["ids"]
    for number, directory in enumerate(json.loads(sys.argv[1])):
        save_file(_facts(directory, tokens, getattr(torch, sys.argv[3])), Path(sys.argv[2]) / f"{number}.safetensors")
    assert not any(name.split(".")[0] == "moecompress" for name in sys.modules), "this process is to be without us"
