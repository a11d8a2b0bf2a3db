"""Packing, held-out rows, windows and hashes against loops; token sets through a real tokenizer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from moecompress.calib import SourceSpec, build_token_set, make_token_set, windows
from moecompress.calib.tokens import heldout_rows, pack
from moecompress.errors import CalibrationError

SEPARATOR = 0


def build(spec: SourceSpec, tokenizer: Any, cache: Path | None = None, vocab: int = 320) -> Any:
    return build_token_set("default", spec, tokenizer, vocab_size=vocab, cache_dir=cache)


def numbered(texts: list[str]) -> list[list[int]]:
    """Token ids that name their document and place: text "i:n" has ids i * 1000 + 1 ... i * 1000 + n."""
    pairs = [tuple(map(int, text.split(":"))) for text in texts]
    return [[i * 1000 + 1 + j for j in range(n)] for i, n in pairs]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=60),
    samples=st.integers(1, 6),
    length=st.integers(2, 9),
    seed=st.integers(0, 5),
)
def test_windows_are_runs_of_documents_joined_by_the_separator(
    lengths: list[int], samples: int, length: int, seed: int
) -> None:
    texts = [f"{i}:{n}" for i, n in enumerate(lengths)]
    ids, pooled = pack(texts, numbered, separator=SEPARATOR, samples=samples, length=length, seed=seed)
    filled = [n for n in lengths if n]
    total = sum(filled) + max(0, len(filled) - 1)
    assert pooled <= total
    assert pooled == total or pooled >= 4 * samples * length  # everything, or enough to draw from
    assert ids.shape == (min(samples, pooled // length), length)
    real = [token for row in ids.tolist() for token in row if token != SEPARATOR]
    assert len(real) == len(set(real))  # no token twice
    for row in ids.tolist():
        for here, following in zip(row, row[1:], strict=False):
            if here == SEPARATOR:
                assert following % 1000 == 1  # a document begins
            elif following == SEPARATOR:
                assert here % 1000 == lengths[here // 1000]  # a document ended
            else:
                assert following == here + 1


def test_the_seed_changes_order_and_choice_and_nothing_else() -> None:
    texts = [f"{i}:20" for i in range(30)]
    draws = [pack(texts, numbered, separator=0, samples=4, length=8, seed=s)[0].tolist() for s in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    single = [pack(["0:900"], numbered, separator=0, samples=4, length=8, seed=s)[0].tolist() for s in (0, 1)]
    assert single[0] != single[1]  # one long document: other windows of it


def test_a_giant_document_does_not_fill_the_set() -> None:
    texts = ["0:900", *(f"{i}:20" for i in range(1, 200))]
    for seed in range(200):  # until the giant comes first
        ids, _ = pack(texts, numbered, separator=0, samples=8, length=8, seed=seed)
        if (ids // 1000 == 0).sum() > ids.shape[1]:
            starts = ids[:, 0].tolist()
            assert max(b - a for a, b in zip(starts, starts[1:], strict=False)) > 8  # spread, not the first windows
            return
    raise AssertionError("the giant document was never drawn")


@given(count=st.integers(1, 300), fraction=st.floats(0, 0.9))
@settings(max_examples=100, deadline=None)
def test_heldout_rows_are_even_and_as_many_as_asked(count: int, fraction: float) -> None:
    rows = heldout_rows(count, fraction)
    if count < 8 or fraction == 0:
        assert rows == ()
        return
    assert len(rows) == max(1, int(count * fraction))
    assert list(rows) == sorted(set(rows)) and 0 <= rows[0] and rows[-1] < count
    gaps = [b - a for a, b in zip(rows, rows[1:], strict=False)]
    assert not gaps or max(gaps) - min(gaps) <= 1


@given(tokens=st.integers(1, 200), length=st.integers(1, 12), count=st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_windows_follow_the_rule(tokens: int, length: int, count: int) -> None:
    ids = torch.arange(tokens)
    whole = tokens // length
    if whole == 0:
        with pytest.raises(CalibrationError, match=f"{tokens} tokens"):
            windows(ids, length, count)
        return
    stride = max(1, whole // count)
    expected = [[i * stride * length + j for j in range(length)] for i in range(min(count, whole))]
    assert windows(ids, length, count).tolist() == expected


def test_digest_is_the_documented_one() -> None:
    made = make_token_set("x", torch.tensor([[1, 2, 3], [4, 5, 600]], dtype=torch.int32), {}, heldout=0.0)
    expected = hashlib.sha256(struct.pack("<6q", 1, 2, 3, 4, 5, 600) + struct.pack("<2q", 2, 3)).hexdigest()
    assert made.digest == expected and made.ids.dtype == torch.int64
    other = make_token_set("x", made.ids.reshape(3, 2), {}, heldout=0.0)
    assert other.digest != made.digest  # the shape counts


def test_text_round_trip_without_special_tokens(corpus: Path, tokenizer: Any) -> None:
    spec = SourceSpec("text", files=(corpus,), samples=10, length=16)
    made = build(spec, tokenizer)
    assert made.ids.shape == (10, 16) and made.ids.dtype == torch.int64 and made.name == "default"
    assert made.heldout == (5,)
    documents = corpus.read_text(encoding="utf-8").split("<|endoftext|>\n")
    for row in made.ids.tolist():
        for piece in tokenizer.decode(row).split("<|endoftext|>"):
            assert any(piece in document for document in documents)
    json.dumps(made.origin)
    assert made.origin["documents"] == 40 and made.origin["files"] == [str(corpus)]
    assert build(dataclasses.replace(spec, seed=1), tokenizer).digest != made.digest


class CountingTokenizer:
    """Passes everything on and counts the texts tokenised."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.texts = inner, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, texts: list[str], **options: Any) -> Any:
        self.texts += len(texts)
        return self.inner(texts, **options)


