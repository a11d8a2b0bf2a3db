"""Texts of a dataset through the `datasets` library: a hub id, a directory, or a builder with files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from moecompress.calib.spec import columns_of, render
from moecompress.errors import CalibrationError, MachineError, message, suggest


class _Rows(Sequence[str]):
    """The rows of a loaded dataset as texts, read when asked for: a shard of C4 does not fit as a list."""

    def __init__(self, rows: Any, template: str, where: str) -> None:
        self._columns = columns_of(template, where)
        missing = [column for column in self._columns if column not in rows.column_names]
        if missing:
            found = f"no column '{missing[0]}'{suggest(missing[0], rows.column_names)}"
            raise CalibrationError(message(where, found, then="set `field:` to one of these names"))
        self._rows = rows.select_columns(list(dict.fromkeys(self._columns)))
        self._template = template
        self._where = where

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._render(index, self._rows[index])

    def __iter__(self) -> Iterator[str]:
        return (self._render(number, record) for number, record in enumerate(self._rows))

    def _render(self, number: int, record: Mapping[str, Any]) -> str:
        return render(record, self._template, self._columns, f"{self._where}, row {number}")


def read_dataset(
    name: str,
    *,
    config: str | None,
    split: str,
    revision: str | None,
    files: Sequence[str],
    template: str,
    where: str,
) -> Sequence[str]:
    """The texts of `name` (hub id, local directory, `save_to_disk` folder, or builder name with `files`).

    Raises MachineError without the library or the network, CalibrationError for a wrong name, split, column.
    """
    try:
        import datasets
    except ImportError as error:
        found = f"the datasets library cannot be imported ({error})"
        raise MachineError(message(where, found, then="pip install datasets, or use `source: jsonl`")) from None
    try:
        rows = _load(datasets, name, config, split, revision, files)
    except ConnectionError as error:
        then = (
            f"use a local copy (`source: jsonl` with `files:` and `field: {template!r}`, or `name:` = its "
            "directory); with the dataset already in the Hugging Face cache set HF_HUB_OFFLINE=1"
        )
        found = f"dataset '{name}' is not reachable ({error})"
        raise MachineError(message(where, found, then=then)) from None
    except (FileNotFoundError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        asked = f"config {config}, split {split}, revision {revision}"
        found = f"dataset '{name}' ({asked}) cannot be loaded: {error.__cause__ or error}"
        raise CalibrationError(message(where, found)) from None
    return _Rows(rows, template, where)


def _load(datasets: Any, name: str, config: str | None, split: str, revision: str | None, files: Sequence[str]) -> Any:
    saved = Path(name)
    if (saved / "dataset_dict.json").is_file():
        parts = datasets.load_from_disk(name)
        if split not in parts:
            raise ValueError(f"no split '{split}'{suggest(split, parts)}")
        return parts[split]
    if (saved / "state.json").is_file():
        return datasets.load_from_disk(name)
    return datasets.load_dataset(name, config, split=split, revision=revision, data_files=list(files) or None)
