"""Calibration source `ebss`: texts that the model samples from itself, balanced over its experts (2505.03804)."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moecompress.calib.cache import cache_key
from moecompress.calib.options import EbssOptions
from moecompress.calib.search import Corpus, search
from moecompress.calib.spec import CalibrationSource, Rows
from moecompress.calib.tokenizer import tokenizer_hash
from moecompress.calib.workshop import Gauge, Kept, Made, Workshop, model_identity, seeded
from moecompress.errors import CalibrationError, message
from moecompress.memory import peak_resident
from moecompress.numerics.ebss import sigma
from moecompress.numerics.repetition import compressed_share, distinct_share
from moecompress.stream.generate import growing

REPETITIVE = 0.2  # rows that zlib makes smaller than this share count as repetitive


def make_ebss(spec: CalibrationSource, tokenizer: Any, where: str, workshop: Workshop) -> Rows:
    """Rows [samples, length] of self-sampled tokens; the origin holds every setting and what came out.

    The first token of a sentence is uniform over the vocabulary (the tokenizer's, or all of the model's without one).
    `batch` sentences advance together; a finished batch is kept, so a stopped generation goes on from there
    (`streamed`: from the last token). Raises CalibrationError where special tokens cannot be told from others.
    """
    options = spec.options
    assert isinstance(options, EbssOptions)
    settings = options.settings()
    forbidden = forbidden_ids(workshop.model.facts.vocab_size, tokenizer, settings.special == "ban", where)
    parts = {
        "source": "ebss",
        "model": model_identity(workshop.model.index),
        "tokenizer": None if tokenizer is None else tokenizer_hash(tokenizer),
        "generator": options.generator,
        "batch": options.rows_at_once(spec.samples),
        "settings": asdict(settings),
        **{key: getattr(spec, key) for key in ("samples", "length", "seed")},
    }
    kept = Kept(Path(options.cache) if options.cache else workshop.kept, parts)
    tensors, facts = kept.whole(lambda: _generate(spec, options, forbidden, kept, where, workshop))
    return Rows(tensors["ids"], {"mode": options.mode, **parts, **facts})


def forbidden_ids(vocabulary: int, tokenizer: Any, special: bool, where: str) -> Tensor:
    """bool [V], ids that are no tokens of the tokenizer and, where `special`, its special ones."""
    forbidden = torch.zeros(vocabulary, dtype=torch.bool)
    if tokenizer is not None:
        forbidden[min(vocabulary, len(tokenizer)) :] = True
    if special:
        if tokenizer is None:
            found = "`special: ban` needs a tokenizer and the model has none"
            raise CalibrationError(message(where, found, then="add its files, or set `special: allow`"))
        forbidden[[i for i in tokenizer.all_special_ids if i < vocabulary]] = True
    return forbidden


def first_tokens(numbers: range, forbidden: Tensor, seed: int) -> Tensor:
    """int64 [S]: for every sentence one token, uniform over those that are not forbidden."""
    allowed = (~forbidden).nonzero()[:, 0]
    own = (seeded(seed, f"ebss {number}", 0) for number in numbers)
    return torch.stack([allowed[torch.randint(len(allowed), (), generator=one)] for one in own])


def _generate(
    spec: CalibrationSource, options: EbssOptions, forbidden: Tensor, kept: Kept, where: str, workshop: Workshop
) -> Made:
    """Batch after batch; a later one knows the routing of all before it."""
    settings, size = options.settings(), options.rows_at_once(spec.samples)
    site = workshop.model.facts.moe_layers[0].site
    assert site is not None
    title = f"{where}: sampling {spec.samples} x {spec.length} tokens"
    gauge = Gauge(workshop.progress, title, spec.samples * spec.length)
    scratch = workshop.scratch / cache_key(kept.parts)
    began = time.perf_counter()
    ids: list[Tensor] = []
    counts: list[Tensor] = []
    likelihood: list[float] = []
    corpus = Corpus()
    with growing(workshop.model, options.generator, scratch) as grow:
        for number, at in enumerate(range(0, spec.samples, size)):
            numbers = range(at, min(at + size, spec.samples))

            def batch(numbers: range = numbers, corpus: Corpus = corpus) -> Made:
                found = search(
                    grow,
                    first_tokens(numbers, forbidden, spec.seed),
                    numbers,
                    settings,
                    spec.length,
                    experts=site.num_experts,
                    forbidden=forbidden,
                    seed=spec.seed,
                    corpus=corpus,
                    note=str(numbers),
                    step=lambda reached: gauge.reach(numbers.start * spec.length + len(numbers) * reached),
                )
                made = {"ids": found.ids.to(torch.int32), "counts": found.counts.to(torch.int32)}
                return made, {"likelihood": found.likelihood.tolist()}

            tensors, facts = kept.part(number, batch)
            ids.append(tensors["ids"].long())
            counts.append(tensors["counts"].long())
            likelihood += facts["likelihood"]
            corpus = Corpus(torch.cat(counts).sum(0), sum(map(len, ids)) * spec.length)
            gauge.reach((at + len(numbers)) * spec.length)
    shutil.rmtree(scratch, ignore_errors=True)
    seconds = time.perf_counter() - began
    facts = describe(torch.cat(ids), torch.cat(counts), torch.tensor(likelihood))
    facts |= {"seconds": round(seconds, 1), "tokens_per_second": round(spec.samples * spec.length / seconds, 1)}
    return {"ids": torch.cat(ids), "counts": torch.cat(counts).sum(0)}, {**facts, "peak_rss_bytes": peak_resident()}


def describe(ids: Tensor, counts: Tensor, likelihood: Tensor) -> dict[str, Any]:
    """What a self-sampled set is like. ids [N, T]; counts [N, L, E]; likelihood [N], log P without the first token.

    nll: per token. sigma_*: eq. 3, mean over sentences and of all together. compressed_share, distinct_4: repetition.
    """
    count, length = ids.shape
    shares = [compressed_share(row) for row in ids]
    total = counts.sum(0)
    return {
        "nll": float(-likelihood.mean() / (length - 1)),
        "sigma_sentence": float(sigma(counts, length).mean()),
        "sigma_set": float(sigma(total, count * length)),
        "compressed_share": sum(shares) / count,
        "repetitive_rows": sum(share < REPETITIVE for share in shares),
        "distinct_4": sum(distinct_share(row) for row in ids) / count if length >= 4 else 1.0,
        "tokens_per_expert": {"least": int(total.min()), "most": int(total.max())},
        "experts_without_tokens": int((total == 0).sum()),
    }
