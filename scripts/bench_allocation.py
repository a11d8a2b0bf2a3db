"""Time the allocation solvers on synthetic models of DeepSeek-V3's size; check PMQ against released allocations.

    python scripts/bench_allocation.py [--seconds 60] [--solvers ours,highs,cbc] [--instances 58x256,...] [--json FILE]
    python scripts/bench_allocation.py --released FILE

The instances are 58 layers x 256 experts, and the same x 3 matrices (equal sizes, and six different ones with 4.25-like
stored widths). Sensitivities are log-normal; errors fall about 4 times per bit, the budget is 2.25 bits on average.
`--released` takes a JSON file {"layers": {layer: {"freq", "weight", "loss", "bits": {total: [...]}}}} with the
statistics and allocations that the authors of PMQ published, and counts the layers that come out the same.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from moecompress.numerics.allocation import Problem, highs, pmq, pmq_cost, solve, solve_pulp

WIDTHS = np.array([1, 2, 3, 4])
INSTANCES = {  # units, and whether they have six sizes
    "58x256": (58 * 256, False),
    "58x256x3": (58 * 256 * 3, False),
    "58x256x3-six-sizes": (58 * 256 * 3, True),
}


def instance(units: int, sizes: bool) -> Problem:
    """One synthetic problem. sizes: six sizes of matrices and a quarter bit of scales, instead of equal ones."""
    rng = np.random.default_rng(0)
    sensitivity = rng.lognormal(0, 2, (units, 1))
    cost = sensitivity * 2.0 ** (-2 * WIDTHS) * rng.lognormal(0, 0.2, (units, len(WIDTHS)))
    weights = rng.choice([16 << 20, 14 << 20, 11 << 20, 9 << 20, 6 << 20, 3 << 20], (units, 1))
    size = weights * (4 * WIDTHS + 1) // 4 if sizes else np.tile(WIDTHS, (units, 1))
    budget = int((weights * 2.5).sum()) if sizes else int(2.25 * units)
    return Problem.of(cost, size, budget)


def main() -> None:
    """Parse arguments; print one line per instance and solver, or the released check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="time limit of HiGHS and CBC, building the model apart"
    )
    parser.add_argument("--solvers", default="ours,highs,cbc")
    parser.add_argument("--instances", default=",".join(INSTANCES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--released", type=Path, help="published statistics and allocations to compare with")
    arguments = parser.parse_args()
    names = arguments.instances.split(",")
    if unknown := [name for name in names if name not in INSTANCES]:
        parser.error(f"--instances {','.join(unknown)}; allowed: {','.join(INSTANCES)}")
    if arguments.released is not None:
        compare(arguments.released)
        return
    solvers = {
        "ours": solve,
        "highs": lambda problem: highs(problem, gap=1e-6, seconds=arguments.seconds),
        "cbc": lambda problem: solve_pulp(problem, gap=1e-6, seconds=arguments.seconds),
    }
    rows = []
    for name in names:
        problem = instance(*INSTANCES[name])
        for solver in arguments.solvers.split(","):
            began = time.perf_counter()
            try:
                found = solvers[solver](problem)
                result = {"cost": found.cost, "gap": found.gap, "within_budget": found.size <= problem.budget}
            except RuntimeError as error:
                result = {"failed": str(error)}
            row = {"instance": name, "items": problem.cost.size, "solver": solver}
            rows.append({**row, "seconds": round(time.perf_counter() - began, 3), **result})
            print(json.dumps(rows[-1]), flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def compare(path: Path) -> None:
    """Layers whose published allocation comes out, per rule and budget."""
    layers = json.loads(path.read_text())["layers"].values()
    for rule in ("released", "paper"):
        for total in sorted({key for layer in layers for key in layer["bits"]}, key=int):
            same = sum(
                pmq(pmq_cost(one["freq"], one["weight"], one["loss"], rule), [1, 2, 3], int(total))
                == one["bits"][total]
                for one in layers
            )
            print(f"rule {rule}, {total} bits per layer: {same} of {len(layers)} layers equal")


if __name__ == "__main__":
    main()
