"""What every part of MoEQuant and EAQuant is worth: one table of GPTQ with one part added, with all, and without one.

    python scripts/bench_ablation.py OUT --model DIR --tokens FILE --text TEXT [--text TEXT ...]
        [--ebss FILE] [--ebss-paper FILE] [--minutes N] [ROW ...]

A row is `method/width/seed`, e.g. `gptq/w3g32/0` (see METHODS, WIDTHS); default: all rows, three seeds where tokens are
drawn, one at 4 bits without rounded inputs.
The seed draws `--samples` calibration sequences from `--tokens` (text: a file of token ids, or plain text of which any
window may be drawn), from `--ebss` (sampled by the model), or half of each. With text of all that is evaluated this
tells what the parts are worth by themselves; with text of one corpus, as in the papers, also what self-sampled text is
worth where the corpus says nothing: two OUTs, two tables. Each finished row is a line of OUT/rows.jsonl, so an
interrupted table goes on where it stopped; rows whose parts are not there are named and left out. OUT/table.md is
written again after each row. `--minutes` stops after a row when so much time has passed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from bench_pruning import outcome
from bench_rows import Rows, arguments_of
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

WIDTHS = {"w4": (4, -1), "w3": (3, -1), "w3g32": (3, 32), "w2g32": (2, 32)}
SEEDS = (0, 1, 2)

ROTATE: dict[str, Any] = {"rotate.hadamard": {}}
ROUTER: dict[str, Any] = {"align.router": {}}
PLAIN = {"grid": "minmax"}
AGQ = {"weighting": "affinity"}
SMOOTHQUANT: dict[str, Any] = {"smooth.expert": {"alpha": 0.5, "aggregate": "layer", "router": False, "experts": False}}
SMOOTH: dict[str, Any] = {"smooth.expert": {}}
DUQUANT: dict[str, Any] = {"rotate.duquant": {"block": 64, "steps": 256}}
KL_CLIP: dict[str, Any] = {"align.router": {"method": "kl_clip", "router_bits": 8, "activation_bits": 8}}


def gptq(*before: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    return [*before, {"quantize.gptq": {**PLAIN, **options}}]


def a4(*before: dict[str, Any]) -> list[dict[str, Any]]:
    """Rounded to nearest on searched grids, and what the experts receive rounded to 4 bits per token."""
    return [*before, {"quantize.rtn": {"grid": "mse", "activation_bits": 4, "activation_clip": 0.9}}]


def learned(*before: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    return [*before, {"quantize.learned": options}]


#: name -> (passes, where the calibration tokens are from)
METHODS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "rtn": ([{"quantize.rtn": PLAIN}], "none"),
    "gptq": (gptq(), "text"),
    "+rotation": (gptq(ROTATE), "text"),
    "+ebss": (gptq(), "ebss"),
    "+ebss-paper": (gptq(), "ebss-paper"),
    "+half-ebss": (gptq(), "half"),
    "+agq": (gptq(**AGQ), "text"),
    "+agq2": (gptq(**AGQ, power=2), "text"),
    "+balance": (gptq(), "text-balanced"),
    "+router": (gptq(ROUTER), "text"),
    "all": (gptq(ROTATE, ROUTER, **AGQ), "half-balanced"),
    "all-rotation": (gptq(ROUTER, **AGQ), "half-balanced"),
    "all-text": (gptq(ROTATE, ROUTER, **AGQ), "text-balanced"),
    "all-text-rotation": (gptq(ROUTER, **AGQ), "text-balanced"),
    "all-own": (gptq(ROTATE, ROUTER, **AGQ), "ebss-balanced"),
    "all-own-rotation": (gptq(ROUTER, **AGQ), "ebss-balanced"),
    "+target": (gptq(target_inputs="original"), "text"),
    "mse": (gptq(grid="mse"), "text"),
    "mse+agq": (gptq(grid="mse", **AGQ), "text"),
    "mse+router": (gptq(ROUTER, grid="mse"), "text"),
    "mse+all": (gptq(ROTATE, ROUTER, grid="mse", **AGQ), "half-balanced"),
    "mse+all-own": (gptq(ROTATE, ROUTER, grid="mse", **AGQ), "ebss-balanced"),
    "mse+agq2+router": (gptq(ROUTER, grid="mse", **AGQ, power=2), "text"),
    "learned": (learned(), "text"),
    "learned+router": (learned(ROUTER), "text"),
    "learned+all": (learned(ROTATE, ROUTER), "half-balanced"),
    "a16-rtn": ([{"quantize.rtn": {"grid": "mse"}}], "none"),
    "a4-rtn": (a4(), "none"),
    "a4-smoothquant": (a4(SMOOTHQUANT), "text"),
    "a4-hadamard": (a4({"rotate.hadamard": {"down_block": 128}}), "none"),
    "a4-duquant": (a4(DUQUANT), "text"),
    "a4-smooth": (a4(SMOOTH), "text"),
    "a4-smooth+duquant": (a4(SMOOTH, DUQUANT), "text"),
    "a4-eaquant": (a4(SMOOTH, DUQUANT, KL_CLIP), "text-balanced"),
}
#: `-balanced`: rows are chosen from so many times more (or all there are), so that experts are used evenly
BALANCE: dict[str, Any] = {"pool": 2.5, "fill": "even", "grow": False}
_ROUNDED = tuple(method for method in METHODS if method.startswith(("a4-", "a16-")))  # per channel, as published
DEFAULT = tuple(
    f"{method}/{width}/{seed}"
    for width in WIDTHS
    for method, (_, source) in METHODS.items()
    for seed in SEEDS
    if seed == 0 or (source != "none" and (width != "w4" or method in _ROUNDED))
    if width == "w4" or (method in _ROUNDED) == (width == "w3")
)


def sequences(file: Path, arguments: argparse.Namespace) -> Tensor:
    """Token ids int64 [N, length] of a file of ids, or of a text in windows without a gap."""
    if file.suffix != ".txt":
        return next(iter(load_file(file).values())).long()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    ids = torch.tensor(tokenizer(file.read_text("utf-8"), add_special_tokens=False)["input_ids"])
    return ids[: len(ids) // arguments.length * arguments.length].reshape(-1, arguments.length)


def drawn(parts: Sequence[Tensor], seed: int, rows: int, target: Path) -> None:
    """`rows` sequences, as many of each part, drawn and mixed by the seed, as a file of their own."""
    generator, share = torch.Generator().manual_seed(seed), -(-rows // len(parts))
    mixed = torch.cat([part[torch.randperm(len(part), generator=generator)[:share]] for part in parts])
    save_file({"ids": mixed[torch.randperm(len(mixed), generator=generator)[:rows]].contiguous()}, target)


def calibration(source: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The recipe's calibration for one source of tokens."""
    if source == "none":
        return {}
    kind = source.removesuffix("-balanced")
    named = {"text": ["tokens"], "ebss": ["ebss"], "ebss-paper": ["ebss_paper"], "half": ["tokens", "ebss"]}
    parts = [sequences(getattr(arguments, name), arguments) for name in named[kind]]
    rows, balanced = arguments.samples, source.endswith("-balanced")
    if balanced:
        rows = min(int(rows * BALANCE["pool"]), len(parts) * min(len(part) for part in parts))
    file = arguments.out / f"{kind}-{rows}-{seed}.safetensors"
    if not file.is_file():
        drawn(parts, seed, rows, file)
    spec = {"source": "tokens", "files": [str(file)], "samples": arguments.samples, "length": arguments.length}
    balance = {"balance": {**BALANCE, "pool": rows / arguments.samples}} if balanced else {}
    return {"calibration": {**spec, "heldout": 0, **balance}}


