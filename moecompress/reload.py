"""The reload check, run in a process of its own: load an output directory, compare it with what the run computed.

`python -P -m moecompress.reload DIR PROBE THREADS BYTES` prints one JSON line; a difference is an error. PROBE is the
folder of the run's layers on a few tokens (stream/probe.py).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from moecompress.stream.layers import experts_of, filled_layer
from moecompress.stream.model import StreamModel, open_model
from moecompress.stream.probe import ask_experts, expert_errors, fed, flow_errors, relative
from moecompress.stream.skeleton import read_config_json
from moecompress.stream.streams import final_logits, run_layer, start_run
from moecompress.types import TokenSet

ENDS = "ends.safetensors"  # ids, logits
_EXPERT = 1e-4  # a scale that is off by 1 % gives ten times as much; another order of sums a tenth
_TOLERANCE = 1e-3  # median over the tokens of a layer; ties (see stream/probe.py) leave it alone
_OUTLIERS = 0.05  # tokens of all layers that may be off by ten times as much: their ties


@dataclass(frozen=True)
class Probe:
    """What the run computed. layers: per layer what `probed` has kept."""

    ids: Tensor
    logits: Tensor
    layers: tuple[Mapping[str, Tensor], ...]

    @staticmethod
    def read(folder: Path) -> Probe:
        """Raises CheckpointError for files that are no safetensors."""
        ends = load_tensors(folder / ENDS)
        layers = [load_tensors(path) for path in sorted(folder.glob("[0-9]*.safetensors"))]
        return Probe(ends["ids"], ends["logits"], tuple(layers))

    @property
    def entered(self) -> list[Tensor]:
        return [layer["entered"] for layer in self.layers]


@dataclass(frozen=True)
class Found:
    """What the loaded model computes: what arrives at each layer, the logits, and its experts' outputs by layer."""

    arrived: Mapping[int, Tensor]
    logits: Tensor
    experts: Mapping[int, Tensor]
    backend: str


def compare(probe: Probe, found: Found) -> float:
    """The largest of all layers' median relative differences. Raises OutputError beyond the tolerances."""
    errors = flow_errors(probe.entered, found.arrived)
    errors.append(relative(found.logits, probe.logits, probe.logits))
    names = ["embeddings", *(f"layer {index}" for index in range(len(probe.layers) - 1)), "logits"]
    medians = [float(each.median()) for each in errors]
    problems = [
        f"{name} differ: median {median:.1e} (allowed: {_TOLERANCE:g})"
        for name, median in zip(names, medians, strict=True)
        if not median <= _TOLERANCE
    ]
    bad = float((~(torch.cat(errors) <= 10 * _TOLERANCE)).double().mean())
    if not problems and bad > _OUTLIERS:
        problems.append(f"{100 * bad:.0f} % of tokens differ by {10 * _TOLERANCE:g} (allowed: {100 * _OUTLIERS:g} %)")
    for index, outputs in found.experts.items():
        kept = probe.layers[index]
        each = expert_errors(outputs, kept["outputs"], kept["ids"])
        wrong = (~(each <= _EXPERT)).nonzero().flatten().tolist()
        if wrong:
            worst = f"by up to {float(each.max()):.1e} (allowed: {_EXPERT:g})"
            problems.append(f"layer {index}: {len(wrong)} experts differ {worst}: {wrong[:5]}")
    if problems:
        raise OutputError(message("reload check", "; ".join(problems[:4])))
    return max(medians)


def whole(root: Path, probe: Probe, portable: bool = False) -> Found:
    """The model loaded by transformers, the way a user loads it, computing in float32."""
    from moecompress.load import load

    model: Any = load(root, dtype=torch.float32)
    if portable:
        nn.Module.float(model)  # transformers leaves its experts in the dtype of the scales
    known = open_model(root)
    with torch.no_grad(), fed(list(model.get_submodule(known.layers_name)), probe.entered) as arrived:
        logits = model(input_ids=probe.ids, use_cache=False).logits.float()
    experts = {}
    for layer in known.facts.moe_layers:
        assert layer.site is not None
        module, kept = model.get_submodule(f"{layer.name}.{layer.site.experts}"), probe.layers[layer.index]
        experts[layer.index] = ask_experts(module, kept["inputs"], kept["ids"])
    return Found(arrived, logits, experts, backend_name(model))


def streamed(root: Path, probe: Probe, folder: Path) -> Found:
    """The model with one layer in memory at a time."""
    model = open_model(root)
    tokens = TokenSet("reload", probe.ids, {}, "")
    run = start_run(model, tokens, folder, batch_tokens=BATCH_TOKENS, streams=("original",))
    arrived, experts = {}, {}
    for index, kept in enumerate(probe.layers):
        store = run.store("original", index)
        arrived[index] = store.read(0, 1)
        store.write(0, kept["entered"])
        weights = model.read_layer(index)
        run_layer(model, weights, run, "original")
        if weights.experts:
            experts[index] = _streamed_experts(model, weights, kept)
    logits = torch.cat([logits for _, logits in final_logits(model, run, "original")])
    for generation in (0, 1):
        run.store("original", generation).remove()
    return Found(arrived, logits, experts, STREAMED)


def _streamed_experts(model: StreamModel, weights: Any, kept: Mapping[str, Tensor]) -> Tensor:
    site = model.facts_of(weights).site
    assert site is not None
    with filled_layer(model, weights) as layer:
        return ask_experts(experts_of(layer, site.experts), kept["inputs"], kept["ids"])


def main(arguments: Sequence[str]) -> None:
    """Check DIR against the folder PROBE."""
    root, folder, threads, weights = Path(arguments[0]), Path(arguments[1]), int(arguments[2]), int(arguments[3])
    torch.set_num_threads(threads)
    probe = Probe.read(folder)
    block = read_config_json(root).get("quantization_config") or {}
    portable = block.get("quant_method") == QUANT_METHOD
    lacking = portable and find_spec("compressed_tensors") is None
    fits = fits_in_memory(weights) and not lacking
    if fits:
        found, how = whole(root, probe, portable), "whole model through transformers"
    else:
        found = streamed(root, probe, folder.parent / "hidden")
        how = "streamed, compressed-tensors is not installed" if lacking else "streamed, larger than memory"
    difference = compare(probe, found)
    print(json.dumps({"how": how, "whole": fits, "difference": difference, "backend": found.backend}))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Exception as error:  # the parent process shows the last lines of what is printed here
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
