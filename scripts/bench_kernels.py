"""Kernels on layers of real sizes: time, bandwidth and peers in the same run.

    python scripts/bench_kernels.py --device cpu [--quick] [--json FILE|-] [--threads 1,2] [--shapes qwen3,mixtral]
                                    [--bits 4,3] [--tokens 1,4,16,64,256] [--activation-bits 8] [--no-peers]

Weights are random, and each repetition uses other experts, so that weights come from memory and not from a cache.
`gbs` counts the bytes of the experts that were used (codes and scales), once; `fraction_of_bandwidth` compares it with
a plain read of memory, median with median. Bit widths, reads and peers take turns, so that other work on the machine
meets them alike. A peer that is not installed is named in `skipped`. `ms` and what peers took are medians; `min_ms` is
the best repetition.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kernel_peers import PEERS, Experts, Peer
from torch import Tensor

from moecompress import ops
from moecompress.checkpoint.native import plan_record
from moecompress.types import Activation, Scheme
from moecompress_kernels import cpu

# hidden, width, experts, experts per token
SHAPES = {
    "qwen3": ("Qwen3-30B-A3B", 2048, 768, 128, 8),
    "mixtral": ("Mixtral-8x7B", 4096, 14336, 8, 2),
    "olmoe": ("OLMoE-1B-7B", 2048, 1024, 64, 8),
}
GROUP = 128


class Layer:
    """Random packed experts of one shape, and routing that touches other experts in every repetition."""

    def __init__(self, shape: str, bits: int, device: torch.device, activation: Activation = "none") -> None:
        self.title, hidden, width, self.experts, self.per_token = SHAPES[shape]
        self.shape, self.hidden, self.width, self.bits, self.activation = shape, hidden, width, bits, activation
        scheme = Scheme(bits, GROUP, activation=activation)
        sizes = (("gate_up", (2 * width, hidden)), ("down", (hidden, width)))
        layout = plan_record([(name, size, scheme, torch.bfloat16) for name, size in sizes])
        self.layer = ops.describe_layer([layout], self.experts, ops.Activation("silu"))
        self.record_bytes = layout.row_bytes
        records = torch.randint(0, 256, (self.experts, layout.row_bytes), dtype=torch.uint8)
        for _, matrix in layout.matrices:
            _, scales, _ = matrix.views(records)
            assert scales is not None
            scales.copy_(torch.rand(scales.shape) * 0.01 + 0.005)
        slots = torch.stack([torch.zeros(self.experts), torch.arange(self.experts)], 1).int()
        self.choice = ops.choose(self.layer, device)
        name = self.choice.backend
        held = ops.backend(name).prepare(self.layer, [records.to(device)], slots.to(device), [])
        self.handle = ops.sealed(name, self.layer, held)

    def routing(self, tokens: int, turn: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """One token: the next experts in turn. Several: a random draw."""
        g = torch.Generator().manual_seed(turn)
        x = torch.randn(tokens, self.hidden, generator=g).bfloat16()
        if tokens == 1:
            ids = (torch.arange(self.per_token) + turn * self.per_token)[None] % self.experts
        else:
            ids = torch.rand(tokens, self.experts, generator=g).argsort(-1)[:, : self.per_token].contiguous()
        gates = torch.rand(tokens, self.per_token, generator=g)
        return x.to(device), ids.to(device), gates.to(device)

    def run(self, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return ops.moe_mlp(*inputs, self.handle, self.choice.backend, self.layer.text)


Run = tuple[Callable[[Any], Any], list[Any]]  # what to call, and the inputs that it gets in turn


def in_turn(runs: list[Run], seconds: float) -> list[tuple[float, float]]:
    """(median, least) milliseconds of each, `seconds` for each and three calls at least.

    They take turns of a tenth of that, so that what else goes on in the machine meets all of them alike.
    """
    times: list[list[float]] = [[] for _ in runs]
    for run, inputs in runs:
        run(inputs[0])
    for _ in range(10):
        for own, (run, inputs) in zip(times, runs, strict=True):
            began = time.perf_counter()
            while len(own) < 3 or time.perf_counter() - began < seconds / 10:
                start = time.perf_counter()
                run(inputs[len(own) % len(inputs)])
                own.append((time.perf_counter() - start) * 1e3)
                if sum(own) > seconds * 1e3 and len(own) >= 3:  # slow ones: not a call for every turn
                    break
    return [(statistics.median(own), min(own)) for own in times]


def large_memory() -> Tensor:
    """512 MiB in large pages, as the kernels' weights are: what reading it takes is what memory gives."""
    memory = torch.empty(1 << 29, dtype=torch.uint8)
    cpu.prefer_huge_pages(memory)
    return memory.fill_(1)


