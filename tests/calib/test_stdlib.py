"""The standard library as text: two parts that do not overlap, the same every time, no downloads."""

from __future__ import annotations

import ast
from typing import Any

import pytest

from moecompress.calib import SourceSpec, build_token_set, resolve_text
from moecompress.calib.stdlib import DOCUMENT_CHARS, StdlibDocument, part_of, stdlib_documents, stdlib_text
from moecompress.errors import MachineError


@pytest.fixture(scope="module")
def parts() -> dict[str, tuple[StdlibDocument, ...]]:
    return {"calibration": stdlib_documents("calibration", "all"), "heldout": stdlib_documents("heldout", "all")}


def test_parts_are_large_and_share_no_module(parts: dict[str, tuple[StdlibDocument, ...]]) -> None:
    tops = {part: {d.name.split("/")[0] for d in documents} for part, documents in parts.items()}
    assert not tops["calibration"] & tops["heldout"]
    names = {part: {d.name for d in documents} for part, documents in parts.items()}
    assert not names["calibration"] & names["heldout"]
    for part, least in (("calibration", 2_000_000), ("heldout", 400_000)):
        for domain in ("code", "prose"):
            assert sum(len(d.text) for d in parts[part] if d.domain == domain) > least / 10
        assert sum(len(d.text) for d in parts[part]) > least


def test_long_lines_of_the_heldout_part_are_new(parts: dict[str, tuple[StdlibDocument, ...]]) -> None:
    def lines(part: str) -> set[str]:
        return {line.strip() for d in parts[part] for line in d.text.splitlines() if len(line.strip()) >= 60}

    heldout = lines("heldout")
    assert len(heldout) > 3000
    assert len(heldout & lines("calibration")) < 0.03 * len(heldout)  # boilerplate


@pytest.mark.parametrize("pair", [("_pydecimal.py", "decimal.py"), ("_pyio.py", "io.py"), ("json/a.py", "json/b.py")])
def test_twins_stay_together(pair: tuple[str, str]) -> None:
    assert part_of(pair[0]) == part_of(pair[1])


def test_kinds(parts: dict[str, tuple[StdlibDocument, ...]]) -> None:
    code = stdlib_documents("heldout", "code")
    assert code == tuple(d for d in parts["heldout"] if d.domain == "code")
    prose = stdlib_documents("heldout", "prose")
    assert prose == tuple(d for d in parts["heldout"] if d.domain == "prose")
    assert any(d.name.startswith("topics/") for d in parts["calibration"])
    assert all(200 <= len(d.text) <= DOCUMENT_CHARS for d in parts["heldout"])
    whole = [d for d in code if len(d.text) < DOCUMENT_CHARS * 0.9]
    assert len(whole) > 20
    for document in whole:
        ast.parse(document.text)  # files are sources, not fragments
    docstring = next(d for d in prose if d.name == whole[0].name)
    assert docstring.text.splitlines()[0].strip()


def test_text_is_cut_and_repeatable(parts: dict[str, tuple[StdlibDocument, ...]]) -> None:
    text = stdlib_text("heldout", "code", 30_000)
    assert len(text) == 30_000 and text == stdlib_text("heldout", "code", 40_000)[:30_000]
    assert (
        sum(document.text[:500].strip("\n") in text for document in parts["heldout"] if document.domain == "code") >= 2
    )


def test_heldout_reference_and_shipped_manifest(tokenizer: Any, parts: dict[str, tuple[StdlibDocument, ...]]) -> None:
    text = resolve_text("python-stdlib:heldout")
    assert len(text) == 400_000
    spec = SourceSpec("manifest", manifest="python-stdlib", samples=16, length=64)
    made = build_token_set("x", spec, tokenizer, vocab_size=320, cache_dir=None)
    assert made.ids.shape == (16, 64) and made.origin["python"] and made.origin["licence"] == "PSF-2.0"
    sample = tokenizer.decode(made.ids[0].tolist()[20:50]).split("<|endoftext|>")[0]
    assert any(sample in d.text for d in parts["calibration"])


def test_a_python_without_sources_is_named(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(MachineError, match="no Python sources.*source: text"):
        stdlib_documents("calibration", "code")
