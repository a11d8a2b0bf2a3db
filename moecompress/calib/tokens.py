"""Documents -> token windows of one length, without padding; held-out indices; evaluation windows."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moecompress.calib.answers import make_answers
from moecompress.calib.balance import balanced, pool_rows
from moecompress.calib.cache import cache_key, cache_read, cache_write, digest_of
from moecompress.calib.ebss import make_ebss
from moecompress.calib.manifest import check_digest, load_manifest
from moecompress.calib.mix import mixed
from moecompress.calib.sources import read_documents, required_files
from moecompress.calib.spec import CalibrationSource, Documents, Rows, content_hash, with_samples
from moecompress.calib.tokenizer import tokenizer_hash
from moecompress.calib.workshop import Workshop
from moecompress.errors import CalibrationError, message
from moecompress.types import TokenSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

POOL = 4  # windows are drawn from up to so many times the tokens needed: long documents do not fill a set alone
BATCH = 32  # documents tokenised at once
GENERATED = ("answers", "ebss")  # sources that run the model


def build_token_set(
    name: str,
    spec: CalibrationSource,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    vocab_size: int,
    cache_dir: Path | None,
    workshop: Workshop | None = None,
) -> TokenSet:
    """The token set `name` of a recipe: ids int64 [samples, length], equal for equal source, tokenizer, seed.

    Documents are shuffled by the seed, tokenised without special tokens and joined by the end-of-text id;
    windows are drawn by the seed and keep the documents' order. `source: tokens` takes its ids as they are; `answers`
    and `ebss` generate with the model of the workshop.
    Raises CalibrationError (source empty, too short, unreadable, ids outside the vocabulary, no tokenizer)
    and MachineError (no network, no library).
    """
    where = f"calibration '{name}'"
    _check_sizes(spec, where)
    rows = _pooled(spec, tokenizer, cache_dir, where, workshop)
    top = int(rows.ids.max())
    if top >= vocab_size or int(rows.ids.min()) < 0:
        found = f"token id {top if top >= vocab_size else int(rows.ids.min())}"
        then = "use the tokenizer (or the token file) of this very model"
        raise CalibrationError(message(where, found, f"0 to {vocab_size - 1} (the model's vocabulary)", then))
    apart = heldout_rows(rows.ids.shape[0], spec.heldout) if rows.heldout is None else rows.heldout
    ids = rows.ids.to(torch.int64).contiguous()
    return TokenSet(name, ids, dict(rows.origin), digest_of(ids), apart, rows.selected)


def _pooled(
    spec: CalibrationSource,
    tokenizer: PreTrainedTokenizerBase | None,
    cache_dir: Path | None,
    where: str,
    workshop: Workshop | None,
) -> Rows:
    """The rows as the source gives them, or those that `balance` chooses from a larger pool."""
    if spec.balance is None:
        return _rows(spec, tokenizer, cache_dir, where, workshop)
    if workshop is None:
        raise CalibrationError(message(where, "`balance` needs the model", then="pass a workshop"))
    count = pool_rows(spec)
    shown = f"{where}, pool of {count} rows for `balance`"
    pool = _rows(with_samples(spec, count), tokenizer, cache_dir, shown, workshop)
    held = len(heldout_rows(spec.samples, spec.heldout))
    return balanced(pool, spec, held, where, workshop)


def _rows(
    spec: CalibrationSource,
    tokenizer: PreTrainedTokenizerBase | None,
    cache_dir: Path | None,
    where: str,
    workshop: Workshop | None,
) -> Rows:
    if spec.source == "mix":
        return mixed(spec, where, lambda part, at: _rows(part, tokenizer, cache_dir, at, workshop))
    if spec.source == "tokens":
        return Rows(*_token_file(spec, where))
    if spec.source not in GENERATED:
        return Rows(*_tokenised(spec, tokenizer, cache_dir, where))
    if workshop is None:
        raise CalibrationError(message(where, f"source '{spec.source}' needs the model", then="pass a workshop"))
    make = make_answers if spec.source == "answers" else make_ebss
    return make(spec, tokenizer, where, workshop)


def make_token_set(name: str, ids: Tensor, origin: Mapping[str, Any], *, heldout: float) -> TokenSet:
    """A token set of ids [N, T] with its digest and a `heldout` fraction of its rows set apart."""
    ids = ids.to(torch.int64).contiguous()
    return TokenSet(name, ids, dict(origin), digest_of(ids), heldout_rows(ids.shape[0], heldout))


def heldout_rows(count: int, fraction: float) -> tuple[int, ...]:
    """Rows held out of `count`: floor(count * fraction), at least 1, spread evenly; none of < 8 or for 0."""
    if count < 8 or fraction == 0:
        return ()
    chosen = max(1, int(count * fraction))
    return tuple((2 * i + 1) * count // (2 * chosen) for i in range(chosen))


def windows(ids: Tensor, length: int, count: int) -> Tensor:
    """Evaluation windows int64 [n, length] of a token stream [tokens]; n = min(count, floor(tokens / length)).

    They lie on the grid of whole windows, at stride max(1, floor(windows / count)) from the first.
    Raises CalibrationError when not even one fits.
    """
    available = ids.numel() // length
    if available == 0:
        found = f"{ids.numel()} tokens, fewer than one window of {length}"
        raise CalibrationError(message("evaluation text", found, then="use a longer text or a smaller length"))
    stride = max(1, available // count)
    starts = torch.arange(min(count, available)) * stride
    return ids[: available * length].reshape(available, length)[starts].to(torch.int64)


def pack(
    texts: Sequence[str],
    encode: Callable[[list[str]], list[list[int]]],
    *,
    separator: int,
    samples: int,
    length: int,
    seed: int,
) -> tuple[Tensor, int]:
    """Windows int64 [m, length] with m <= samples, and the number of tokens they were drawn from.

    m < samples means that the texts are too short. One generator makes the document order, then the draw.
    """
    generator = random.Random(seed)
    order = list(range(len(texts)))
    generator.shuffle(order)
    stream = array("q")
    for start in range(0, len(order), BATCH):
        for tokens in encode([texts[i] for i in order[start : start + BATCH]]):
            if tokens and stream:
                stream.append(separator)
            stream.extend(tokens)
        if len(stream) >= POOL * samples * length:
            break
    found = len(stream) // length
    rows = sorted(generator.sample(range(found), min(samples, found)))
    pool = torch.tensor(stream[: found * length], dtype=torch.int64).reshape(found, length)
    return pool[rows], len(stream)


def _check_sizes(spec: CalibrationSource, where: str) -> None:
    for key, value, least in (("samples", spec.samples, 1), ("length", spec.length, 2)):
        if value < least:
            raise CalibrationError(message(where, f"{key}: {value}", f"{least} or more"))
    if not 0 <= spec.heldout < 1:
        raise CalibrationError(message(where, f"heldout: {spec.heldout}", "a fraction from 0 to below 1"))


def _token_file(spec: CalibrationSource, where: str) -> tuple[Tensor, dict[str, Any]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    paths = required_files(spec, where)
    if len(paths) != 1:
        raise CalibrationError(message(where, f"{len(paths)} token files", "one .safetensors file"))
    where = f"{where}: {paths[0]}"
    try:
        tensors = load_file(paths[0])
    except (SafetensorError, OSError) as error:
        raise CalibrationError(message(where, f"not a safetensors file ({error})")) from None
    facts = ", ".join(f"{key}: {tensor.dtype} {list(tensor.shape)}" for key, tensor in tensors.items())
    ids = next(iter(tensors.values())) if len(tensors) == 1 else None
    if ids is None or ids.ndim != 2 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise CalibrationError(message(where, facts or "no tensor", "one integer tensor [N, T]"))
    if ids.shape[0] < spec.samples or ids.shape[1] != spec.length:
        found = f"{ids.shape[0]} sequences of {ids.shape[1]} tokens; asked for: {spec.samples} of {spec.length}"
        then = f"set `samples:` to at most {ids.shape[0]} and `length: {ids.shape[1]}`"
        raise CalibrationError(message(where, found, then=then))
    return ids[: spec.samples].to(torch.int64), {"source": "tokens", "files": [str(paths[0])]}


def _tokenised(
    spec: CalibrationSource, tokenizer: PreTrainedTokenizerBase | None, cache_dir: Path | None, where: str
) -> tuple[Tensor, dict[str, Any]]:
    if tokenizer is None:
        found = f"source '{spec.source}' needs a tokenizer and the model has none"
        then = "add the model's tokenizer files, or use `source: tokens`"
        raise CalibrationError(message(where, found, then=then))
    documents = read_documents(spec, where)
    parts = {
        "content": content_hash(documents.texts),
        "tokenizer": tokenizer_hash(tokenizer),
        **{key: getattr(spec, key) for key in ("samples", "length", "seed")},
    }
    key = cache_key(parts)
    cached = cache_read(cache_dir, key) if cache_dir else None
    if cached is None:
        made, facts = _pack_documents(documents, tokenizer, spec, where)
        cached = {"ids": made}, facts
        if cache_dir:
            cache_write(cache_dir, key, cached[0], parts, facts)
    ids, packing = cached[0]["ids"], cached[1]
    if spec.source == "manifest" and spec.manifest:
        manifest = load_manifest(spec.manifest)
        check_digest(manifest, parts["tokenizer"], spec.samples, spec.length, spec.seed, digest_of(ids))
    return ids, {**documents.origin, **parts, **packing}


def _pack_documents(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, spec: CalibrationSource, where: str
) -> tuple[Tensor, dict[str, Any]]:
    if tokenizer.eos_token_id is None:
        then = "name `eos_token` in the model's tokenizer_config.json"
        raise CalibrationError(message(where, "the tokenizer has no end-of-text token", then=then))

    def encode(texts: list[str]) -> list[list[int]]:
        # transformers warns about texts longer than the context; they are cut into windows here.
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return encoded["input_ids"]

    ids, tokens = pack(
        documents.texts,
        encode,
        separator=int(tokenizer.eos_token_id),
        samples=spec.samples,
        length=spec.length,
        seed=spec.seed,
    )
    if tokens == 0:
        raise CalibrationError(message(where, f"no text in {len(documents.texts)} documents"))
    if ids.shape[0] < spec.samples:
        found = f"{tokens} tokens in {len(documents.texts)} documents; needed: {spec.samples} x {spec.length} tokens"
        fits = f"set `samples: {ids.shape[0]}`" if ids.shape[0] else f"set a `length:` of at most {tokens}"
        raise CalibrationError(message(where, found, then=f"add text, or {fits}"))
    return ids, {"documents": len(documents.texts), "tokens_pooled": tokens}
