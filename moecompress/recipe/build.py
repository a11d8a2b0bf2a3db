"""A recipe tree -> a frozen `Recipe`. Everything that is wrong with it is said at once, with line numbers."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, SerializeAsAny

from moecompress.calib.options import Options
from moecompress.errors import RecipeError, message, suggest
from moecompress.recipe.calibration import CALIBRATION_SOURCES
from moecompress.recipe.overrides import with_override
from moecompress.recipe.source import is_map_of_sets, read_tree
from moecompress.recipe.specs import (
    SECTIONS,
    CalibrationSpec,
    EvaluateSpec,
    OutputSpec,
    RecipeHead,
    Spec,
)
from moecompress.recipe.validate import validate
from moecompress.recipe.yamlmap import Node, dump, format_path
from moecompress.registry import pass_class, pass_names

_PLACE = re.compile(r"^(.*?):(\d+): ")


class PassSpec(Spec):
    """One step. params: the pass itself, a frozen pydantic model. where: `recipe.yaml:7`, for messages."""

    name: str
    params: SerializeAsAny[BaseModel]
    where: str

    @property
    def line(self) -> int:
        """Line in the file that named the pass; 0 when it came from `--set`."""
        tail = self.where.rpartition(":")[2]
        return int(tail) if tail.isdecimal() else 0


class Recipe(RecipeHead):
    """Everything a run needs to know, made by `load_recipe`. `calibration` is empty when there is none."""

    calibration: Mapping[str, CalibrationSpec]
    passes: tuple[PassSpec, ...]
    output: OutputSpec
    evaluate: EvaluateSpec

    @property
    def out(self) -> Path:
        """The output directory; relative ones are relative to the working directory."""
        assert self.output.dir is not None  # `load_recipe` fills it in
        return Path(self.output.dir)


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file or a catalogue name, follow `extends`, apply `key=value` overrides, check all.

    Raises RecipeError with one line per problem (`file:line: path: what; what is allowed`).
    """
    root = read_tree(str(path_or_name))
    for setting in overrides:
        root = with_override(root, setting)
    return _build(root)


def resolved_yaml(recipe: Recipe) -> str:
    """The recipe with defaults, `extends` and overrides written out; loading it gives the same recipe."""
    return dump(recipe_data(recipe))


def recipe_data(recipe: Recipe) -> dict[str, Any]:
    """The same as plain JSON-able data."""
    data = recipe.model_dump(mode="json")
    data["passes"] = [{step.name: step.params.model_dump(mode="json")} for step in recipe.passes]
    sets = {name: _written(spec) for name, spec in recipe.calibration.items()}
    data["calibration"] = sets or None
    return {key: data[key] for key in (*RecipeHead.model_fields, *SECTIONS)}


def _written(spec: CalibrationSpec) -> dict[str, Any]:
    """Only the keys of its source, as a recipe writes them."""
    data = spec.model_dump(mode="json")
    data |= data["options"] or {}
    return {key: data[key] for key in CALIBRATION_SOURCES[spec.source].model_fields}


def _build(root: Node) -> Recipe:
    if not isinstance(root.value, dict):
        raise RecipeError(message(root.where, "a recipe is a mapping with `model:` and `passes:`"))
    problems: list[str] = []
    sections = {name: root.value.get(name, Node(None, root.where)) for name in SECTIONS}
    plain = Node({key: child for key, child in root.value.items() if key not in SECTIONS}, root.where)
    head = validate(RecipeHead, plain, (), problems, also_allowed=(*SECTIONS, "extends"))
    sets = _calibration_nodes(sections["calibration"])
    specs = {name: _calibration_set(node, path, problems) for name, (node, path) in sets.items()}
    calibration = {name: spec for name, spec in specs.items() if spec is not None}
    passes = _passes(sections["passes"], tuple(sets), problems)
    empty = {name: Node({}, node.where) if node.value is None else node for name, node in sections.items()}
    output = validate(OutputSpec, empty["output"], ("output",), problems)
    evaluate = validate(EvaluateSpec, empty["evaluate"], ("evaluate",), problems)
    if problems or head is None or output is None or evaluate is None:
        raise RecipeError("\n".join(sorted(problems, key=_reading_order)))
    if output.dir is None:
        name = os.path.basename(os.path.abspath(head.model)) or "model"
        output = output.model_copy(update={"dir": f"out/{name}"})
    return Recipe(**dict(head), calibration=calibration, passes=passes, output=output, evaluate=evaluate)


