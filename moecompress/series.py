"""`sweep FILE`: one recipe run with every combination of some values, and a comparison of what came out."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moecompress.errors import RecipeError, message, suggest
from moecompress.evalstore import FOLDER
from moecompress.plan import make_plan
from moecompress.progress import NoProgress, Progress
from moecompress.recipe import Recipe, catalogue, load_recipe, resolved_yaml
from moecompress.recipe.yamlmap import Node, parse
from moecompress.report.compare import write_comparison
from moecompress.run import run

KEYS = ("recipe", "out", "set", "vary")
REPORTS = ("comparison.html", "comparison.md", "comparison.json")
_MOST = 1000
_UNSAFE = re.compile(r"[^A-Za-z0-9._+=,-]+")


@dataclass(frozen=True)
class Member:
    """One run of a series. recipe.out is the series' directory / name."""

    name: str
    recipe: Recipe

    @property
    def finished(self) -> bool:
        """Whether its output is there, made by this very recipe."""
        written = self.recipe.out / FOLDER / "recipe.yaml"
        return written.is_file() and written.read_text("utf-8") == resolved_yaml(self.recipe)


def run_series(
    file: Path, out: Path | None = None, memory: int | None = None, progress: Progress | None = None
) -> tuple[Path, ...]:
    """Run what is not finished yet, in order, and compare all; returns the written comparisons.

    Every combination is planned before any work. Raises RecipeError with the problems of all of them, or when an output
    is there that another recipe made; Stopped (state kept) as `run`: called again, the series goes on.
    """
    shown = progress or NoProgress()
    folder, members = read_series(file, out)
    _check(members, memory)
    folder.mkdir(parents=True, exist_ok=True)
    for number, member in enumerate(members):
        state = "is there" if member.finished else "begins"
        shown.note(f"{member.name} ({number + 1} of {len(members)}) {state}")
        if not member.finished:
            run(member.recipe, resume=True, memory=memory, progress=progress)
    directories = [member.recipe.out for member in members]
    return tuple(write_comparison(directories, folder / name) for name in REPORTS)


def read_series(file: Path, out: Path | None = None) -> tuple[Path, list[Member]]:
    """The directory of a series and its runs, first key slowest. out: instead of the file's own.

    The file has `recipe` (a path beside it, or a catalogue name), `out`, optionally `set` (key: value, for all runs)
    and `vary` (key: list of values); keys are those of `run --set`. Raises RecipeError.
    """
    try:
        root = parse(file.read_text("utf-8-sig"), str(file))
    except OSError as error:
        raise RecipeError(message(str(file), f"cannot be read: {error.strerror}")) from None
    parts = _parts(root)
    name = parts["recipe"].plain()
    base = name if name in catalogue() else str(file.parent / name)
    folder = out or Path(parts["out"].plain())
    fixed = [f"{key}={_text(node)}" for key, node in _settings(parts.get("set"), "set")]
    varied = [(key, _values(key, node)) for key, node in _settings(parts["vary"], "vary")]
    labels = _labels([key for key, _ in varied])
    count = 1
    for _, values in varied:
        count *= len(values)
    if not 2 <= count <= _MOST:
        raise RecipeError(message(f"{parts['vary'].where}: vary", f"{count} runs", f"2 to {_MOST}"))
    members: dict[str, Member] = {}
    for chosen in itertools.product(*(values for _, values in varied)):
        pairs = list(zip(labels, (key for key, _ in varied), chosen, strict=True))
        run_name = ",".join(f"{label}={_UNSAFE.sub('-', str(node.plain()))}" for label, _, node in pairs)
        if run_name in members:
            raise RecipeError(message(f"{chosen[-1].where}: vary", f"two runs would be called '{run_name}'"))
        settings = [*fixed, *(f"{key}={_text(node)}" for _, key, node in pairs)]
        place = f"output.dir={json.dumps(str(folder / run_name))}"
        members[run_name] = Member(run_name, load_recipe(base, [*settings, place]))
    return folder, list(members.values())


def _parts(root: Node) -> dict[str, Node]:
    """The top-level keys, each of the kind it must be."""
    if not isinstance(root.value, dict):
        raise RecipeError(message(root.where, "a sweep is a mapping", ", ".join(KEYS)))
    problems = [
        f"{child.where}: no key '{key}'{suggest(key, KEYS)}" for key, child in root.value.items() if key not in KEYS
    ]
    for key in ("recipe", "out"):
        child = root.value.get(key)
        if child is None or not isinstance(child.value, str) or not child.value:
            problems.append(message((child or root).where, f"`{key}:` is missing or no text", "one path or name"))
    if "vary" not in root.value:
        problems.append(message(root.where, "`vary:` is missing", "KEY: [value, value, ...]"))
    if problems:
        raise RecipeError("\n".join(problems))
    return root.value


def _settings(node: Node | None, name: str) -> Iterator[tuple[str, Node]]:
    if node is None:
        return
    if not isinstance(node.value, dict) or not node.value:
        raise RecipeError(message(f"{node.where}: {name}", "no mapping", "keys as `run --set` takes them"))
    yield from node.value.items()


def _values(key: str, node: Node) -> Sequence[Node]:
    if not isinstance(node.value, list) or not node.value:
        raise RecipeError(message(f"{node.where}: vary.{key}", "no list", "the values to try, [2, 3, 4]"))
    return node.value


def _text(node: Node) -> str:
    """A value as `--set` reads it: JSON text is YAML text."""
    value: Any = node.plain()
    return json.dumps(value)


def _labels(keys: Sequence[str]) -> list[str]:
    """The shortest ends of dotted keys that tell them apart."""
    for length in range(1, 1 + max(key.count(".") + 1 for key in keys)):
        ends = [".".join(key.split(".")[-length:]) for key in keys]
        if len(set(ends)) == len(ends):
            return ends
    return list(keys)


def _check(members: Sequence[Member], memory: int | None) -> None:
    """Raises RecipeError with the problems of all runs that are still to be made."""
    problems: Mapping[str, Sequence[str]] = {
        member.name: (
            [message(str(member.recipe.out), "is there, made by another recipe", then="move it away, or set `out:`")]
            if member.recipe.out.exists()
            else make_plan(member.recipe, memory).problems
        )
        for member in members
        if not member.finished
    }
    lines = [f"{name}: {line}" for name, found in problems.items() for line in found]
    if lines:
        raise RecipeError("\n".join(lines))
