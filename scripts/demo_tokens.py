"""Text folders -> tokenizer and token files of the demo trainer (`train_demo_moe.py`); mixed training batches."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moecompress.calib import SourceSpec
from moecompress.calib.sources import SEPARATOR, read_documents
from moecompress.checkpoint.writer import atomic_write
from moecompress.errors import CalibrationError, OutputError, RecipeError, message

PIECE = 20_000  # characters given to the tokenizer at once
BPE_CHARS = 6_000_000  # of each domain, enough to learn the merges from


@dataclass(frozen=True)
class Domain:
    """Token ids uint32 of one domain: a stream to train on and its tail, which is held out."""

    train: np.ndarray[Any, Any]
    heldout: np.ndarray[Any, Any]


def open_corpus(run: Path, data: Path, settings: Mapping[str, Any]) -> dict[str, Domain]:
    """The domains of a run folder, tokenised when it is new; `settings` has vocab_size, window and heldout.

    Raises OutputError when the folder was made under other settings or from other text, CalibrationError for a
    folder without text or a domain too small for its windows.
    """
    files = {domain.name: sorted(domain.rglob("*.txt")) for domain in sorted(data.glob("*")) if domain.is_dir()}
    files = {name: paths for name, paths in files.items() if paths}
    if not files:
        raise CalibrationError(message(str(data), "no sub-folder with *.txt files", "one folder per domain"))
    wanted = {**settings, "data": _fingerprint(data, files)}
    note = run / "settings.json"
    if note.is_file():
        _compare(run, json.loads(note.read_text(encoding="utf-8")), wanted)
    else:
        run.mkdir(parents=True, exist_ok=True)
        _tokenise(run, files, settings)
        atomic_write(note, json.dumps(wanted, indent=1) + "\n")  # last: it says that the tokens are complete
    streams = {name: np.memmap(run / f"{name}.tokens", dtype=np.uint32, mode="r") for name in files}
    cuts = {name: _training_length(len(stream), settings) for name, stream in streams.items()}
    return {name: Domain(stream[: cuts[name]], stream[cuts[name] :]) for name, stream in streams.items()}


def parse_mix(text: str, domains: Sequence[str]) -> dict[str, float]:
    """`"a=1,b=3"` -> {"a": 0.25, "b": 0.75}; an empty text weighs all domains alike. Raises RecipeError."""
    if not text:
        return {name: 1 / len(domains) for name in domains}
    try:
        weights = {name.strip(): float(value) for name, value in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise RecipeError(message("--mix", f"'{text}'", "name=weight,name=weight")) from None
    total = sum(weights.values())
    if not set(weights) <= set(domains) or min(weights.values()) < 0 or not 0 < total < math.inf:
        raise RecipeError(message("--mix", f"'{text}'", f"weights of 0 or more for {', '.join(domains)}"))
    return {name: value / total for name, value in weights.items()}


def batch_of(
    corpus: Mapping[str, Domain], mix: Mapping[str, float], *, size: int, window: int, seed: int, step: int
) -> Tensor:
    """Training windows int64 [size, window + 1] of one step; the same for the same seed and step."""
    generator = np.random.default_rng([seed, step])
    rows = []
    for name in generator.choice(list(mix), size=size, p=list(mix.values())):
        stream = corpus[name].train
        start = generator.integers(0, len(stream) - window)
        rows.append(stream[start : start + window + 1].astype(np.int64))
    return torch.from_numpy(np.stack(rows))


def _fingerprint(data: Path, files: Mapping[str, Sequence[Path]]) -> str:
    digest = hashlib.sha256()
    for path in (path for paths in files.values() for path in paths):
        digest.update(f"{path.relative_to(data).as_posix()}\n".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _compare(run: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    changed = [key for key in wanted if stored.get(key) != wanted[key]]
    if changed:
        found = "; ".join(f"{key} was {stored.get(key)!r}, is {wanted[key]!r}" for key in changed)
        then = "run with the old settings, choose another --out, or remove that folder"
        raise OutputError(message(str(run), f"made with other settings ({found})", then=then))


def _tokenise(run: Path, files: Mapping[str, Sequence[Path]], settings: Mapping[str, Any]) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = {name: read_documents(SourceSpec("text", files=tuple(paths)), name).texts for name, paths in files.items()}
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = int(settings["vocab_size"])
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[SEPARATOR], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator((piece for name in texts for piece in _pieces(texts[name], BPE_CHARS)), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=SEPARATOR, bos_token=SEPARATOR)
    tokenizer.save_pretrained(run)
    for name, documents in texts.items():
        ids: list[int] = []
        for document in documents:
            for piece in _pieces([document]):
                ids.extend(backend.encode(piece).ids)
            ids.append(int(tokenizer.eos_token_id))
        train = _training_length(len(ids), settings)
        if train <= settings["window"]:
            found = f"{len(ids)} tokens do not hold a training and a held-out window of {settings['window'] + 1}"
            raise CalibrationError(message(f"domain '{name}'", found, then="add text, or change --window, --heldout"))
        atomic_write(run / f"{name}.tokens", np.array(ids, dtype=np.uint32).tobytes())


def _pieces(documents: Sequence[str], limit: int | None = None) -> Iterator[str]:
    given = 0
    for document in documents:
        for start in range(0, len(document), PIECE):
            if limit is not None and given >= limit:
                return
            piece = document[start : start + PIECE]
            given += len(piece)
            yield piece


def _training_length(total: int, settings: Mapping[str, Any]) -> int:
    return total - max(int(settings["window"]) + 1, int(total * settings["heldout"]))
