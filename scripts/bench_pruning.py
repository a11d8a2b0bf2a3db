"""Fewer experts on one model: perplexity and KL per domain for every method, at several kept fractions. Resumable.

    python scripts/bench_pruning.py OUT --model DIR --tokens FILE.safetensors --text TEXT [--text TEXT ...] [ROW ...]

Rows are `method-keep`, e.g. `reap-0.75` or `random.1-0.5` (seed 1). `reap@code-0.5` is judged on the text given by
`--domain code=FILE` instead, `easy_ep@code.answers-0.5` on prompts cut from it, each with the model's own reply.
`easy_ep+gptq3-0.75` is quantized afterwards; keep 1 removes nothing. Every row is a run of its own; finished rows are
kept in OUT/rows.json, so an interrupted table goes on where it stopped; OUT/table.md is written again after each row.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from bench_rows import Rows, arguments_of, reload_here
from safetensors.torch import load_file, save_file
from torch import Tensor

METHODS: dict[str, dict[str, Any]] = {
    "frequency": {"prune.frequency": {}},
    "gate": {"prune.gate": {}},
    "ean": {"prune.ean": {}},
    "reap": {"prune.reap": {}},
    "man": {"prune.score": {"b": 1.0, "alpha": 0, "beta": 1}},
    "score022": {"prune.score": {"b": 0.0, "alpha": 2, "beta": 2}},
    "easy_ep": {"prune.easy_ep": {}},
    "easy_ep.global": {"prune.easy_ep": {"counts": "global"}},
    "uncurl": {"merge.uncurl": {}},
    "uncurl.mean": {"merge.uncurl": {"router": "mean"}},
    "uncurl.map": {"merge.uncurl": {"router": "expert_map"}},
    "hc_smoe": {"merge.hc_smoe": {}},
    "hc_smoe.aligned": {"merge.hc_smoe": {"align": True}},
    "hc_smoe.row": {"merge.hc_smoe": {"align": True, "router": "representative"}},
    "m_smoe": {"merge.m_smoe": {}},
    "m_smoe.global": {"merge.m_smoe": {"counts": "global"}},
    **{f"dern.{share}": {"merge.dern": {"threshold": share / 10}} for share in range(1, 7)},
    "neurons": {"prune.neurons": {}},
    "neurons.plain": {"prune.neurons": {"compensate": False}},
    **{f"random.{seed}": {"prune.random": {"seed": seed}} for seed in range(3)},
}
LATER: dict[str, list[dict[str, Any]]] = {
    "": [],
    **{f"gptq{bits}": [{"quantize.gptq": {"bits": bits, "group_size": 32}}] for bits in (2, 3, 4)},
    "global2.6": [
        {"allocate.global": {"bits": [1, 2, 3, 4], "budget": "2.625 bpw"}},
        {"quantize.gptq": {"group_size": 32}},
    ],
}
KEEP = ("0.75", "0.5")
ROWS = [f"{method}-{keep}" for keep in KEEP for method in METHODS]
PROMPT = 600  # characters
Score = Callable[[Path], dict[str, dict[str, float]]]


def work(row: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The recipe's calibration and passes."""
    rest, _, keep = row.rpartition("-")
    rest, _, later = rest.partition("+")
    method, _, domain = rest.partition("@")
    ((name, options),) = METHODS[method].items()
    first = [] if float(keep) == 1 else [{name: {**options, "keep": float(keep)}}]
    sets: dict[str, Any] = {"samples": arguments.samples, "length": arguments.length, "heldout": 0}
    domain, _, answers = domain.partition(".")
    if not domain:
        sets |= {"source": "tokens", "files": [str(arguments.tokens)]}
    elif not answers:
        sets |= {"source": "text", "files": [str(domain_text(domain, arguments))]}
    else:
        sets |= {"source": "answers", "files": [str(prompts(domain, arguments))], "samples": arguments.demonstrations}
        sets |= {"max_tokens": 384, "temperature": 1.0, "cache": str(arguments.out / "answers")}
    return {"calibration": sets, "passes": first + LATER[later]}


def domain_text(domain: str, arguments: argparse.Namespace) -> Path:
    return Path(dict(pair.split("=", 1) for pair in arguments.domain)[domain])


