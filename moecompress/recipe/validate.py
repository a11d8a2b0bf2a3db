"""A located YAML tree against a pydantic model: every problem is one line with place, path, a way out."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from moecompress.errors import suggest
from moecompress.recipe.yamlmap import Node, Path, format_path

M = TypeVar("M", bound=BaseModel)
_QUOTED = re.compile(r"'([^']*)'")


def validate(model: type[M], node: Node, path: Path, problems: list[str], also_allowed: Iterable[str] = ()) -> M | None:
    """An instance of `model`, or None with the reasons appended to `problems`.

    Strict JSON rules: no text-to-number or true-to-1 conversion; lists become tuples.
    also_allowed: keys that are legal at this place but handled elsewhere, named in did-you-mean lists.
    """
    if not isinstance(node.value, dict):
        fields = ", ".join(model.model_fields)
        problems.append(f"{node.where}: {format_path(path)}: {node.plain()!r}: should be a mapping (keys: {fields})")
        return None
    try:
        return model.model_validate_json(json.dumps(node.plain()), strict=True)
    except ValidationError as error:
        problems.extend(_explain(error, model, node, path, also_allowed))
        return None


def _explain(
    error: ValidationError, model: type[BaseModel], root: Node, base: Path, also_allowed: Iterable[str]
) -> list[str]:
    """One line per place: alternatives of a union are joined."""
    wrong: dict[tuple[str, str], list[str]] = {}
    for detail in error.errors(include_url=False):
        kind, loc = detail["type"], detail["loc"]
        if kind in ("extra_forbidden", "missing"):
            node, steps = _walk(root, loc[:-1])
            keyed = node.child(loc[-1]) or node
            text = f"missing key '{loc[-1]}'{_purpose(model, loc)}"
            if kind == "extra_forbidden":
                allowed = {*_fields(model, steps), *(also_allowed if not steps else ())}
                text = f"unknown key '{loc[-1]}'{suggest(str(loc[-1]), allowed)}"
            wrong.setdefault((keyed.where, format_path((*base, *steps))), []).append(text)
            continue
        node, steps = _walk(root, loc)
        place = (node.where, format_path((*base, *steps)))
        wrong.setdefault(place, []).append(_reason(detail, node, bool(steps)))
    return [f"{where}: {path or 'recipe'}: {'; '.join(dict.fromkeys(texts))}" for (where, path), texts in wrong.items()]


def _walk(root: Node, loc: tuple[int | str, ...]) -> tuple[Node, Path]:
    """The deepest node named by a pydantic location; steps that are no data (union members) are skipped."""
    node, steps = root, []
    for step in loc:
        inner = node.child(step)
        if inner is not None:
            node = inner
            steps.append(step)
    return node, tuple(steps)


def _fields(model: type[BaseModel], steps: Path) -> set[str]:
    """Keys allowed at `steps` below `model`, following nested models."""
    for step in steps:
        field = model.model_fields.get(str(step))
        inner = field.annotation if field else None
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            model = inner
    return set(model.model_fields)


def _purpose(model: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    """What the missing key is for, where its field says so."""
    field = model.model_fields.get(str(loc[0])) if len(loc) == 1 else None
    return f" ({field.description})" if field and field.description else ""


def _reason(detail: Any, node: Node, named: bool) -> str:
    text = str(detail["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    found = node.plain()
    shown = f"{textwrap.shorten(repr(found), 80)}: " if named and not isinstance(found, dict) else ""
    options = _QUOTED.findall(str(detail.get("ctx", {}).get("expected", "")))
    if detail["type"] == "literal_error" and options and isinstance(found, str):
        return f"'{found}' is not a choice here{suggest(found, options)}"
    text = text.removeprefix("Input should be ")
    if text != detail["msg"] and detail["type"] != "value_error":
        text = f"should be {text}".replace("valid array", "list")  # pydantic's word for it is JSON's
    if detail["type"] == "string_type" and isinstance(found, int | float):
        text += " (put it in quotes)"
    return shown + text
