"""Documents from files, datasets, manifests and the standard library; evaluation texts by reference."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moecompress.calib.hub import read_dataset
from moecompress.calib.manifest import Manifest, load_manifest
from moecompress.calib.spec import CalibrationSource, Documents, columns_of, render
from moecompress.calib.stdlib import stdlib_documents, stdlib_origin, stdlib_text
from moecompress.errors import CalibrationError, message, suggest

SEPARATOR = "<|endoftext|>"  # alone on a line of a text file, whatever the model's own end of text is
STDLIB_HELDOUT = "python-stdlib:heldout"


def read_documents(spec: CalibrationSource, where: str) -> Documents:
    """All documents of a text source; `where` names the set. Raises CalibrationError, MachineError."""
    readers: Mapping[str, Callable[[CalibrationSource, str], Documents]] = {
        "text": _text,
        "jsonl": _jsonl,
        "datasets": _dataset,
        "manifest": _manifest,
    }
    if spec.source not in readers:
        raise CalibrationError(message(where, f"source '{spec.source}'{suggest(spec.source, (*readers, 'tokens'))}"))
    return readers[spec.source](spec, where)


def resolve_text(ref: str) -> str:
    """An evaluation text: a path, or `python-stdlib:heldout` (no overlap with the calibration manifest).

    Separator lines are left out. Raises CalibrationError for a missing, unreadable or empty text.
    """
    if ref == STDLIB_HELDOUT:
        return stdlib_text("heldout")
    if ref.startswith("python-stdlib"):
        raise CalibrationError(message("evaluation text", f"'{ref}'", f"a path or {STDLIB_HELDOUT}"))
    lines = _decode(Path(ref), "evaluation text").splitlines(keepends=True)
    text = "".join(line for line in lines if line.strip() != SEPARATOR)
    if not text.strip():
        raise CalibrationError(message("evaluation text", f"{ref} is empty", then="name a file with text"))
    return text


def required_files(spec: CalibrationSource, where: str) -> tuple[Path, ...]:
    """The spec's files, at least one and all present. Raises CalibrationError."""
    paths = tuple(Path(file) for file in spec.files or ())
    if not paths:
        raise CalibrationError(message(where, f"source '{spec.source}' without files", then="add `files: [PATH, ...]`"))
    for path in paths:
        if not path.is_file():
            found = f"{path} {'is not a file' if path.exists() else 'does not exist'}"
            allowed = "files, relative to the working directory" if not path.is_absolute() else "files"
            raise CalibrationError(message(where, found, allowed))
    return paths


def _text(spec: CalibrationSource, where: str) -> Documents:
    paths = required_files(spec, where)
    texts = [text for path in paths for text in _split(_decode(path, where)) if text.strip()]
    if not texts:
        raise CalibrationError(message(where, f"no text in {', '.join(map(str, paths))}"))
    return Documents(texts, {"source": "text", "files": [str(path) for path in paths]})


def _jsonl(spec: CalibrationSource, where: str) -> Documents:
    paths = required_files(spec, where)
    columns = columns_of(spec.field, where)
    texts = [render(record, spec.field, columns, at) for path in paths for at, record in _records(path, where)]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise CalibrationError(message(where, f"no text in {', '.join(map(str, paths))}"))
    return Documents(texts, {"source": "jsonl", "files": [str(path) for path in paths], "field": spec.field})


def _dataset(spec: CalibrationSource, where: str) -> Documents:
    if not spec.name:
        found = "source 'datasets' without a name"
        raise CalibrationError(message(where, found, then="add `name:` (hub id, directory, or json / text / parquet)"))
    origin = {
        "source": "datasets",
        "name": spec.name,
        "config": spec.config,
        "split": spec.split or "train",
        "revision": spec.revision,
        "files": [str(file) for file in spec.files or ()],
        "field": spec.field,
    }
    texts = read_dataset(
        spec.name,
        config=spec.config,
        split=spec.split or "train",
        revision=spec.revision,
        files=tuple(str(file) for file in spec.files or ()),
        template=spec.field,
        where=where,
    )
    return Documents(texts, origin)


def _manifest(spec: CalibrationSource, where: str) -> Documents:
    if not spec.manifest:
        found = "source 'manifest' without a manifest"
        raise CalibrationError(message(where, found, then="add `manifest:` (a shipped name or a path)"))
    manifest = load_manifest(spec.manifest)
    extra = stdlib_origin() if manifest.kind == "python-stdlib" else {}
    return Documents(_manifest_texts(manifest, where), {"source": "manifest", **manifest.origin(), **extra})


def _manifest_texts(manifest: Manifest, where: str) -> Sequence[str]:
    if manifest.kind == "python-stdlib":
        return [document.text for document in stdlib_documents("calibration", manifest.text)]
    texts = read_dataset(
        manifest.id,
        config=manifest.config,
        split=manifest.split,
        revision=manifest.revision,
        files=manifest.files,
        template=manifest.template,
        where=f"{where}: manifest {manifest.name}",
    )
    return texts if manifest.join is None else [manifest.join.join(texts)]


def _split(text: str) -> Iterator[str]:
    lines: list[str] = []
    for line in text.splitlines(keepends=True):
        if line.strip() == SEPARATOR:
            yield "".join(lines)
            lines = []
        else:
            lines.append(line)
    yield "".join(lines)


def _records(path: Path, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_decode(path, where).split("\n"), start=1):
        if not line.strip():
            continue
        at = f"{where}: {path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise CalibrationError(message(at, f"not JSON ({error.msg})", "one JSON object per line")) from None
        if not isinstance(record, dict):
            raise CalibrationError(message(at, f"a JSON {type(record).__name__}", "one JSON object per line"))
        yield at, record


def _decode(path: Path, where: str) -> str:
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"{path} is not UTF-8 (byte {error.start})"
        raise CalibrationError(message(where, found, then="convert the file to UTF-8")) from None
    except (OSError, EOFError) as error:  # gzip.BadGzipFile is an OSError
        raise CalibrationError(message(where, f"{path} cannot be read ({error})")) from None
