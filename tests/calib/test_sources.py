"""Files, datasets and references to evaluation texts: what is read, and every mistake a user can make."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from moecompress.calib import SourceSpec, load_tokenizer, resolve_text
from moecompress.calib.sources import read_documents
from moecompress.calib.spec import content_hash
from moecompress.errors import CalibrationError, CheckpointError, MachineError

WHERE = "calibration 'x'"


def texts(spec: SourceSpec) -> list[str]:
    return list(read_documents(spec, WHERE).texts)


def jsonl(path: Path, *records: Any) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n", encoding="utf-8")
    return path


def test_text_is_cut_at_separator_lines_only(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(
        "one <|endoftext|> still\n<|endoftext|>\n\n<|endoftext|>\r\ntwo\n", encoding="utf-8"
    )
    (tmp_path / "b.txt").write_text("whole\nfile", encoding="utf-8")
    found = texts(SourceSpec("text", files=(tmp_path / "a.txt", tmp_path / "b.txt")))
    assert found == ["one <|endoftext|> still\n", "two\n", "whole\nfile"]


def test_jsonl_fields_templates_and_gzip(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"q": "1+1?", "a": "2"}, {"q": "x{y}", "a": "z"}, {"q": " ", "a": "\n"})
    assert texts(SourceSpec("jsonl", files=(path,), field="q")) == ["1+1?", "x{y}"]
    packed = tmp_path / "a.json.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    spec = SourceSpec("jsonl", files=(str(packed),), field="Q: {q} A: {a}")
    assert texts(spec) == ["Q: 1+1? A: 2", "Q: x{y} A: z", "Q:   A: \n"]


@pytest.mark.parametrize(
    ("line", "field", "message"),
    [
        ('{"txt": "b"}', "text", r"a.jsonl, line 2: no field 'text'; did you mean 'txt'\? \(allowed: txt\)"),
        ('{"a": "b"}', "{a}{c}", r"line 1: no field 'a'"),
        ('{"text": 3}', "text", r"line 2: field 'text' holds int"),
        ('{"text": ', "text", r"line 2: not JSON"),
        ("[1]", "text", r"line 2: a JSON list"),
        ('{"text": "b"}', "{text!r}", r"template '\{text!r\}'"),
        ('{"text": "b"}', "{text", r"template '\{text'"),
        ('{"text": "b"}', "{text.__class__}", r"column names in braces"),
    ],
)
def test_jsonl_mistakes_name_the_line(tmp_path: Path, line: str, field: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line, encoding="utf-8")
    with pytest.raises(CalibrationError, match=message):
        texts(SourceSpec("jsonl", files=(tmp_path / "a.jsonl",), field=field))


@pytest.mark.parametrize("source", ["text", "jsonl", "tokens"])
def test_missing_files(tmp_path: Path, source: str) -> None:
    from moecompress.calib import build_token_set

    for files, message in [
        ((), "without files"),
        ((tmp_path / "no",), "no does not exist"),
        ((tmp_path,), "not a file"),
    ]:
        with pytest.raises(CalibrationError, match=message):
            build_token_set("x", SourceSpec(source, files=files), _Tokenizer(), vocab_size=9, cache_dir=None)


class _Tokenizer:
    eos_token_id = 0


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.txt", b" \n\n", "no text in"),
        ("a.txt", b"", "no text in"),
        ("a.txt", b"abc\xff", r"not UTF-8 \(byte 3\)"),
        ("a.txt.gz", b"plain", "cannot be read"),
        ("a.txt.gz", gzip.compress(b"long enough text to cut", mtime=0)[:-9], "cannot be read"),
    ],
)
def test_unreadable_text(tmp_path: Path, name: str, raw: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(CalibrationError, match=message):
        texts(SourceSpec("text", files=(tmp_path / name,)))


def test_unknown_source_suggests() -> None:
    with pytest.raises(CalibrationError, match="did you mean 'jsonl'"):
        texts(SourceSpec("json1"))


def test_content_hash_sees_borders_and_order() -> None:
    hashes = {content_hash(parts) for parts in (["ab", "c"], ["a", "bc"], ["abc"], ["c", "ab"], [])}
    assert len(hashes) == 5


def test_datasets_from_files_and_from_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    path = jsonl(tmp_path / "a.jsonl", {"q": "one", "a": "1"}, {"q": "two", "a": "2"})
    by_builder = read_documents(SourceSpec("datasets", name="json", files=(path,), field="{q}={a}"), WHERE)
    assert list(by_builder.texts) == ["one=1", "two=2"] == [by_builder.texts[0], by_builder.texts[1]]
    assert by_builder.texts[0:1] == ["one=1"] and len(by_builder.texts) == 2
    assert by_builder.origin["split"] == "train" and by_builder.origin["files"] == [str(path)]

    rows = datasets.Dataset.from_dict({"text": ["p", "q"]})
    rows.save_to_disk(str(tmp_path / "flat"))
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(str(tmp_path / "split"))
    assert texts(SourceSpec("datasets", name=str(tmp_path / "flat"))) == ["p", "q"]
    assert texts(SourceSpec("datasets", name=str(tmp_path / "split"), split="test")) == ["q"]
    with pytest.raises(CalibrationError, match="no split 'tset'; did you mean 'test'"):
        texts(SourceSpec("datasets", name=str(tmp_path / "split"), split="tset"))
    with pytest.raises(CalibrationError, match=r"no column 'body' \(allowed: a, q\)"):
        texts(SourceSpec("datasets", name="json", files=(path,), field="body"))
    with pytest.raises(CalibrationError, match="Unknown split"):
        texts(SourceSpec("datasets", name="json", files=(path,), split="validation"))
    with pytest.raises(CalibrationError, match="cannot be loaded"):
        texts(SourceSpec("datasets", name="json", files=(tmp_path / "no.jsonl",)))
    with pytest.raises(CalibrationError, match="without a name"):
        texts(SourceSpec("datasets"))
    (tmp_path / "empty.txt").touch()
    with pytest.raises(CalibrationError, match="cannot be loaded"):
        texts(SourceSpec("datasets", name="text", files=(tmp_path / "empty.txt",)))


def test_without_a_network_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    spec = SourceSpec("datasets", name="nobody/no-such-dataset-here")
    with pytest.raises(MachineError, match="not reachable.*local copy.*HF_HUB_OFFLINE=1"):
        texts(spec)
    with pytest.raises(MachineError, match="manifest gsm8k: dataset 'openai/gsm8k'.*Question: "):
        monkeypatch.setattr(datasets, "load_dataset", _unreachable)  # it may be in this machine's cache
        texts(SourceSpec("manifest", manifest="gsm8k"))


def _unreachable(*_: Any, **__: Any) -> None:
    raise ConnectionError("Couldn't reach it on the Hub (OfflineModeIsEnabled)")


def test_resolve_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n<|endoftext|>\ntwo\n", encoding="utf-8")
    assert resolve_text(str(path)) == "one\ntwo\n"
    path.write_text("<|endoftext|>\n", encoding="utf-8")
    for ref, message in [(path, "is empty"), (tmp_path / "no", "cannot be read"), ("python-stdlib:all", "heldout")]:
        with pytest.raises(CalibrationError, match=message):
            resolve_text(str(ref))


def test_tokenizer_directory_mistakes(tmp_path: Path, tokenizer_dir: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe"}', encoding="utf-8")
    with pytest.raises(CheckpointError, match="no vocabulary file.*source: tokens"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": ', encoding="utf-8")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
    assert len(load_tokenizer(tokenizer_dir)) > 256
