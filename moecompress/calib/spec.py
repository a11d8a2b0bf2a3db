"""What a calibration source looks like to this room, and the documents it yields."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from string import Formatter
from typing import Any, Protocol

from torch import Tensor

from moecompress.errors import CalibrationError, message, suggest


class CalibrationSource(Protocol):
    """The attributes read here; the recipe's calibration model and `SourceSpec` both have them."""

    @property
    def source(self) -> str: ...
    @property
    def files(self) -> Sequence[str | Path] | None: ...
    @property
    def field(self) -> str: ...
    @property
    def name(self) -> str | None: ...
    @property
    def config(self) -> str | None: ...
    @property
    def split(self) -> str | None: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def manifest(self) -> str | Path | None: ...
    @property
    def samples(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def heldout(self) -> float: ...
    @property
    def options(self) -> Any: ...
    @property
    def balance(self) -> Any: ...


@dataclass(frozen=True)
class SourceSpec:
    """A calibration source without a recipe around it (scripts, tests, Python callers).

    samples N and length T: the size of the token set. seed: order of documents and choice of windows.
    heldout: fraction of the N sequences that no pass may train on. field: a column name, or a template with
    column names in braces. options: the keys of a source that runs the model (`calib.options`), or a mixture's parts.
    balance: how rows are chosen for their routing (`calib.options.Balance`), or None.
    """

    source: str
    files: tuple[str | Path, ...] = ()
    field: str = "text"
    name: str | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    manifest: str | Path | None = None
    samples: int = 128
    length: int = 512
    seed: int = 0
    heldout: float = 0.125
    options: Any = None
    balance: Any = None


def with_samples(spec: CalibrationSource, samples: int) -> SourceSpec:
    """The same source with another number of rows, all of them as they come."""
    same = {item.name: getattr(spec, item.name) for item in fields(SourceSpec)}
    return SourceSpec(**{**same, "samples": samples, "balance": None})


@dataclass(frozen=True)
class Rows:
    """Token rows of a source: ids int64 [N, T], where they come from (JSON-able), which tokens passes may see
    (bool [N, T]; None = all), and which rows are held out (None = the usual share)."""

    ids: Tensor
    origin: Mapping[str, Any]
    selected: Tensor | None = None
    heldout: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Documents:
    """Texts of one source in a fixed order (perhaps read lazily), and where they come from (JSON-able)."""

    texts: Sequence[str]
    origin: Mapping[str, Any]


def content_hash(texts: Iterable[str]) -> str:
    """sha256 over the UTF-8 of every document, each behind its byte length, so that borders count."""
    digest = hashlib.sha256()
    for text in texts:
        raw = text.encode("utf-8", errors="surrogatepass")
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return digest.hexdigest()


def columns_of(template: str, where: str) -> tuple[str, ...]:
    """Column names in a field: `text` -> ("text",); `{question}\\n{answer}` -> ("question", "answer").

    Raises CalibrationError for a template that is not plain names in braces.
    """
    if "{" not in template and "}" not in template:
        return (template,)
    try:
        parts = [(name, spec, conversion) for _, name, spec, conversion in Formatter().parse(template)]
    except ValueError as error:
        raise CalibrationError(message(where, f"template {template!r}: {error}", "column names in braces")) from None
    names = [name for name, _, _ in parts if name is not None]
    plain = all(not spec and conversion is None for _, spec, conversion in parts)
    if not names or not plain or not all(name.isidentifier() for name in names):
        found = f"template {template!r}"
        raise CalibrationError(message(where, found, "column names in braces, such as {question} or {answer}"))
    return tuple(names)


def render(record: Mapping[str, Any], template: str, columns: Sequence[str], where: str) -> str:
    """The text of one record. Raises CalibrationError when a column is absent or does not hold text."""
    for column in columns:
        if column not in record:
            found = f"no field '{column}'{suggest(column, map(str, record))}"
            raise CalibrationError(message(where, found, then="set `field:` to one of these names"))
        if not isinstance(record[column], str):
            found = f"field '{column}' holds {type(record[column]).__name__}"
            raise CalibrationError(message(where, found, "text"))
    if "{" not in template:
        return str(record[template])
    return template.format_map({column: record[column] for column in columns})