def bench_cpu(arguments: argparse.Namespace) -> dict[str, Any]:
    seconds = 0.3 if arguments.quick else 1.5
    rows: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    memory = large_memory()
    for shape in arguments.shapes:
        layers = [Layer(shape, bits, torch.device("cpu"), arguments.activation) for bits in arguments.bits]
        peers = {} if arguments.no_peers else _peers(shape, skipped)
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            for peer in peers.values():
                peer.threads(threads)
            for tokens in arguments.tokens:
                compared = peers if tokens in arguments.peer_tokens else {}
                rows += _rows(layers, compared, threads, tokens, seconds, memory)
    rows.sort(key=lambda row: (list(SHAPES).index(row["key"]), -row["bits"], row["threads"], row["M"]))
    return {
        "device": processor(),
        "backend": ops.backend("cpu").describe(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "skipped": skipped,
        "rows": rows,
    }


def _rows(
    layers: list[Layer], peers: dict[str, Peer], threads: int, tokens: int, seconds: float, memory: Tensor
) -> list[dict[str, Any]]:
    """One row for each layer, of measurements that took turns with each other, the peers and plain reads of memory."""
    inputs = [
        [layer.routing(tokens, turn, torch.device("cpu")) for turn in range(layer.experts if tokens == 1 else 4)]
        for layer in layers
    ]
    runs: list[Run] = [(layer.run, own) for layer, own in zip(layers, inputs, strict=True)]
    for peer in peers.values():
        runs.append(
            (peer.run, [peer.routing(tokens, turn) for turn in range(peer.sizes.experts if tokens == 1 else 2)])
        )
    *times, (read, _) = in_turn([*runs, (cpu.read_seconds, [memory])], seconds)
    bandwidth = memory.nbytes / read / 1e6
    medians = dict(zip(peers, (median for median, _ in times[len(layers) :]), strict=True))
    rows = []
    for layer, own, (median, least) in zip(layers, inputs, times, strict=False):
        used = statistics.mean(len(ids.unique()) for _, ids, _ in own)
        gbs = used * layer.record_bytes / median / 1e6
        rows.append(
            {
                "shape": layer.title,
                "key": layer.shape,
                "M": tokens,
                "bits": layer.bits,
                "inputs": layer.activation,
                "threads": threads,
                "ms": median,
                "min_ms": least,
                "gbs": gbs,
                "read_gbs": bandwidth,
                "fraction_of_bandwidth": gbs / bandwidth,
                "gflops": 6e-6 * tokens * layer.per_token * layer.hidden * layer.width / median,
                "backend": layer.choice.backend,
                "peers": {name: ms for name, ms in medians.items() if layer.bits in peers[name].bits},
            }
        )
    return rows


def _peers(shape: str, skipped: dict[str, str]) -> dict[str, Peer]:
    """The peers that are installed, with weights of this shape."""
    _, hidden, width, experts, per_token = SHAPES[shape]
    made = {}
    for name, make in PEERS.items():
        try:
            made[name] = make(Experts(hidden, width, experts, per_token, GROUP))
        except ModuleNotFoundError as error:
            skipped[name] = f"{error.name} is not installed"
    return made


def processor() -> str:
    """The name of this machine's CPU."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    names = list(dict.fromkeys(name for row in result["rows"] for name in row["peers"]))
    head = ["layer", "bits", "threads", "tokens", "ms (min)", "GB/s", "of a plain read", "GFLOP/s"]
    lines = ["| " + " | ".join([*head, *(f"x {name}" for name in names)]) + " |"]
    lines.append("|" + "---|" * (len(head) + len(names)))
    for row in result["rows"]:
        cells = [row["shape"], row["bits"], row["threads"], row["M"], f"{row['ms']:.2f} ({row['min_ms']:.2f})"]
        cells += [f"{row['gbs']:.1f}", f"{100 * row['fraction_of_bandwidth']:.0f} %", f"{row['gflops']:.0f}"]
        cells += [f"{row['peers'][n] / row['ms']:.1f}" if n in row["peers"] else "" for n in names]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> int:
    chooser = argparse.ArgumentParser(add_help=False)
    chooser.add_argument("--device")
    chosen, words = chooser.parse_known_args()
    if chosen.device == "cuda":  # which has its own sizes, checks and way of timing
        from bench_cuda import main as bench_cuda

        return bench_cuda(words)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="short measurements, fewer sizes")
    parser.add_argument("--json", help="write the rows there; - is standard output")
    parser.add_argument("--threads", type=numbers, default=None)
    parser.add_argument("--shapes", type=lambda text: text.split(","), default=None)
    parser.add_argument("--bits", type=numbers, default=[4, 3])
    parser.add_argument("--tokens", type=numbers, default=None)
    parser.add_argument("--peer-tokens", type=numbers, default=[1, 16, 64, 256], help="sizes at which peers run")
    parser.add_argument("--activation-bits", choices=("4", "8"), help="inputs rounded per token, integer products")
    parser.add_argument("--no-peers", action="store_true")
    arguments = parser.parse_args()
    arguments.activation = f"int{arguments.activation_bits}" if arguments.activation_bits else "none"
    cores = len(os.sched_getaffinity(0))
    arguments.threads = arguments.threads or sorted({1, min(2, cores)})
    arguments.shapes = arguments.shapes or (["qwen3"] if arguments.quick else ["qwen3", "mixtral"])
    arguments.tokens = arguments.tokens or ([1, 16] if arguments.quick else [1, 4, 16, 64, 256])
    if reason := ops.unavailable("cpu"):
        print(f"bench_kernels: the compiled CPU kernels cannot run: {reason}", file=sys.stderr)
        return 2
    result = bench_cpu(arguments)
    if arguments.json == "-":
        print(json.dumps(result, indent=1))
        return 0
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['device']}; {result['backend']}; torch {result['torch']}; load {result['load']:.1f}")
    print(table(result))
    for name, reason in result["skipped"].items():
        print(f"skipped {name}: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