def missing(row: str, arguments: argparse.Namespace) -> str | None:
    """Why a row cannot be measured now; None = it can."""
    from moecompress.registry import PASSES

    passes, source = METHODS[row.split("/")[0]]
    absent = [name for step in passes for name in step if name not in PASSES]
    if absent:
        return f"no pass {absent[0]}"
    if source == "ebss-paper" and not arguments.ebss_paper:
        return "needs --ebss-paper"
    return "needs --ebss" if source.removesuffix("-balanced") in ("ebss", "half") and not arguments.ebss else None


def measured(row: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run and evaluate one row."""
    method, width, seed = row.split("/")
    bits, group = WIDTHS[width]
    passes, source = METHODS[method]
    sized = [
        {name: {**options, "bits": bits, "group_size": group} if name.startswith("quantize.") else options}
        for step in passes
        for name, options in step.items()
    ]
    data = {"model": str(arguments.model), "passes": sized, **calibration(source, int(seed), arguments)}
    found = outcome(data, arguments.out / "work", arguments.text, arguments.windows)
    aligned = [layer["router"]["aligned"] for layer in found.pop("report")["layers"]]
    return {"row": row, "samples": arguments.samples, "windows": arguments.windows, **found, "aligned": aligned}


def domains(row: dict[str, Any]) -> list[str]:
    return [text for text in row["kl"] if text != "all"]


def mean_kl(row: dict[str, Any]) -> float:
    return statistics.fmean(row["kl"][text] for text in domains(row))


def table(rows: Mapping[str, dict[str, Any]]) -> str:
    """Markdown: KL (perplexity) per domain, mean KL (mean of the seeds, spread over them), perplexity of all, router
    agreement."""
    if not rows:
        return ""
    texts = domains(next(iter(rows.values())))
    names = [Path(text).stem for text in texts]
    lines = ["| method | width | seeds | " + " | ".join(names)]
    lines[0] += " | mean KL | perplexity | router agreement | CPU s |"
    lines.append("|---" * (len(texts) + 7) + "|")
    for width in WIDTHS:
        for method in METHODS:
            found = [row for name, row in rows.items() if name.startswith(f"{method}/{width}/")]
            if found:
                lines.append(f"| {method} | {width} | {len(found)} | {_cells(found, texts)} |")
    return "\n".join(lines) + "\n"


def _cells(found: Sequence[dict[str, Any]], texts: Sequence[str]) -> str:
    def mean(name: str, text: str) -> float:
        return statistics.fmean(row[name][text] for row in found)

    cells = [f"{mean('kl', text):.4f} ({mean('perplexity', text):.2f})" for text in texts]
    means = [mean_kl(row) for row in found]
    spread = f" ± {statistics.stdev(means):.4f}" if len(means) > 1 else ""
    agreement = statistics.fmean(statistics.fmean(row["router_agreement"]) for row in found)
    cpu = statistics.fmean(row["cpu_seconds"] for row in found)
    return " | ".join(
        [
            *cells,
            f"{statistics.fmean(means):.4f}{spread}",
            f"{mean('perplexity', 'all'):.3f}",
            f"{agreement:.4f}",
            f"{cpu:.0f}",
        ]
    )


def main() -> None:
    """Measure the rows that are missing."""
    parser = arguments_of(__doc__, DEFAULT, samples=48, windows=4)
    parser.add_argument("--tokens", type=Path, required=True, help="safetensors with integers [N, T], or a .txt")
    parser.add_argument("--ebss", type=Path, help="the same, sampled by the model itself")
    parser.add_argument("--ebss-paper", type=Path, help="the same, by the published search")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    arguments = parser.parse_intermixed_args()
    unknown = [row for row in arguments.rows if row not in DEFAULT]
    if unknown:
        parser.error(f"rows {unknown}; allowed: METHOD/WIDTH/SEED with {list(METHODS)}, {list(WIDTHS)}, seeds 0 to 2")
    rows, began = Rows(arguments.out, table, lines=True), time.monotonic()
    for row in rows.missing(arguments.rows):
        if time.monotonic() - began > 60 * arguments.minutes:
            print(f"{arguments.minutes:g} minutes are over before {row}")
            break
        if reason := missing(row, arguments):
            print(f"{row}: left out, {reason}")
            continue
        rows.add(row, found := measured(row, arguments))
        print(row, f"{mean_kl(found):.4f}", f"{found['cpu_seconds']:.0f} CPU s", flush=True)
    print(table(rows.found), end="")


if __name__ == "__main__":
    main()
