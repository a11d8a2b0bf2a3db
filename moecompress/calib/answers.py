"""Calibration source `answers`: prompts and the model's own replies (the demonstrations of EASY-EP, 2504.06792)."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moecompress.calib.options import AnswersOptions
from moecompress.calib.sources import read_documents
from moecompress.calib.spec import CalibrationSource, Rows, SourceSpec, content_hash
from moecompress.calib.tokenizer import tokenizer_hash
from moecompress.calib.workshop import Gauge, Kept, Made, Workshop, model_identity, seeded
from moecompress.errors import CalibrationError, message
from moecompress.numerics.sampling import next_tokens
from moecompress.stream.generate import Growing, growing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def make_answers(
    spec: CalibrationSource, tokenizer: PreTrainedTokenizerBase | None, where: str, workshop: Workshop
) -> Rows:
    """Rows [samples, length] cut from conversations (prompt, reply, end of text) one after another, prompts in an order
    drawn by the seed; only as many prompts are answered as the rows need.

    `selected` marks the tokens of prompts or replies where `select` asks for one of them. Prompts that leave no room
    for a reply in the model's context are skipped and counted. Raises CalibrationError: no tokenizer or end of text, no
    usable prompt, too few tokens.
    """
    options = spec.options
    assert isinstance(options, AnswersOptions)
    if tokenizer is None or tokenizer.eos_token_id is None:
        found = "the model has no tokenizer" if tokenizer is None else "the tokenizer has no end-of-text token"
        raise CalibrationError(message(where, found, then="add the model's tokenizer files"))
    files = tuple(map(str, options.files))
    texts = read_documents(_reader(spec, files), where).texts
    chat = options.template == "auto" and bool(getattr(tokenizer, "chat_template", None))
    prompts, skipped = _prompts(texts, tokenizer, chat, _room(workshop, options.max_tokens), where)
    separator = int(tokenizer.eos_token_id)
    order = list(range(len(prompts)))
    random.Random(spec.seed).shuffle(order)
    parts = {
        "source": "answers",
        "model": model_identity(workshop.model.index),
        "content": content_hash(texts),
        "tokenizer": tokenizer_hash(tokenizer),
        "generator": options.generator,
        "batch": options.rows_at_once(spec.samples),
        **{key: getattr(options, key) for key in ("template", "max_tokens", "temperature", "top_p")},
        **{key: getattr(spec, key) for key in ("samples", "length", "seed")},
    }
    kept = Kept(Path(options.cache) if options.cache else workshop.kept, parts)

    def make() -> Made:
        return _joined(spec, options, [(i, prompts[i]) for i in order], separator, kept, workshop, where)

    tensors, facts = kept.whole(make)
    reply = tensors["reply"]
    selected = {"all": None, "reply": reply, "prompt": ~reply}[options.select]
    origin = {"files": list(files), "chat_template": chat, "skipped": skipped, **parts, **facts}
    return Rows(tensors["ids"], origin, selected)


def answer(
    grow: Growing,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    ends: frozenset[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    generators: Sequence[torch.Generator] | None = None,
) -> list[list[int]]:
    """The model's reply to each prompt: up to max_tokens ids; one of `ends` is its last.

    All prompts advance together without padding: a row whose prompt is not over takes its next prompt token.
    """
    replies: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))
    start = min(map(len, prompts))
    grown = grow.begin(torch.tensor([list(prompt[:start]) for prompt in prompts]))
    place = start
    while rows:
        free = [position for position, row in enumerate(rows) if place >= len(prompts[row])]
        own = None if generators is None else [generators[rows[position]] for position in free]
        chosen = dict(zip(free, next_tokens(grown.logprobs[free], temperature, top_p, own).tolist(), strict=True))
        alive, tokens = [], []
        for position, row in enumerate(rows):
            token = chosen.get(position)
            if token is None:
                token = prompts[row][place]
            else:
                replies[row].append(token)
                if token in ends or len(replies[row]) == max_tokens:
                    continue
            alive.append(position)
            tokens.append(token)
        rows = [rows[position] for position in alive]
        place += 1
        if rows:
            grown = grow.extend(torch.tensor(alive), torch.tensor(tokens))
    return replies


def _joined(
    spec: CalibrationSource,
    options: AnswersOptions,
    prompts: Sequence[tuple[int, list[int]]],
    separator: int,
    kept: Kept,
    workshop: Workshop,
    where: str,
) -> Made:
    """Conversations in batches until the rows are full; ids [N, T] and `reply` bool [N, T]."""
    ends, need = _ends(workshop, separator), spec.samples * spec.length
    stream: list[int] = []
    marks: list[bool] = []
    size, began, made, used = options.rows_at_once(spec.samples), time.perf_counter(), 0, 0
    gauge = Gauge(workshop.progress, f"{where}: answers", need)
    with growing(workshop.model, options.generator, workshop.scratch / "cache") as grow:
        for number, at in enumerate(range(0, len(prompts), size)):
            batch = prompts[at : at + size]

            def reply(batch: Sequence[tuple[int, list[int]]] = batch) -> Made:
                found = answer(
                    grow,
                    [prompt for _, prompt in batch],
                    max_tokens=options.max_tokens,
                    ends=ends,
                    temperature=options.temperature,
                    top_p=options.top_p,
                    generators=[seeded(spec.seed, "answers", index) for index, _ in batch],
                )
                flat = torch.tensor([token for text in found for token in text])
                return {"replies": flat, "lengths": torch.tensor([len(text) for text in found])}, {}

            tensors = kept.part(number, reply)[0]
            replies = tensors["replies"].split(tensors["lengths"].tolist())
            for (_, prompt), text in zip(batch, (one.tolist() for one in replies), strict=True):
                if len(stream) >= need:
                    break
                tail = [] if text[-1] in ends else [separator]
                stream += [*prompt, *text, *tail]
                marks += [False] * len(prompt) + [True] * len(text) + [False] * len(tail)
                made, used = made + len(text), used + 1
            gauge.reach(min(len(stream), need))
            if len(stream) >= need:
                break
    if len(stream) < need:
        found = f"{len(stream)} tokens in {used} conversations; needed: {spec.samples} x {spec.length}"
        fits = f"set `samples: {len(stream) // spec.length}`" if len(stream) >= spec.length else "a smaller `length:`"
        raise CalibrationError(message(where, found, then=f"add prompts, raise `max_tokens:`, or {fits}"))
    ids, reply_mask = (torch.tensor(values[:need]).reshape(spec.samples, spec.length) for values in (stream, marks))
    seconds = round(time.perf_counter() - began, 1)
    return {"ids": ids, "reply": reply_mask}, {"conversations": used, "reply_tokens": made, "seconds": seconds}


def _prompts(
    texts: Sequence[str], tokenizer: Any, chat: bool, room: int | None, where: str
) -> tuple[list[list[int]], int]:
    """Token ids of every prompt that fits, and how many do not."""
    found = []
    for text in texts:
        if chat:
            turn = [{"role": "user", "content": text}]
            shown = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            ids = tokenizer(shown, add_special_tokens=False, verbose=False)["input_ids"]
        else:
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if ids:
            found.append(list(ids))
    fitting = [ids for ids in found if room is None or len(ids) <= room]
    if not fitting:
        text = f"none of {len(texts)} prompts can be used"
        then = f"prompts may have at most {room} tokens: lower `max_tokens:` or shorten them"
        raise CalibrationError(message(where, text, then=then if found else "give prompts with text"))
    return fitting, len(found) - len(fitting)


def _room(workshop: Workshop, max_tokens: int) -> int | None:
    """Prompt tokens that leave room for a reply in the model's context."""
    limit = getattr(workshop.model.config.get_text_config(), "max_position_embeddings", None)
    return limit - max_tokens if isinstance(limit, int) and limit > 0 else None


def _ends(workshop: Workshop, separator: int) -> frozenset[int]:
    """Ids that end a reply: the tokenizer's end of text and those of the model's config."""
    named = getattr(workshop.model.config.get_text_config(), "eos_token_id", None)
    listed = named if isinstance(named, list) else [named]
    return frozenset({separator, *(int(token) for token in listed if token is not None)})


def _reader(spec: CalibrationSource, files: Sequence[str]) -> CalibrationSource:
    """The same files as documents: jsonl by their ending, text otherwise."""
    lines = all(".jsonl" in Path(file).name for file in files)
    return SourceSpec("jsonl" if lines else "text", files=tuple(files), field=spec.options.field)
