"""Which calibration makes GPTQ good on text it has not seen: KL per domain for one-domain text and self-sampled sets.

    python scripts/bench_calibration.py OUT --model DIR --domains DIR --text TEXT [--text TEXT ...] [ROW ...]

DIR of --domains holds one text file per domain, for calibration; every --text is held-out text with a domain's name in
its own. A row is `set/width/seed`, e.g. `ebss/w3g32/0` or `narrative/w2g32/1`: a set is a domain, `five` (a mixture of
all domains), or one of SETS. Finished rows are lines of OUT/rows.jsonl, so an interrupted table goes on where it
stopped; what was sampled is kept in OUT/kept. OUT/table.md is written again after each row.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from bench_rows import Rows, arguments_of, reload_here

WIDTHS = {"w3g32": (3, 32), "w2g32": (2, 32)}
SETS: dict[str, dict[str, Any]] = {
    "ebss": {},
    "ebss-paper": {"mode": "paper"},
    "ebss-loose": {"tau": 1.2, "scope": "sequence"},
    "ebss-tight": {"tau": 0.01},
    "ebss-beam": {"search": "beam"},
    "ebss-free": {"draws": 1, "width": 1, "top_token_k": 4096},
}


def source(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The recipe's calibration for a set, without sizes."""
    files = {path.stem: str(path) for path in sorted(arguments.domains.glob("*.txt"))}
    if name in SETS:
        return {"source": "ebss", "cache": str(arguments.out / "kept"), **SETS[name]}
    if name in files:
        return {"source": "text", "files": [files[name]]}
    if name == "five":
        parts = [{"source": "text", "files": [file], "share": 1} for file in files.values()]
        return {"source": "mix", "parts": parts}
    half, found, domain = name.partition("+ebss")
    if not found or half not in files or domain:
        raise SystemExit(f"set {name}; allowed: {', '.join([*files, 'five', *SETS, 'DOMAIN+ebss'])}")
    parts = [{"share": 1, **source(half, arguments)}, {"share": 1, **source("ebss", arguments)}]
    return {"source": "mix", "parts": parts}


def measured(row: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run and evaluate one row: KL and perplexity per text, and what the report says about the set."""
    from moecompress.evaluate import evaluate_dir
    from moecompress.recipe import load_recipe
    from moecompress.run import run

    name, width, seed = row.split("/")
    bits, group = WIDTHS[width]
    folder = arguments.out / "work"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    sizes = {"samples": arguments.samples, "length": arguments.length, "seed": int(seed), "heldout": 0}
    data = {
        "model": str(arguments.model),
        "calibration": {**source(name, arguments), **sizes},
        "passes": [{"quantize.gptq": {"bits": bits, "group_size": group}}],
        "output": {"dir": str(folder / "out"), "format": "native"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    began = time.perf_counter()
    with mock.patch("moecompress.finish.subprocess.run", reload_here):
        out = run(load_recipe(folder / "recipe.yaml"))
    seconds = time.perf_counter() - began
    found = evaluate_dir(out, arguments.text, arguments.model, windows=arguments.windows)
    report = json.loads((out / "moecompress" / "report.json").read_text())
    shutil.rmtree(folder)
    kl = {Path(text).stem: value for text, value in found["kl"].items() if text != "all"}
    return {"row": row, "kl": kl, "seconds": seconds, "calibration": report["calibration"][0]["origin"]}


def table(rows: Mapping[str, dict[str, Any]]) -> str:
    """Markdown: per width and set, KL on every domain, means over seeds and the spread of that of other domains; the
    calibration's own domain in brackets."""
    if not rows:
        return ""
    texts = list(next(iter(rows.values()))["kl"])
    lines = ["| width | calibration | " + " | ".join(texts) + " | mean | mean of other domains | seeds |"]
    lines.append("|---|---" + "|--:" * (len(texts) + 3) + "|")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for key, row in rows.items():
        name, width, _ = key.split("/")
        groups.setdefault((width, name), []).append(row)
    for (width, name), same in sorted(groups.items(), reverse=True):
        kl = {text: statistics.fmean(row["kl"][text] for row in same) for text in texts}
        own = [text for text in texts if name.partition("+")[0] in text]
        cells = [f"({kl[text]:.4f})" if text in own else f"{kl[text]:.4f}" for text in texts]
        others = [statistics.fmean(row["kl"][text] for text in texts if text not in own) for row in same]
        spread = f" ± {statistics.stdev(others):.4f}" if len(others) > 1 else ""
        means = f"{statistics.fmean(kl.values()):.4f} | {statistics.fmean(others):.4f}{spread} | {len(same)}"
        lines.append(f"| {width} | {name} | {' | '.join(cells)} | {means} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure the rows that are missing."""
    parser = arguments_of(__doc__)
    parser.add_argument("--domains", type=Path, required=True)
    arguments = parser.parse_intermixed_args()
    rows = Rows(arguments.out, table, lines=True)
    for row in rows.missing(arguments.rows):
        rows.add(row, found := measured(row, arguments))
        print(row, {text: round(value, 4) for text, value in found["kl"].items()}, flush=True)
    print(table(rows.found), end="")


if __name__ == "__main__":
    main()