def _reading_order(problem: str) -> tuple[str, int]:
    place = _PLACE.match(problem)
    return (place.group(1), int(place.group(2))) if place else (problem, 0)


def _calibration_nodes(node: Node) -> dict[str, tuple[Node, tuple[str, ...]]]:
    """Name -> (spec, path) whether the section is one spec (the set `default`) or a map of named ones."""
    if node.value is None:
        return {}
    if is_map_of_sets(node):
        assert isinstance(node.value, dict)
        return {name: (child, ("calibration", name)) for name, child in node.value.items()}
    return {"default": (node, ("calibration",))}


def _calibration_set(node: Node, path: tuple[str, ...], problems: list[str]) -> CalibrationSpec | None:
    source = node.child("source")
    if source is None:
        found = f"missing key 'source' (allowed: {', '.join(sorted(CALIBRATION_SOURCES))})"
        problems.append(f"{node.where}: {format_path(path)}: {found}")
        return None
    kind, where = str(source.plain()), f"{source.where}: {format_path(path)}.source"
    if kind not in CALIBRATION_SOURCES:
        problems.append(f"{where}: no source '{kind}'{suggest(kind, CALIBRATION_SOURCES)}")
        return None
    checked = validate(CALIBRATION_SOURCES[kind], node, path, problems)
    if checked is None:
        return None
    given = dict(checked)
    if isinstance(checked, Options):  # a source that runs the model reads its keys there
        common = {key: given[key] for key in CalibrationSpec.model_fields if key in given}
        return CalibrationSpec(**common, options=checked)
    return CalibrationSpec(**given)


def _passes(node: Node, sets: tuple[str, ...], problems: list[str]) -> tuple[PassSpec, ...]:
    if node.value is None or node.value == []:
        found = "missing or empty; give at least one pass, for example `- quantize.rtn: {bits: 4}`"
        problems.append(f"{node.where}: passes: {found} (passes: {', '.join(pass_names())})")
        return ()
    if not isinstance(node.value, list):
        problems.append(f"{node.where}: passes: should be a list of `- name: parameters`, in execution order")
        return ()
    specs = [_pass(item, index, sets, problems) for index, item in enumerate(node.value)]
    return tuple(spec for spec in specs if spec is not None)


def _pass(item: Node, index: int, sets: tuple[str, ...], problems: list[str]) -> PassSpec | None:
    at = f"{item.where}: passes[{index}]"
    if not isinstance(item.value, dict) or len(item.value) != 1:
        found = f"{len(item.value)} keys" if isinstance(item.value, dict) else repr(item.plain())
        then = "each item is one `name: parameters`, for example `- quantize.rtn: {bits: 4}`"
        problems.append(f"{at}: {found}; {then}")
        return None
    ((name, body),) = item.value.items()
    try:
        model = pass_class(name)
    except RecipeError as error:
        problems.append(f"{at}: {error}")
        return None
    body = Node({}, body.where) if body.value is None else body
    params = validate(model, body, ("passes", index, name), problems)
    named = body.child("calibration")
    plain = None if named is None else named.plain()
    for wanted in plain if isinstance(plain, list) else [plain]:
        if named is not None and wanted is not None and wanted not in sets:
            problems.append(
                f"{named.where}: passes[{index}].{name}.calibration: {wanted!r} is no calibration set"
                f"{suggest(str(wanted), sets)}"
            )
    return None if params is None else PassSpec(name=name, params=params, where=body.where)
