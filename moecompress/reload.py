"""The reload check, run in a process of its own: load an output directory, compare its logits with stored ones.

`python -P -m moecompress.reload DIR PROBE THREADS BYTES` prints one JSON line; a difference is an error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moecompress.checkpoint.portable import QUANT_METHOD
from moecompress.errors import OutputError, message
from moecompress.layerstore import load_tensors
from moecompress.memory import fits_in_memory
from moecompress.packed import STREAMED, backend_name
from moecompress.plan import BATCH_TOKENS
from moecompress.stream.model import open_model
from moecompress.stream.skeleton import read_config_json
from moecompress.stream.streams import final_logits, run_layer, start_run
from moecompress.types import TokenSet

_TOLERANCE = 1e-3  # median over tokens of |difference| / |logits|; a wrong weight gives far more
_OUTLIERS = 0.05  # tokens that may differ more: a tie in top-k broken the other way
_ROUNDED = (
    2e-2,
    0.5,
)  # both, where inputs are rounded: sums in another order break ties there, and later tokens see it


def compare(wanted: Tensor, found: Tensor, rounded: bool = False) -> float:
    """Median relative difference per token of logits [B, T, V]. Raises OutputError beyond the tolerance.

    rounded: whether inputs of matrices are rounded while the model runs."""
    tolerance, outliers = _ROUNDED if rounded else (_TOLERANCE, _OUTLIERS)
    a, b = wanted.reshape(-1, wanted.shape[-1]).double(), found.reshape(-1, found.shape[-1]).double()
    each = (a - b).norm(dim=-1) / a.norm(dim=-1).clamp_min(1e-12)
    median, bad = float(each.median()), float((~(each <= 10 * tolerance)).double().mean())
    if not median <= tolerance or bad > outliers:
        raise OutputError(
            message(
                "reload check",
                f"logits differ: median {median:.2e}, {100 * bad:.0f} % of tokens above {10 * tolerance:g}",
                f"median {tolerance:g}, {100 * outliers:.0f} %",
            )
        )
    return median


def whole_logits(root: Path, ids: Tensor, portable: bool = False) -> tuple[Tensor, str]:
    """Logits of the model loaded by transformers, the way a user loads it, computed in float32; and by whom."""
    from moecompress.load import load

    model: Any = load(root, dtype=torch.float32)
    if portable:
        nn.Module.float(model)  # transformers leaves its experts in the dtype of the scales
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float(), backend_name(model)


def streamed_logits(root: Path, ids: Tensor, folder: Path) -> Tensor:
    """Logits with one layer in memory at a time."""
    model = open_model(root)
    tokens = TokenSet("reload", ids, {}, "")
    run = start_run(model, tokens, folder, batch_tokens=BATCH_TOKENS, streams=("original",))
    for index in range(len(model.layers)):
        run_layer(model, model.read_layer(index), run, "original")
    out = torch.cat([logits for _, logits in final_logits(model, run, "original")])
    for generation in (0, 1):
        run.store("original", generation).remove()
    return out


def main(arguments: Sequence[str]) -> None:
    """Check DIR against PROBE (tensors `ids`, `logits`)."""
    root, probe, threads, weights = Path(arguments[0]), Path(arguments[1]), int(arguments[2]), int(arguments[3])
    torch.set_num_threads(threads)
    stored = load_tensors(probe)
    block = read_config_json(root).get("quantization_config") or {}
    portable = block.get("quant_method") == QUANT_METHOD
    matrices = [m for layout in block.get("layouts", []) for m in layout["matrices"].values()]
    rounded = any(matrix["activation"] != "none" for matrix in matrices)
    lacking = portable and find_spec("compressed_tensors") is None
    whole = fits_in_memory(weights) and not lacking
    if whole:
        found, backend = whole_logits(root, stored["ids"], portable)
        how = "whole model through transformers"
    else:
        found, backend = streamed_logits(root, stored["ids"], probe.parent / "hidden"), STREAMED
        how = "streamed, compressed-tensors is not installed" if lacking else "streamed, larger than memory"
    difference = compare(stored["logits"], found, rounded)
    print(json.dumps({"how": how, "whole": whole, "difference": difference, "backend": backend}))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Exception as error:  # the parent process shows the last lines of what is printed here
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
