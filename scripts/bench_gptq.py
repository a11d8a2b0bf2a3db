"""How fast GPTQ rounds one matrix, and where the time goes.

    OMP_NUM_THREADS=1 python scripts/bench_gptq.py [--shape 768x2048 ...] [--bits 3] [--group 128] [--json FILE]

A shape is rows x input columns. Rows printed: shape, bits, group, order, seconds of CPU and of the clock, weights per
second and thread (CPU), and the share of the CPU time in each part. Inputs are random with correlated columns; the time
depends on shapes only.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from moecompress.numerics import gptq as module
from moecompress.types import Scheme

SHAPES = ("768x2048", "2048x768", "14336x4096")
PARTS = {"factorise": "_inverse_factor", "find grids": "find_grid"}
ROUND = "round columns"
SPREAD = "spread errors"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=SHAPES, help="rows x input columns")
    parser.add_argument("--bits", nargs="+", type=int, default=[3])
    parser.add_argument("--group", nargs="+", type=int, default=[128])
    parser.add_argument("--order", default="gar", choices=("none", "act", "gar"))
    parser.add_argument("--json", help="also write the rows there")
    options = parser.parse_args(arguments)
    rows = []
    for shape in options.shape:
        out, columns = map(int, shape.split("x"))
        for bits in options.bits:
            for group in options.group:
                row = measure(out, columns, Scheme(bits, group, binary=bits == 1), options.order)
                rows.append(row)
                shares = ", ".join(f"{name} {share:.0%}" for name, share in row["parts"].items())
                speed = row["weights_per_second_per_thread"] / 1e6
                print(
                    f"{shape:>12} W{bits} g{group:<4} {row['cpu_seconds']:7.2f} s  {speed:6.2f} M weights/s  {shares}"
                )
                sys.stdout.flush()
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def measure(out: int, columns: int, scheme: Scheme, order: Any) -> dict[str, Any]:
    """One matrix through `gptq`, with the CPU seconds of its parts."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out, columns, generator=generator)
    inputs = torch.randn(2 * columns, columns, generator=generator)
    inputs[:, 1:] += 0.5 * inputs[:, :-1]
    hessian = inputs.t() @ inputs
    seconds: dict[str, float] = {}
    rounding = module._Sweep._round_columns
    patches = [
        mock.patch.object(module, name, timed(getattr(module, name), part, seconds)) for part, name in PARTS.items()
    ]
    patches.append(mock.patch.object(module._Sweep, "_round_columns", timed(rounding, ROUND, seconds)))
    module.gptq(weight[:16], hessian, scheme, order=order)  # libraries start up
    for patch in patches:
        patch.start()
    clock, cpu = time.perf_counter(), time.process_time()
    module.gptq(weight, hessian, scheme, order=order)
    cpu, clock = time.process_time() - cpu, time.perf_counter() - clock
    for patch in patches:
        patch.stop()
    seconds[SPREAD] = cpu - sum(seconds.values())  # the matrix products between blocks, and what is left
    return {
        "shape": [out, columns],
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "order": order,
        "threads": torch.get_num_threads(),
        "seconds": clock,
        "cpu_seconds": cpu,
        "weights_per_second_per_thread": out * columns / cpu,
        "parts": {name: value / cpu for name, value in seconds.items()},
    }


def timed(function: Callable[..., Any], part: str, seconds: dict[str, float]) -> Callable[..., Any]:
    """`function`, adding the CPU time of its calls to seconds[part]."""

    def called(*arguments: Any, **named: Any) -> Any:
        start = time.process_time()
        try:
            return function(*arguments, **named)
        finally:
            seconds[part] = seconds.get(part, 0.0) + time.process_time() - start

    return called


if __name__ == "__main__":
    sys.exit(main())
