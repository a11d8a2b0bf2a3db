"""Kernels on a CUDA device: build, check against float64, time; what `bench_kernels.py --device cuda` runs.

    python scripts/bench_cuda.py [--quick] [--json FILE|-] [--shapes qwen3,mixtral,...] [--bits 4,3] [--tokens 1,4,...]
                                 [--no-checks]

Both backends of the device are timed, each where it can run: `cuda`, the compiled library, and `triton`; on compute
capability 9.0 also `cuda wgmma`, the library's other prefill, where a block of it has 64 tokens or more. Times are
medians of CUDA graph replays. A graph holds several calls, each with other experts where the layer has enough, so that
weights come from memory and not from the cache. `gbs` counts the bytes of the experts that were used (codes and scales)
once; `fraction_of_bandwidth` compares with a copy on the device, measured in the same run. The peer is PyTorch's
grouped product of the same experts in bfloat16, captured in the same way.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moecompress import ops
from moecompress.checkpoint.native import plan_record
from moecompress.types import Scheme
from moecompress_kernels import cuda

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {  # title, hidden, width, experts, experts per token
    "qwen3": ("Qwen3-30B-A3B", 2048, 768, 128, 8),
    "olmoe": ("OLMoE-1B-7B", 2048, 1024, 64, 8),
    "dsv2lite": ("DeepSeek-V2-Lite", 2048, 1408, 64, 6),
    "humming": ("H2688 I2048 E128 top8", 2688, 2048, 128, 8),
    "mixtral": ("Mixtral-8x7B", 4096, 14336, 8, 2),
    "dsv3": ("DeepSeek-V3", 7168, 2048, 256, 8),
}
BACKENDS = ("cuda", "triton")
PEER = "torch bf16 grouped"
TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096]
GROUP = 128
CALLS = 8  # in one graph
COPIED = 1 << 31  # bytes

Inputs = tuple[Tensor, Tensor, Tensor]


def packed_layer(shape: str, bits: int, backend: str) -> tuple[ops.Layer, list[Tensor], int]:
    """(layer, handle of random experts on the device, bytes of one expert)."""
    _, hidden, width, experts, _ = SHAPES[shape]
    sizes = (("gate_up", (2 * width, hidden)), ("down", (hidden, width)))
    layout = plan_record([(name, size, Scheme(bits, GROUP), torch.bfloat16) for name, size in sizes])
    layer = ops.describe_layer([layout], experts, ops.Activation("silu"))
    records = torch.randint(0, 256, (experts, layout.row_bytes), dtype=torch.uint8, device="cuda")
    for _, matrix in layout.matrices:
        _, scales, _ = matrix.views(records)
        assert scales is not None
        scales.copy_(torch.rand(scales.shape, device="cuda") * 0.01 + 0.005)
    slots = torch.stack([torch.zeros(experts), torch.arange(experts)], 1).int().cuda()
    return (
        layer,
        ops.sealed(backend, layer, ops.backend(backend).prepare(layer, [records], slots, [])),
        layout.row_bytes,
    )


def routing(shape: str, tokens: int, turn: int) -> Inputs:
    """One token: the next experts in turn. Several: a uniform draw."""
    _, hidden, _, experts, per_token = SHAPES[shape]
    g = torch.Generator().manual_seed(turn)
    if tokens == 1:
        ids = (torch.arange(per_token) + turn * per_token)[None] % experts
    else:
        ids = torch.rand(tokens, experts, generator=g).argsort(-1)[:, :per_token].contiguous()
    x, gates = torch.randn(tokens, hidden, generator=g).bfloat16(), torch.rand(tokens, per_token, generator=g)
    return x.cuda(), ids.cuda(), gates.cuda()


def graph_ms(run: Callable[[Inputs], Tensor], inputs: list[Inputs], seconds: float) -> float:
    """Median milliseconds of one call, from replays of a graph of all calls."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for one in inputs:
            run(one)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [run(one) for one in inputs]
    times: list[float] = []
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    while len(times) < 20 or sum(times) * len(inputs) < 1e3 * seconds:
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / len(inputs))
    assert all(bool(out.isfinite().all()) for out in kept)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """GB/s read and written by a copy of 2 GiB on the device, the best of several."""
    source = torch.empty(COPIED, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        start.record()
        target.copy_(source)
        stop.record()
        stop.synchronize()
        best = min(best, start.elapsed_time(stop))
    return 2 * source.nbytes / best / 1e6


class Grouped:
    """The same experts in bfloat16 through PyTorch's grouped product: sort, two products, sum over slots."""

    def __init__(self, shape: str) -> None:
        _, hidden, width, self.experts, self.per_token = SHAPES[shape]
        made = {"dtype": torch.bfloat16, "device": "cuda"}
        self.up = torch.randn(self.experts, hidden, 2 * width, **made) / hidden**0.5  # type: ignore[call-overload]
        self.down = torch.randn(self.experts, width, hidden, **made) / width**0.5  # type: ignore[call-overload]

    def run(self, inputs: Inputs) -> Tensor:
        x, ids, gates = inputs
        order = ids.flatten().argsort(stable=True)
        ends = F.one_hot(ids.flatten(), self.experts).sum(0).cumsum(0).int()
        rows = torch.div(order, self.per_token, rounding_mode="floor")
        gate, up = F.grouped_mm(x[rows], self.up, offs=ends).chunk(2, -1)
        y = F.grouped_mm(F.silu(gate) * up, self.down, offs=ends) * gates.flatten()[order, None].bfloat16()
        back = torch.empty_like(y)
        back[order] = y
        return back.view(*ids.shape, -1).sum(1)


def bench(backends: list[str], shapes: list[str], bits: list[int], tokens: list[int], seconds: float) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    bandwidth, rows = copy_bandwidth(), []
    for shape in shapes:
        peer = Grouped(shape)
        peer_ms = {count: graph_ms(peer.run, several(shape, count), seconds) for count in tokens}
        del peer
        for width in bits:
            for name in timed(backends):
                for row in bench_layer(name, shape, width, tokens, seconds):
                    row["fraction_of_bandwidth"] = row["gbs"] / bandwidth
                    row["peers"] = {PEER: peer_ms[row["M"]]}
                    rows.append(row)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "backends": {name: described(name) for name in timed(backends)},
        "torch": torch.__version__,
        "bandwidth_gbs": bandwidth,
        "rows": rows,
    }


