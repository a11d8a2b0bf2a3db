"""Expert pruning on one model: perplexity and KL per domain for every score, at several kept fractions. Resumable.

    python scripts/bench_pruning.py OUT --model DIR --tokens FILE.safetensors --text TEXT [--text TEXT ...] [ROW ...]

Rows are `method-keep`, e.g. `reap-0.75` or `random.1-0.5` (seed 1). Every row is a run of its own; finished rows are
kept in OUT/rows.json, so an interrupted table goes on where it stopped; OUT/table.md is written again after each row.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import yaml

METHODS: dict[str, dict[str, Any]] = {
    "frequency": {"prune.frequency": {}},
    "gate": {"prune.gate": {}},
    "ean": {"prune.ean": {}},
    "reap": {"prune.reap": {}},
    "man": {"prune.score": {"b": 1.0, "alpha": 0, "beta": 1}},
    "score022": {"prune.score": {"b": 0.0, "alpha": 2, "beta": 2}},
    "easy_ep": {"prune.easy_ep": {}},
    **{f"random.{seed}": {"prune.random": {"seed": seed}} for seed in range(3)},
}
KEEP = ("0.75", "0.5")


def outcome(data: dict[str, Any], folder: Path, texts: list[str], windows: int) -> dict[str, Any]:
    """Run a recipe in `folder` and evaluate its result: the report, and per text perplexity and KL. Nothing stays."""
    from moecompress.evaluate import evaluate_dir
    from moecompress.recipe import load_recipe
    from moecompress.run import run

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump({**data, "output": {"dir": str(folder / "out")}}, sort_keys=False)
    )
    began, cpu = time.perf_counter(), time.process_time()
    out = run(load_recipe(folder / "recipe.yaml"))
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    found = evaluate_dir(out, texts, Path(data["model"]), windows=windows)
    report = json.loads((out / "moecompress" / "report.json").read_text())
    shutil.rmtree(folder)
    perplexity = {text: value["value"] for text, value in found["perplexity"].items()}
    measures = {"perplexity": perplexity, "kl": dict(found["kl"]), "router_agreement": found["router_agreement"]}
    return {"seconds": seconds, "cpu_seconds": cpu, "report": report, **measures}


def measured(row: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run and evaluate one row: seconds, bytes, and per text perplexity and KL."""
    method, _, keep = row.rpartition("-")
    (name, options), folder = next(iter(METHODS[method].items())), arguments.out / row
    tokens = {"source": "tokens", "files": [str(arguments.tokens)], "samples": arguments.samples, "heldout": 0}
    data = {
        "model": str(arguments.model),
        "calibration": {**tokens, "length": arguments.length},
        "passes": [{name: {**options, "keep": float(keep)}}],
    }
    found = outcome(data, folder, arguments.text, arguments.windows)
    size = found["report"]["size"]["output_bytes"]
    return {"seconds": found["seconds"], "bytes": size, "perplexity": found["perplexity"], "kl": found["kl"]}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown: one line per row, KL (perplexity) per text, mean KL last; best mean first within a kept fraction."""
    if not rows:
        return ""
    texts = [text for text in next(iter(rows.values()))["kl"] if text != "all"]
    lines = ["| method | keep | " + " | ".join(Path(text).stem for text in texts) + " | mean KL | MiB | seconds |"]
    lines.append("|---" * (len(texts) + 5) + "|")
    mean = {row: sum(value["kl"][text] for text in texts) / len(texts) for row, value in rows.items()}
    for row in sorted(rows, key=lambda row: (-float(row.rpartition("-")[2]), mean[row])):
        method, _, keep = row.rpartition("-")
        value = rows[row]
        cells = [f"{value['kl'][text]:.3f} ({value['perplexity'][text]:.2f})" for text in texts]
        size = f"{value['bytes'] / 2**20:.2f} | {value['seconds']:.0f}"
        lines.append(f"| {method} | {keep} | " + " | ".join(cells) + f" | {mean[row]:.3f} | {size} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("rows", nargs="*", default=[f"{method}-{keep}" for keep in KEEP for method in METHODS])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True, help="safetensors with int32 `ids` [N, T]")
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=40)
    arguments = parser.parse_intermixed_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    kept = arguments.out / "rows.json"
    rows: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.is_file() else {}
    for row in arguments.rows:
        if row not in rows:
            rows[row] = measured(row, arguments)
            kept.write_text(json.dumps(rows, indent=1) + "\n")
            (arguments.out / "table.md").write_text(table(rows))
            print(row, {Path(text).stem: round(value, 4) for text, value in rows[row]["kl"].items()}, flush=True)


if __name__ == "__main__":
    main()
