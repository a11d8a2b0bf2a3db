"""The direction of imports, what each room may use from outside, and that importing the package is cheap."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "moecompress"
LAYERS = (
    ("errors", "gate", "memory", "progress", "sizes", "types"),
    ("checkpoint", "numerics", "stats"),
    ("arch", "arguments", "ops"),
    ("packed", "dense", "packed_router", "dispatch", "experts", "stream", "calib", "load"),
    ("passes",),
    (
        "recipe",
        "registry",
        "actions",
        "reshaped",
        "fingerprint",
        "rundir",
        "layerstore",
        "measure",
        "portable",
        "tasknames",
        "writing",
        "settle",
    ),
    ("estimate", "allocated", "gated", "planned", "plan", "job", "context", "sweep", "barrier", "parts"),
    ("evaluate", "served", "evalstore", "tasks", "taskresults", "humaneval", "sandbox", "report"),
    # a run ends with a reload check, an evaluation and a report, so it stands above them
    ("reload", "results", "finish", "run", "series", "budgets", "export", "inspect", "doctor"),
    ("cli", "__main__"),
)
SHARED = (  # modules of passes/ that are no passes
    "base",
    "shrinking",
    "pruning",
    "merging",
    "quantizer",
    "allocator",
    "budget",
    "gating",
    "smoothing",
    "sampled",
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
# Outside library -> rooms that may import it, even inside a function.
RESERVED = {
    "transformers": ("experts", "stream", "calib", "load", "evaluate", "tasks"),
    "datasets": ("calib", "evaluate"),
    "lm_eval": ("tasks",),
    "matplotlib": ("report",),
    "typer": ("cli",),
    "moecompress_kernels": ("arguments", "ops"),
}
NUMERICS_USES = {"__future__", "torch", "numpy", "scipy", "pulp", "moecompress"}
FORBIDDEN = {"pickle", "torch.load", "os.environ", "os.getenv", "os.putenv"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import in the file; `from a import b` gives `a.b`."""
    inside = ("moecompress", *path.relative_to(PACKAGE).with_suffix("").parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(inside[: -node.level]) + "." if node.level else ""
            start = base + node.module if node.module else base.rstrip(".")
            yield from ((node.lineno, f"{start}.{name.name}") for name in node.names)


def own_imports(path: Path) -> Iterator[tuple[int, str, str]]:
    """(line, room, module inside the room or "") for imports of the package itself."""
    for line, name in imported(path):
        parts = name.split(".")
        if parts[0] == "moecompress" and len(parts) > 1 and parts[1] in LEVEL:
            yield line, parts[1], parts[2] if len(parts) > 2 else ""


def test_every_module_has_a_layer() -> None:
    rooms = {room_of(path) for path in modules()} - {"__init__"}
    assert rooms <= LEVEL.keys(), f"no layer for {sorted(rooms - LEVEL.keys())}: add it to LAYERS with a reason"


def test_imports_go_down() -> None:
    upward = [
        f"{path.relative_to(ROOT)}:{line} imports {room} (layer {LEVEL[room]}) from layer {LEVEL[room_of(path)]}"
        for path in modules()
        if room_of(path) in LEVEL
        for line, room, _ in own_imports(path)
        if LEVEL[room] > LEVEL[room_of(path)]
    ]
    assert not upward, "\n".join(upward)


def test_rooms_of_one_layer_do_not_import_each_other_in_a_circle() -> None:
    edges: dict[str, set[str]] = {room: set() for room in LEVEL}
    for path in modules():
        here = room_of(path)
        if here in LEVEL:
            edges[here] |= {room for _, room, _ in own_imports(path) if room != here}

    def reached(room: str, seen: frozenset[str]) -> frozenset[str]:
        for following in edges[room] - seen:
            seen = reached(following, seen | {following})
        return seen

    circles = [room for room in edges if room in reached(room, frozenset())]
    assert not circles, f"these import each other: {circles}"


def test_passes_never_import_each_other() -> None:
    crossing = [
        f"{path.relative_to(ROOT)}:{line} imports passes.{module}"
        for path in modules()
        if room_of(path) == "passes"
        for line, room, module in own_imports(path)
        if room == "passes" and (PACKAGE / "passes" / f"{module}.py").exists() and module not in SHARED
    ]
    assert not crossing, "\n".join(crossing)


@pytest.mark.parametrize("library", sorted(RESERVED))
def test_library_is_imported_only_where_it_belongs(library: str) -> None:
    elsewhere = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in modules()
        for line, name in imported(path)
        if name.split(".")[0] == library and room_of(path) not in RESERVED[library]
    ]
    assert not elsewhere, f"only {RESERVED[library]} may import {library}: {elsewhere}"


def test_numerics_is_mathematics_only() -> None:
    foreign = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in modules()
        if room_of(path) == "numerics"
        for line, name in imported(path)
        if (top := name.split(".")[0]) not in NUMERICS_USES and top not in sys.stdlib_module_names
    ]
    assert not foreign, "\n".join(foreign)


def test_kernels_import_nothing_of_the_package() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert "moecompress" not in {name.split(".")[0] for name in names}, f"{path.name}: {ast.unparse(node)}"


def test_no_pickle_and_no_environment_outside_the_command_line() -> None:
    found = []
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Attribute):
                continue
            name = ast.unparse(node)
            if name in FORBIDDEN and not (name.startswith("os.") and room_of(path) == "cli"):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno} {name}")
        found += [f"{path.relative_to(ROOT)}:{line} {name}" for line, name in imported(path) if name in FORBIDDEN]
    assert not found, "\n".join(found)


LEAN = """
import socket, time
def refuse(self, address):
    raise AssertionError(f"importing the package connects to {address}")
socket.socket.connect = refuse
import moecompress
import torch
assert not torch.cuda.is_initialized(), "importing the package starts CUDA"
print(time.process_time())
"""


def test_importing_the_package_is_cheap(tmp_path: Path) -> None:
    # Processor seconds, so that a busy machine does not fail it; the better of two runs, so that cold files do not.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    command = [sys.executable, "-c", LEAN]
    runs = [
        subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        for _ in range(2)
    ]
    assert all(run.returncode == 0 for run in runs), runs[0].stderr
    assert min(float(run.stdout) for run in runs) < 3.0