def timed(backends: list[str]) -> list[str]:
    """Backends, and behind `cuda` its other prefill where the device has it."""
    properties = torch.cuda.get_device_properties(0)
    other = ["cuda wgmma"] if (properties.major, properties.minor) == (9, 0) else []
    return [name for one in backends for name in ([one, *other] if one == "cuda" else [one])]


@contextmanager
def chosen(name: str) -> Iterator[str]:
    """The backend of a name in `timed`, with its prefill in the environment."""
    backend, _, prefill = name.partition(" ")
    before = os.environ.get(cuda.PREFILL)
    os.environ[cuda.PREFILL] = prefill or "mma"
    try:
        yield backend
    finally:
        os.environ.pop(cuda.PREFILL)
        if before is not None:
            os.environ[cuda.PREFILL] = before


def described(name: str) -> str:
    with chosen(name) as backend:
        return ops.backend(backend).describe()


def bench_layer(name: str, shape: str, bits: int, tokens: list[int], seconds: float) -> Iterator[dict[str, Any]]:
    """Rows of one layer in one of `timed`, without what they are compared with."""
    title, hidden, width, experts, per_token = SHAPES[shape]
    backend = name.partition(" ")[0]
    layer, handle, expert_bytes = packed_layer(shape, bits, backend)
    if backend != name:  # fewer are not multiplied otherwise
        tokens = [n for n in tokens if n > cuda.DECODE_TOKENS and cuda.block_of(n * per_token / experts) >= 64]
    for count in tokens:
        inputs = several(shape, count)
        with chosen(name):
            ms = graph_ms(lambda one: ops.moe_mlp(*one, handle, backend, layer.text), inputs, seconds)
        used = statistics.mean(len(ids.unique()) for _, ids, _ in inputs)
        print(f"{title}, {bits} bits, {count} tokens, {name}: {1e3 * ms:.1f} us", file=sys.stderr, flush=True)
        row = {"backend": name, "shape": title, "M": count, "bits": bits, "ms": ms}
        yield row | {"gbs": used * expert_bytes / ms / 1e6, "tflops": 6e-9 * count * per_token * hidden * width / ms}


def several(shape: str, tokens: int) -> list[Inputs]:
    """Inputs of the calls of one graph."""
    return [routing(shape, tokens, turn) for turn in range(CALLS if tokens <= 256 else 2)]


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"| layer | bits | tokens | backend | us | GB/s | of copy bandwidth | TFLOP/s | x {PEER} |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        cells = [row["shape"], row["bits"], row["M"], row["backend"], f"{1e3 * row['ms']:.1f}", f"{row['gbs']:.0f}"]
        cells += [f"{100 * row['fraction_of_bandwidth']:.0f} %", f"{row['tflops']:.1f}"]
        cells.append(f"{row['peers'][PEER] / row['ms']:.2f}")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def checks() -> int:
    """`pytest -m gpu` on everything there is; its exit code."""
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-m", "gpu", "tests/gpu", "tests/kernels"]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape, few sizes, short measurements")
    parser.add_argument("--json", help="write the result there; - is standard output")
    parser.add_argument("--shapes", type=lambda text: text.split(","), default=None)
    parser.add_argument("--bits", type=lambda text: [int(one) for one in text.split(",")], default=[4, 3])
    parser.add_argument("--tokens", type=lambda text: [int(one) for one in text.split(",")], default=None)
    parser.add_argument("--no-checks", action="store_true", help="time without checking first")
    arguments = parser.parse_args(words)
    missing = {name: reason for name in BACKENDS if (reason := ops.unavailable(name))}
    for name, reason in missing.items():
        print(f"bench_cuda: {name} cannot run: {reason}", file=sys.stderr)
    backends = [name for name in BACKENDS if name not in missing]
    if not backends:
        return 2
    if not arguments.no_checks and checks():
        print("bench_cuda: checks failed, nothing is timed", file=sys.stderr)
        return 1
    shapes = arguments.shapes or (["qwen3"] if arguments.quick else list(SHAPES))
    tokens = arguments.tokens or ([1, 16, 256] if arguments.quick else TOKENS)
    result = bench(backends, shapes, arguments.bits, tokens, 0.1 if arguments.quick else 0.4)
    if arguments.json == "-":
        print(json.dumps(result, indent=1))
        return 0
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{result['device']} ({result['capability']}), copy {result['bandwidth_gbs']:.0f} GB/s, torch {result['torch']}"
    )
    print("; ".join(result["backends"].values()))
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