def test_cache_saves_the_work_and_changes_nothing(corpus: Path, tokenizer: Any, tmp_path: Path) -> None:
    spec = SourceSpec("text", files=(corpus,), samples=10, length=16)
    counting, cache = CountingTokenizer(tokenizer), tmp_path / "cache"
    first = build(spec, counting, cache)
    once = counting.texts
    assert once > 0
    again = build(spec, counting, cache)
    assert counting.texts == once and torch.equal(first.ids, again.ids)
    assert dataclasses.replace(first, ids=again.ids) == again
    assert build(spec, tokenizer).origin == first.origin
    assert sorted(path.suffix for path in cache.iterdir()) == [".json", ".safetensors"]

    for changed in (dataclasses.replace(spec, seed=1), dataclasses.replace(spec, length=15)):
        build(changed, counting, cache)
    assert counting.texts == 3 * once
    corpus.write_text(corpus.read_text(encoding="utf-8") + "one more line", encoding="utf-8")
    assert build(spec, counting, cache).digest != first.digest
    assert counting.texts == 4 * once


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_damaged_cache_entry_is_made_again(
    corpus: Path, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, suffix: str, damage: str
) -> None:
    spec = SourceSpec("text", files=(corpus,), samples=10, length=16)
    first = build(spec, tokenizer, tmp_path / "cache")
    entry = next((tmp_path / "cache").glob(f"*{suffix}"))
    raw = bytearray(entry.read_bytes())
    if damage == "cut":
        raw = raw[: len(raw) // 2]
    else:
        place = raw.index(b'"ids": "') + 8 if suffix == ".json" else len(raw) - 8
        raw[place] = raw[place] ^ 1
    entry.write_bytes(raw)
    assert build(spec, tokenizer, tmp_path / "cache").digest == first.digest
    assert "is damaged" in caplog.text
    caplog.clear()
    build(spec, tokenizer, tmp_path / "cache")
    assert not caplog.text  # it was replaced


def test_too_short_says_how_much_and_what_to_do(corpus: Path, tokenizer: Any) -> None:
    full = build(SourceSpec("text", files=(corpus,), samples=1, length=16), tokenizer)
    spec = SourceSpec("text", files=(corpus,), samples=9999, length=16)
    with pytest.raises(CalibrationError) as caught:
        build(spec, tokenizer)
    text = str(caught.value)
    assert "calibration 'default'" in text and "40 documents" in text and "9999 x 16" in text
    fits = int(text.rsplit("samples: ", 1)[1].rstrip("`"))
    assert build(dataclasses.replace(spec, samples=fits), tokenizer).ids.shape == (fits, 16)
    with pytest.raises(CalibrationError):
        build(dataclasses.replace(spec, samples=fits + 1), tokenizer)
    assert full.ids.shape == (1, 16)
    with pytest.raises(CalibrationError, match="`length:` of at most"):
        build(SourceSpec("text", files=(corpus,), samples=1, length=10**6), tokenizer)


def test_documents_without_text(tokenizer: Any, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["", ""]}).save_to_disk(str(tmp_path / "rows"))
    with pytest.raises(CalibrationError, match="no text in 2 documents"):
        build(SourceSpec("datasets", name=str(tmp_path / "rows")), tokenizer)


