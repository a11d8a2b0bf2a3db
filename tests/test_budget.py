"""The sizes of the house: a file is read in one sitting, a function fits on a screen."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("moecompress", "kernels", "recipes", "calibration", "scripts")
SOURCES = (".py", ".cpp", ".cu", ".cuh", ".h")
FILE_LINES = 300
KERNEL_LINES = 400
FUNCTION_LINES = 60


def sources() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*")) if path.suffix in SOURCES]


def test_files_are_short() -> None:
    long = []
    for path in sources():
        cap = KERNEL_LINES if path.is_relative_to(ROOT / "kernels") else FILE_LINES
        lines = len(path.read_text().splitlines())
        if lines > cap:
            long.append(f"{path.relative_to(ROOT)}: {lines} lines, cap {cap}")
    assert not long, "\n".join(long)


def test_functions_fit_on_a_screen() -> None:
    long = []
    for path in sources():
        if path.suffix != ".py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES:
                long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {lines} lines, cap {FUNCTION_LINES}")
    assert not long, "\n".join(long)
