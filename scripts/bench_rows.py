"""What the resumable tables of the benchmarks share: rows measured once, kept as they finish, and common arguments."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Rows:
    """Rows by name in OUT/rows.json, so that a table that was interrupted goes on where it stopped.

    out: made if it is not there. table: writes OUT/table.md anew after each row. lines: one row a line, which names
    itself in `row`, in OUT/rows.jsonl.
    """

    def __init__(self, out: Path, table: Callable[[dict[str, Row]], str], lines: bool = False) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.table, self.lines = table, lines
        self.file, self.text = out / ("rows.jsonl" if lines else "rows.json"), out / "table.md"
        self.found: dict[str, Row] = {}
        if self.file.is_file():
            text = self.file.read_text("utf-8")
            found = [json.loads(line) for line in text.splitlines()] if lines else []
            self.found = {row["row"]: row for row in found} if lines else json.loads(text)

    def missing(self, names: Iterable[str]) -> Iterator[str]:
        """Those that are not measured yet, each asked for when its turn comes."""
        return (name for name in names if name not in self.found)

    def add(self, name: str, row: Row) -> None:
        self.found[name] = row
        if self.lines:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        else:
            self.file.write_text(json.dumps(self.found, indent=1) + "\n", "utf-8")
        self.text.write_text(self.table(self.found), "utf-8")


def arguments_of(doc: str | None, rows: Sequence[str] = (), **defaults: int) -> argparse.ArgumentParser:
    """A parser of OUT, ROWs and what every benchmark asks for. rows: those measured unless some are named."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("rows", nargs="*", metavar="ROW", default=list(rows))
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", action="append", required=True, help="held-out text, once per file")
    for name, value in {"samples": 128, "length": 512, "windows": 40, **defaults}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    return parser


def reload_here(arguments: Sequence[str], **_: Any) -> subprocess.CompletedProcess[str]:
    """The reload check of a run in this process: a fresh one spends longer on imports than a row takes.

    To stand in for `moecompress.finish.subprocess.run`.
    """
    from moecompress import reload

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        reload.main(arguments[4:])
    return subprocess.CompletedProcess(list(arguments), 0, out.getvalue(), "")
