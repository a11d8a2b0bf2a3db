"""Experts left out per token on one model: perplexity against the share of experts used, for every gate. Resumable.

    python scripts/bench_gates.py OUT --model DIR --tokens FILE.safetensors --text TEXT [--text TEXT ...] [ROW ...]

Rows are `method-value`: `none-1`, `top_k-3` (experts per token), `odp-0.5` (quantile), `otp-0.75` (target share); all
on the model rounded to nearest at 4 bits. Words may follow a method: `+raw` leaves the weights of what stays as they
are (`renormalise: false`), `odp+model` has one threshold for all layers. Shares of experts used are those of the eighth
of the sequences that nothing is trained on. Finished rows are kept in OUT/rows.json, so an interrupted table goes on
where it stopped; OUT/table.md is written again after each row. Changes are against the row `none-1`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from bench_rows import Rows, arguments_of, reload_here

METHODS = {"top_k": "keep", "odp": "quantile", "otp": "target"}
WORDS: dict[str, dict[str, Any]] = {"raw": {"renormalise": False}, "model": {"pool": "model"}}


def gate(row: str, otp: dict[str, Any]) -> list[dict[str, Any]]:
    """The passes of a row after rounding. Raises ValueError for a row that is none."""
    method, _, value = row.rpartition("-")
    method, *words = method.split("+")
    if row == "none-1":
        return []
    if method not in METHODS or not set(words) <= set(WORDS):
        allowed = f"METHOD-VALUE or METHOD+WORD-VALUE with METHOD in {', '.join(METHODS)}, WORD in {', '.join(WORDS)}"
        raise ValueError(f"row {row}; allowed: none-1, {allowed}")
    options = {key: item for word in words for key, item in WORDS[word].items()} | (otp if method == "otp" else {})
    return [{f"prune.{method}": options | {METHODS[method]: int(value) if method == "top_k" else float(value)}}]


def measured(row: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run and evaluate one row: share of experts used, expert bytes per token, perplexity per text, seconds."""
    from moecompress.evaluate import evaluate_dir
    from moecompress.recipe import load_recipe
    from moecompress.run import run

    folder = arguments.out / row
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    passes: list[dict[str, Any]] = [{"quantize.rtn": {"bits": 4, "group_size": arguments.group_size, "grid": "mse"}}]
    passes += gate(row, yaml.safe_load(arguments.options))
    tokens = {"source": "tokens", "files": [str(arguments.tokens)], "samples": arguments.samples}
    data = {
        "model": str(arguments.model),
        "calibration": {**tokens, "length": arguments.length},
        "passes": passes,
        "output": {"dir": str(folder / "out"), "format": "native"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    began = time.process_time()
    with mock.patch("moecompress.finish.subprocess.run", reload_here):
        out = run(load_recipe(folder / "recipe.yaml"))
    seconds = time.process_time() - began
    score = evaluate_dir(out, arguments.text, windows=arguments.windows)
    use = [layer["use"] for layer in json.loads((out / "moecompress" / "report.json").read_text())["layers"]]
    shutil.rmtree(folder)
    return {
        "used": [one["experts"] / one["experts_before"] for one in use],
        "bytes": sum(one["bytes"] for one in use),
        "perplexity": {text: value["value"] for text, value in score["perplexity"].items()},
        "cpu_seconds": seconds,
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown: one line per row, most experts first; perplexity over all texts and per text against `none-1`."""
    if not rows:
        return ""
    texts = list(next(iter(rows.values()))["perplexity"])
    base = rows.get("none-1")
    head = ["row", "experts used", "by layer", "KiB per token", *(Path(text).stem for text in texts), "CPU s"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row, value in sorted(rows.items(), key=lambda item: -sum(item[1]["used"])):
        mean = sum(value["used"]) / len(value["used"])
        cells = []
        for text in texts:
            change = (
                "" if base is None else f" ({100 * (value['perplexity'][text] / base['perplexity'][text] - 1):+.2f} %)"
            )
            cells.append(f"{value['perplexity'][text]:.3f}{change}")
        layers = " ".join(f"{share:.2f}" for share in value["used"])
        cells = [f"{100 * mean:.1f} %", layers, f"{value['bytes'] / 1024:.0f}", *cells, f"{value['cpu_seconds']:.0f}"]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure the rows that are missing."""
    parser = arguments_of(__doc__, ("none-1", "top_k-3", "odp-0.5", "otp-0.75"))
    parser.add_argument("--tokens", type=Path, required=True, help="safetensors with int32 `ids` [N, T]")
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--options", default="{}", help="other parameters of prune.otp, as YAML")
    arguments = parser.parse_intermixed_args()
    try:
        for row in arguments.rows:
            gate(row, {})
    except ValueError as error:
        parser.error(str(error))
    rows = Rows(arguments.out, table)
    for row in rows.missing(arguments.rows):
        rows.add(row, found := measured(row, arguments))
        share = sum(found["used"]) / len(found["used"])
        print(row, f"{share:.3f}", {Path(k).stem: round(v, 3) for k, v in found["perplexity"].items()}, flush=True)


if __name__ == "__main__":
    main()