def prompts(domain: str, arguments: argparse.Namespace) -> Path:
    """A file of prompts: evenly spaced pieces of the domain's text."""
    path: Path = arguments.out / f"prompts-{domain}.jsonl"
    text = domain_text(domain, arguments).read_text("utf-8")
    count = 3 * arguments.demonstrations
    starts = range(0, len(text) - PROMPT, max(1, (len(text) - PROMPT) // count))
    path.write_text("".join(json.dumps({"text": text[at : at + PROMPT]}) + "\n" for at in starts))
    return path


def outcome(
    data: dict[str, Any], folder: Path, texts: list[str], windows: int, score: Score | None = None
) -> dict[str, Any]:
    """Run a recipe in `folder` and evaluate its result: the report, and per text perplexity and KL. Nothing stays.

    score: another way to evaluate the output directory.
    """
    from moecompress.evaluate import evaluate_dir
    from moecompress.recipe import load_recipe
    from moecompress.run import run

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump({**data, "output": {"dir": str(folder / "out")}}, sort_keys=False)
    )
    began, cpu = time.perf_counter(), time.process_time()
    with mock.patch("moecompress.finish.subprocess.run", reload_here):
        out = run(load_recipe(folder / "recipe.yaml"))
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    report = json.loads((out / "moecompress" / "report.json").read_text())
    found = score(out) if score else evaluate_dir(out, texts, Path(data["model"]), windows=windows)
    shutil.rmtree(folder)
    if score:
        return {"seconds": seconds, "cpu_seconds": cpu, "report": report, **found}
    perplexity = {text: value["value"] for text, value in found["perplexity"].items()}
    measures = {"perplexity": perplexity, "kl": dict(found["kl"]), "router_agreement": found["router_agreement"]}
    return {"seconds": seconds, "cpu_seconds": cpu, "report": report, **measures}


def measured(row: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run and evaluate one row: CPU seconds, bytes, notes of the layers, and per text perplexity and KL."""
    data = {"model": str(arguments.model), **work(row, arguments)}
    found = outcome(data, arguments.out / row, arguments.text, arguments.windows, lambda out: scored(out, arguments))
    report = found["report"]
    notes = [layer["notes"] for layer in report["layers"]]
    kept = {"seconds": found["cpu_seconds"], "bytes": report["size"]["output_bytes"], "notes": notes}
    return {**kept, "perplexity": found["perplexity"], "kl": found["kl"]}


def scored(out: Path, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Perplexity and KL(original || this) per text by the rule of `moecompress eval`, whole models in memory.

    The original's log-probabilities are made once and kept in OUT.
    """
    from moecompress.load import load

    found: dict[str, dict[str, float]] = {"perplexity": {}, "kl": {}}
    model, base = load(out, dtype=torch.float32), None
    for tokens in windows_of(arguments.model, tuple(arguments.text), model.config.vocab_size, arguments.windows):
        name, nll, kl = str(tokens.origin["text"]), 0.0, 0.0
        kept = arguments.out / f"reference-{Path(name).stem}-{arguments.windows}.safetensors"
        if not kept.is_file():
            base = base or load(arguments.model, dtype=torch.float32)
            save_file({"logp": torch.cat([log_probabilities(base, ids) for ids in tokens.ids])}, kept)
        wanted = load_file(kept)["logp"].split(tokens.ids.shape[1] - 1)
        for ids, p in zip(tokens.ids, wanted, strict=True):
            q = log_probabilities(model, ids)
            nll -= float(q.gather(1, ids[1:, None]).double().mean())
            kl += float((p.exp() * (p - q)).double().sum(-1).mean())
        found["perplexity"][name], found["kl"][name] = math.exp(nll / len(wanted)), kl / len(wanted)
    return found


@functools.cache
def windows_of(model: Path, texts: tuple[str, ...], vocabulary: int, windows: int) -> list[Any]:
    """The windows of every text: the same for all rows, so they are tokenised once."""
    from moecompress.evaluate import token_sets

    return list(token_sets(model, texts, vocabulary, 512, windows, 400_000))


@torch.no_grad()
def log_probabilities(model: Any, ids: Tensor) -> Tensor:
    """float32 [T - 1, V] for ids [T]."""
    return model(input_ids=ids[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)  # type: ignore[no-any-return]


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown: one line per row, KL (perplexity) per text, mean KL last; best mean first within a kept fraction.

    After it, for rows judged on one domain: KL on that domain and the mean of the others.
    """
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
    return "\n".join(lines) + "\n" + by_domain(rows, texts)


def by_domain(rows: dict[str, dict[str, Any]], texts: list[str]) -> str:
    """Markdown: one line per row judged on one domain, by domain and KL on it; nothing without such rows."""
    found = []
    for row, value in rows.items():
        method, _, rest = row.partition("@")
        domain = rest.rpartition("-")[0].partition(".")[0]
        if domain:
            inside = [value["kl"][text] for text in texts if Path(text).stem == domain]
            outside = [value["kl"][text] for text in texts if Path(text).stem != domain]
            means = statistics.fmean(inside), statistics.fmean(outside)
            found.append((domain, *means, f"{method}@{rest}"))
    head = "\n| judged on one domain | KL inside | KL outside |\n|---|---|---|\n" if found else ""
    return head + "".join(f"| {row} | {inside:.3f} | {outside:.3f} |\n" for _, inside, outside, row in sorted(found))


def main() -> None:
    """Measure the rows that are missing."""
    parser = arguments_of(__doc__, ROWS)
    parser.add_argument("--tokens", type=Path, required=True, help="safetensors with int32 `ids` [N, T]")
    parser.add_argument("--domain", action="append", default=[], help="DOMAIN=TEXT for calibration on it alone")
    parser.add_argument("--demonstrations", type=int, default=64, help="sequences of prompts and replies per domain")
    arguments = parser.parse_intermixed_args()
    rows = Rows(arguments.out, table)
    for row in rows.missing(arguments.rows):
        rows.add(row, found := measured(row, arguments))
        print(row, {Path(text).stem: round(value, 4) for text, value in found["kl"].items()}, flush=True)


if __name__ == "__main__":
    main()
