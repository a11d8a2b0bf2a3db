"""report.json -> report.md and report.html, and the one way report.json is written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from moecompress.checkpoint.writer import atomic_write
from moecompress.errors import CheckpointError, message
from moecompress.report.html import render_html
from moecompress.report.markdown import render_markdown
from moecompress.report.schema import Evaluation, Report

FOLDER = "moecompress"  # inside an output directory
ModelT = TypeVar("ModelT", bound=BaseModel)


def write_report(directory: Path) -> list[Path]:
    """Read report.json (and eval.json if any) in `<directory>/moecompress`, write report.md and report.html.

    Equal inputs give equal bytes. Raises CheckpointError when a file is missing or not what its schema says.
    """
    report, evaluation = read_report(directory), read_evaluation(directory)
    folder = Path(directory) / FOLDER
    pages = {"report.md": render_markdown(report, evaluation), "report.html": render_html(report, evaluation)}
    for name, text in pages.items():
        atomic_write(folder / name, text)
    return [folder / name for name in pages]


def write_report_json(directory: Path, report: Report) -> Path:
    """Write `<directory>/moecompress/report.json` atomically.

    A value that is not finite becomes null, and a warning names it.
    """
    broken: list[str] = []
    data = _finite(report.model_dump(mode="python", by_alias=True), "", broken)
    data["warnings"] = [*data["warnings"], *(f"{w}; it is left out of this report" for w in broken)]
    path = Path(directory) / FOLDER / "report.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def read_report(directory: Path) -> Report:
    """The report of an output directory. Raises CheckpointError."""
    path = Path(directory) / FOLDER / "report.json"
    if not path.is_file():
        raise CheckpointError(
            message(
                str(path),
                "no such file",
                "an output directory written by `moecompress run`",
                "check the path",
            )
        )
    return _read(path, Report)


def read_evaluation(directory: Path) -> Evaluation | None:
    """The evaluation of an output directory, None when it was never evaluated. Raises CheckpointError."""
    path = Path(directory) / FOLDER / "eval.json"
    return _read(path, Evaluation) if path.is_file() else None


def _read(path: Path, kind: type[ModelT]) -> ModelT:
    try:
        return kind.model_validate(json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(
            message(
                f"{path}: {where or 'top level'}",
                first["msg"],
                "what this version of moecompress writes",
                "use the version that made the directory, or run again",
            )
        ) from None
    except (ValueError, OSError) as error:
        raise CheckpointError(message(str(path), f"not readable as JSON ({error})", then="run again")) from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def _finite(value: Any, where: str, broken: list[str]) -> Any:
    """`value` with NaN and infinities as None; their places are added to `broken`."""
    if isinstance(value, dict):
        return {k: _finite(v, f"{where}.{k}" if where else str(k), broken) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v, f"{where}[{i}]", broken) for i, v in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        broken.append(f"{where} was {value}")
        return None
    return value
