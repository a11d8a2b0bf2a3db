"""Perplexity, KL and agreement of a directory, streamed: one layer of each model in memory at a time.

Windows of equal length, every window weighs the same. The reference (the original model) runs in lockstep, so both
models see the same tokens and KL and router agreement need no second pass. On request a native checkpoint is evaluated
as it is served instead: whole in memory, on kernels.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moecompress.calib.sources import resolve_text
from moecompress.calib.tokenizer import load_tokenizer
from moecompress.calib.tokens import make_token_set
from moecompress.calib.tokens import windows as cut_windows
from moecompress.errors import CalibrationError, CheckpointError, message
from moecompress.evalstore import WINDOWS, update_evaluation, write_rows
from moecompress.fingerprint import versions
from moecompress.memory import return_freed_memory
from moecompress.numerics.routing import set_agreement
from moecompress.packed import STREAMED
from moecompress.progress import NoProgress, Progress
from moecompress.served import Served
from moecompress.stream.collect import Collector
from moecompress.stream.model import StreamModel, open_model
from moecompress.stream.streams import TokenRun, final_logits, run_layer, start_run
from moecompress.types import TokenSet

CHARACTERS = 400_000  # of each text; with 40 windows of 512 tokens more text is not looked at anyway
BATCH_TOKENS = 4096
SEPARATOR = "<|endoftext|>"
Logits = Iterator[tuple[Tensor, Tensor]]  # (ids [1, T], logits [1, T, V]) of every window
Chosen = dict[int, Tensor | None]  # of MoE layers: the experts [tokens, K], -1: skipped; None where they are not known


@dataclass(frozen=True)
class Window:
    """One evaluated window. nll, kl: mean nats per predicted token; agree: share of equal arg-max; T - 1 tokens.

    digest: of the token ids, so that windows of two models are only paired when they are the same.
    """

    text: str
    index: int
    nll: float
    kl: float | None
    agree: float | None
    digest: str = ""


def evaluate_dir(
    path: Path,
    texts: Sequence[str],
    reference: Path | None = None,
    *,
    length: int = 512,
    windows: int = 40,
    characters: int = CHARACTERS,
    activation_bits: int | None = None,
    served: bool = False,
    device: str = "cpu",
    progress: Progress | None = None,
    save: bool = True,
) -> dict[str, Any]:
    """Evaluate a checkpoint directory (dense or native) on texts; the result is what eval.json holds.

    texts: files or `python-stdlib:heldout`. Per text: the first `characters` characters without separator lines,
    tokenised; of the floor(tokens / length) windows `windows` are taken at even stride. reference: the original model,
    for KL(reference || this) and agreement, always streamed. activation_bits: of `open_model`.
    served: a native checkpoint whole in memory on `device`, in its own dtype, on kernels, not streamed in float32.
    save: write eval.json and the per-window results into `path/moecompress`.
    """
    if not texts:
        raise CalibrationError(message("evaluation", "no text given", "a text file or python-stdlib:heldout"))
    shown = progress or NoProgress()
    return_freed_memory()
    model = open_model(path, activation_bits=activation_bits)
    base = open_model(reference) if reference is not None else None
    if base is not None and base.facts.vocab_size != model.facts.vocab_size:
        raise CheckpointError(
            message(str(reference), f"vocabulary of {base.facts.vocab_size}", f"{model.facts.vocab_size}")
        )
    sets = token_sets(path, texts, model.facts.vocab_size, length, windows, characters)
    whole = Served(model, device, activation_bits) if served else None
    with tempfile.TemporaryDirectory(prefix="moecompress-eval-") as folder:
        runs = _start(model, sets, Path(folder) / "model") if whole is None else {}
        bases = _start(base, sets, Path(folder) / "reference") if base is not None else {}
        mine, theirs = _through_layers(model, runs, base, bases, shown)
        found: list[Window] = []
        shown.stage("windows", len(sets))
        for tokens in sets:
            logits = final_logits(model, runs[tokens.name], "original") if whole is None else whole.logits(tokens.ids)
            wanted = None if base is None else final_logits(base, bases[tokens.name], "original")
            found += _score(model.root, str(tokens.origin["text"]), logits, wanted)
            shown.step(tokens.name)
    backend = STREAMED if whole is None else whole.backend
    if activation_bits is not None and whole is None:
        backend += f"; inputs of packed matrices rounded to int{activation_bits} on request"
    agreement = _agreement(model, mine if whole is None else whole.chosen(), base, theirs)
    result = summary(found, agreement, reference, backend)
    if save:
        _save(path, result, found)
    return result


def token_sets(
    path: Path, texts: Sequence[str], vocab_size: int, length: int, count: int, characters: int
) -> list[TokenSet]:
    """One token set per text, named after its file. Raises CalibrationError for texts that are too short."""
    tokenizer: Any = load_tokenizer(path)
    made: list[TokenSet] = []
    for ref in texts:
        text = resolve_text(ref).replace(f"{SEPARATOR}\n", "")[:characters]
        ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if ids.numel() and int(ids.max()) >= vocab_size:
            raise CalibrationError(message(ref, f"token id {int(ids.max())}", f"0..{vocab_size - 1}"))
        name = ref if ":" in ref else Path(ref).stem
        name = name if all(name != known.name for known in made) else f"{name}-{len(made)}"
        made.append(make_token_set(name, cut_windows(ids, length, count), {"text": ref}, heldout=0))
    return made


def _start(model: StreamModel, sets: Sequence[TokenSet], folder: Path) -> dict[str, TokenRun]:
    runs = {}
    for number, tokens in enumerate(sets):
        place = folder / str(number)  # a text's name may not be a file name
        runs[tokens.name] = start_run(model, _renamed(tokens), place, batch_tokens=BATCH_TOKENS, streams=("original",))
    return runs


def _renamed(tokens: TokenSet) -> TokenSet:
    return TokenSet("text", tokens.ids, tokens.origin, tokens.digest)


def _through_layers(
    model: StreamModel,
    runs: Mapping[str, TokenRun],
    base: StreamModel | None,
    bases: Mapping[str, TokenRun],
    progress: Progress,
) -> tuple[Chosen, Chosen]:
    """Run all layers of both models, in lockstep, on what they have to run; returns the experts that they chose."""
    mine: Chosen = {}
    theirs: Chosen = {}
    if not runs and base is None:
        return mine, theirs
    progress.stage("evaluate", len(model.layers))
    for index in range(len(model.layers)):
        if runs:
            mine |= _chosen(model, runs, index)
        if base is not None:
            theirs |= _chosen(base, bases, index)
        progress.step(f"layer {index}")
    return mine, theirs


def _agreement(model: StreamModel, mine: Chosen, base: StreamModel | None, theirs: Chosen) -> list[float | None]:
    """Router agreement of every MoE layer of the model, from the experts that both models chose.

    None without a reference, and where the models have other numbers of experts: the numbers mean other experts then.
    """
    agreement: list[float | None] = []
    for index, ids in mine.items():
        wanted = theirs.get(index)
        alike = base is not None and _experts(base, index) == _experts(model, index)
        agreement.append(set_agreement(wanted, ids) if alike and ids is not None and wanted is not None else None)
    return agreement


def _experts(model: StreamModel, index: int) -> int | None:
    site = model.facts.layers[index].site
    return None if site is None else site.num_experts


def _chosen(model: StreamModel, runs: Mapping[str, TokenRun], index: int) -> Chosen:
    """Send all texts through one layer; the experts that it chose, nothing for a dense layer."""
    site = model.facts.layers[index].site
    weights = model.read_layer(index)
    ids = []
    for run in runs.values():
        collector = None if site is None else Collector(site, (), (), run.measured)
        run_layer(model, weights, run, "original", collector=collector)
        if collector is not None:
            ids += [found.masked_fill(found == len(weights.experts), -1) for found in collector.log.ids]
    return {index: torch.cat(ids).long()} if ids else {}


def _score(root: Path, name: str, logits: Logits, base: Logits | None) -> Iterator[Window]:
    for index, (ids, own) in enumerate(logits):
        found = own[0, :-1].log_softmax(-1)
        nll = -float(found.gather(1, ids[0, 1:, None]).double().mean())
        kl = agree = None
        if base is not None:
            p = next(base)[1][0, :-1].log_softmax(-1)
            kl = float((p.exp() * (p - found)).double().sum(-1).mean())
            agree = float((p.argmax(-1) == found.argmax(-1)).double().mean())
        if not math.isfinite(nll):
            raise CheckpointError(message(f"{root}: {name} window {index}", "logits are not finite"))
        digest = hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest()[:16]
        yield Window(name, index, nll, kl, agree, digest)


def summary(
    found: Sequence[Window], agreement: Sequence[float | None], reference: Path | None, backend: str
) -> dict[str, Any]:
    """eval.json from windows: per text, and `all` over every window when there are several texts."""
    names = list(dict.fromkeys(window.text for window in found))
    groups = {_short(name): [window for window in found if window.text == name] for name in names}
    if len(groups) > 1:
        groups["all"] = list(found)
    result: dict[str, Any] = {"perplexity": {}, "kl": {}, "top1_agreement": {}}
    for name, rows in groups.items():
        nll = torch.tensor([row.nll for row in rows], dtype=torch.float64)
        value = math.exp(float(nll.mean()))
        spread = float(nll.std() / math.sqrt(len(rows))) if len(rows) > 1 else None
        result["perplexity"][name] = {"value": value, "stderr": None if spread is None else value * spread}
        if all(row.kl is not None for row in rows):
            result["kl"][name] = sum(row.kl or 0.0 for row in rows) / len(rows)
            result["top1_agreement"][name] = sum(row.agree or 0.0 for row in rows) / len(rows)
    return result | {
        "router_agreement": list(agreement),
        "tasks": {},
        "samples": None,
        "backend": backend,
        "versions": versions(),
        "limit": None,
        "reference": None if reference is None else str(reference),
    }


def _short(name: str) -> str:
    return name if ":" in name else Path(name).stem


def _save(path: Path, result: dict[str, Any], found: Sequence[Window]) -> None:
    """Results of tasks that eval.json already has stay in it."""
    result["windows"] = write_rows(path, WINDOWS, map(vars, found))
    measured = {key: value for key, value in result.items() if key not in ("tasks", "samples", "limit")}
    result["samples"] = update_evaluation(path, measured, WINDOWS)["samples"]
