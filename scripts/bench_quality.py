"""Quality of recipes at equal bits on one model: a resumable table of KL, perplexity, CPU time and memory.

    python scripts/bench_quality.py OUT --model DIR --tokens FILE.safetensors --text TEXT [--text TEXT ...] [ROW ...]

Every row is one `moecompress run` in a process of its own, then `moecompress eval` against the model. Finished rows are
kept in OUT/rows.json, so an interrupted table goes on where it stopped; OUT/table.md is written again after each row.
Rows: `rtn-4-32` is a method, its bits and its group size (see METHODS); `global-2.75-32` an allocation, its budget in
stored bits per weight and its group size; `learned:start=mse,repair=false-2-32` gives its last pass other parameters.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from bench_rows import Rows, arguments_of

_SMOOTHQUANT = {"smooth.expert": {"alpha": 0.5, "aggregate": "layer", "router": False, "experts": False}}
_DUQUANT = {"rotate.duquant": {"block": 64}}
_A4 = {"quantize.rtn": {"activation_bits": 4, "activation_clip": 0.9}}  # 4-bit inputs of experts, per token
_A4_GPTQ = {"quantize.gptq": {"activation_bits": 4, "activation_clip": 0.9}}

_KL_CLIP = {"align.router": {"method": "kl_clip", "router_bits": 8}}

METHODS: dict[str, list[dict[str, dict[str, Any]]]] = {
    "rtn": [{"quantize.rtn": {"grid": "minmax"}}],
    "rtnmse": [{"quantize.rtn": {"grid": "mse"}}],
    "hqq": [{"quantize.hqq": {}}],
    "gptq": [{"quantize.gptq": {}}],
    "gptqall": [{"quantize.gptq": {"all_experts": True}}],
    "gptqaffinity": [{"quantize.gptq": {"weighting": "affinity"}}],
    "awq": [{"smooth.awq": {}}, {"quantize.rtn": {"grid": "mse"}}],
    "learned": [{"quantize.learned": {}}],
    "pmq": [{"allocate.pmq": {}}, {"quantize.gptq": {}}],  # bits: the budget in stored bits per weight
    "global": [{"allocate.global": {}}, {"quantize.gptq": {}}],
    "a4rtn": [_A4],
    "a4smoothquant": [_SMOOTHQUANT, _A4],
    "a4hadamard": [{"rotate.hadamard": {"down_block": 128}}, _A4],
    "a4duquant": [_DUQUANT, _A4],
    "a4smoothexpert": [{"smooth.expert": {}}, _A4],
    "a4smoothduquant": [{"smooth.expert": {}}, _DUQUANT, _A4],
    "a4eaquant": [{"smooth.expert": {}}, _DUQUANT, _KL_CLIP, _A4],  # and calibration rows chosen for balance
    "a4gptq": [_A4_GPTQ],
    "a4hadamardgptq": [{"rotate.hadamard": {"down_block": 128}}, _A4_GPTQ],
    "a4duquantgptq": [_DUQUANT, _A4_GPTQ],
    "a4eaquantgptq": [{"smooth.expert": {}}, _DUQUANT, _KL_CLIP, _A4_GPTQ],
}
CHANNEL = "channel"  # as group size: one scale per output channel
BALANCED = ("a4eaquant", "a4eaquantgptq")
DATA_FREE = ("rtn", "rtnmse", "hqq", "a4rtn", "a4hadamard")


def recipe(row: str, arguments: argparse.Namespace, out: Path) -> dict[str, Any]:
    """The recipe of one row, `method[:key=value,...]-bits-group`."""
    method, options, bits, group = parts_of(row)
    passes = json.loads(json.dumps(METHODS[method]))
    next(iter(passes[-1].values())).update(options)
    for step in passes:
        for name, parameters in step.items():
            if name.startswith("allocate."):
                parameters["budget"] = f"{bits} bpw"
            elif name.startswith("quantize."):
                parameters["group_size"] = -1 if group == CHANNEL else int(group)
                if not next(iter(passes[0])).startswith("allocate."):
                    parameters["bits"] = int(bits)
    data: dict[str, Any] = {
        "model": str(arguments.model),
        "passes": passes,
        "output": {"dir": str(out), "format": "native"},
    }
    if method not in DATA_FREE:
        source = {"source": "tokens", "files": [str(arguments.tokens)]}
        data["calibration"] = source | {"samples": arguments.samples, "length": arguments.length, "heldout": 0}
        if method in BALANCED:
            data["calibration"]["balance"] = {"ratio": 2, "pool": 2}
    return data


def parts_of(row: str) -> tuple[str, dict[str, Any], str, str]:
    """Method, its other parameters, bits and group size. Raises ValueError for what is no row."""
    named, bits, group = row.rsplit("-", 2)
    method, _, options = named.partition(":")
    whole = bits.replace(".", "", 1) if method in ("pmq", "global") else bits
    if method not in METHODS or not whole.isdigit():
        raise ValueError(row)
    pairs = (text.split("=") for text in options.split(",") if text)
    return method, {key: yaml.safe_load(value) for key, value in pairs}, bits, group


def measure(row: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run and evaluate one row; CPU seconds and peak memory are those of the run's process alone."""
    out = arguments.out / row
    for path in (out, out.with_name(out.name + ".run")):
        shutil.rmtree(path, ignore_errors=True)
    file = arguments.out / f"{row}.yaml"
    file.write_text(yaml.safe_dump(recipe(row, arguments, out), sort_keys=False), encoding="utf-8")
    program = [sys.executable, "-P", "-m", "moecompress"]
    environment = dict(os.environ, OMP_NUM_THREADS=str(arguments.threads))
    pid = os.spawnve(os.P_NOWAIT, sys.executable, [*program, "run", str(file)], environment)
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"{row}: moecompress run failed")
    command = [*program, "eval", str(out), "--reference", str(arguments.model), "--json"]
    command += ["--windows", str(arguments.windows)]
    for text in arguments.text:
        command += ["--perplexity", str(text)]
    result = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    report = json.loads((out / "moecompress" / "report.json").read_text(encoding="utf-8"))
    shutil.rmtree(out)
    return {
        "bits": report["size"]["expert_bits_per_weight"],
        "kl": result["kl"],
        "perplexity": {name: value["value"] for name, value in result["perplexity"].items()},
        "router_agreement": result["router_agreement"],
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "pass_seconds": sum(step["seconds"] or 0.0 for step in report["passes"]),
        "peak_rss_mib": usage.ru_maxrss / 1024,
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown, by bits and then by KL."""
    lines = [
        "| method | bits per expert weight | KL | perplexity | router agreement | CPU s | of which passes | RSS MiB |",
        "| :-- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for name, row in sorted(rows.items(), key=lambda item: (-item[1]["bits"], item[1]["kl"].get("all", 0.0))):
        kl, perplexity = (next(reversed(row[key].values())) for key in ("kl", "perplexity"))
        agreement = sum(row["router_agreement"]) / len(row["router_agreement"])
        lines.append(
            f"| {name} | {row['bits']:.3f} | {kl:.4f} | {perplexity:.3f} | {agreement:.3f} "
            f"| {row['cpu_seconds']:.0f} | {row['pass_seconds']:.0f} | {row['peak_rss_mib']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure the rows that are not in rows.json yet."""
    parser = arguments_of(__doc__, threads=1)
    parser.add_argument("--tokens", type=Path)
    arguments = parser.parse_intermixed_args()
    for row in arguments.rows:
        try:
            parts_of(row)
        except ValueError:
            form = "METHOD[:KEY=VALUE,...]-BITS-GROUP (or -channel)"
            parser.error(f"row {row}; allowed: {form} with METHOD in {', '.join(METHODS)}")
    rows = Rows(arguments.out, table)
    for row in rows.missing(arguments.rows):
        rows.add(row, measure(row, arguments))
    print(table(rows.found), end="")


if __name__ == "__main__":
    main()