def test_ids_outside_the_vocabulary_are_refused(corpus: Path, tokenizer: Any) -> None:
    with pytest.raises(CalibrationError, match=r"token id \d+.*0 to 99"):
        build(SourceSpec("text", files=(corpus,), samples=10, length=16), tokenizer, vocab=100)


def test_missing_tokenizer_and_missing_end_of_text(corpus: Path, tokenizer_dir: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    spec = SourceSpec("text", files=(corpus,), samples=10, length=16)
    with pytest.raises(CalibrationError, match="needs a tokenizer.*source: tokens"):
        build(spec, None)
    bare = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_dir / "tokenizer.json"))
    with pytest.raises(CalibrationError, match="no end-of-text token.*eos_token"):
        build(spec, bare)


@pytest.mark.parametrize(
    ("change", "text"),
    [({"samples": 0}, "samples: 0"), ({"length": 1}, "length: 1"), ({"heldout": 1.0}, "heldout: 1.0")],
)
def test_impossible_sizes(corpus: Path, tokenizer: Any, change: dict[str, Any], text: str) -> None:
    with pytest.raises(CalibrationError, match=text):
        build(SourceSpec("text", files=(corpus,), **change), tokenizer)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8, torch.uint16])
def test_token_file_of_any_integer_type(tmp_path: Path, dtype: torch.dtype) -> None:
    ids = torch.randint(0, 200, (12, 6), generator=torch.Generator().manual_seed(0))
    save_file({"whatever": ids.to(dtype)}, tmp_path / "ids.safetensors")
    spec = SourceSpec("tokens", files=(tmp_path / "ids.safetensors",), samples=8, length=6)
    made = build(spec, None, vocab=200)
    assert made.ids.dtype == torch.int64 and torch.equal(made.ids, ids[:8]) and made.heldout == (4,)


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({"a": torch.zeros(4, 6)}, "a: torch.float32"),
        ({"a": torch.zeros(24, dtype=torch.int64)}, r"\[24\]"),
        ({"a": torch.zeros(4, 6, dtype=torch.bool)}, "torch.bool"),
        ({k: torch.zeros(4, 6, dtype=torch.int64) for k in "ab"}, "one integer tensor"),
        ({"a": torch.zeros(3, 6, dtype=torch.int64)}, "at most 3"),
        ({"a": torch.zeros(4, 7, dtype=torch.int64)}, "`length: 7`"),
        ({"a": torch.full((4, 6), 320)}, "token id 320"),
        ({"a": torch.full((4, 6), -1)}, "token id -1"),
    ],
)
def test_wrong_token_files(tmp_path: Path, tensors: dict[str, torch.Tensor], text: str) -> None:
    save_file(tensors, tmp_path / "ids.safetensors")
    with pytest.raises(CalibrationError, match=text):
        build(SourceSpec("tokens", files=(tmp_path / "ids.safetensors",), samples=4, length=6), None)


def test_token_file_that_is_no_safetensors(tmp_path: Path) -> None:
    (tmp_path / "ids.safetensors").write_bytes(b"no")
    with pytest.raises(CalibrationError, match="not a safetensors file"):
        build(SourceSpec("tokens", files=(tmp_path / "ids.safetensors",)), None)
