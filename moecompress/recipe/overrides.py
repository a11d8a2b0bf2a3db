"""`--set passes.0.quantize.rtn.bits=3`: one value of a recipe tree replaced, everything else kept."""

from __future__ import annotations

import re

from moecompress.errors import RecipeError, message, suggest
from moecompress.recipe.yamlmap import Node, Path, format_path, parse

_INDEX = re.compile(r"\[(\d+)\]")


def with_override(root: Node, setting: str) -> Node:
    """The tree with `key.path=value` applied; the value is YAML; a list takes indices (`passes.0`).

    Raises RecipeError when the setting is no `key=value`, an index is not in its list or a value has no keys.
    """
    key, equals, raw = setting.partition("=")
    key = _INDEX.sub(r".\1", key.strip())
    steps = key.split(".")
    if not equals or not all(steps):
        allowed = "KEY=VALUE, for example passes.0.quantize.rtn.bits=3"
        raise RecipeError(message(f"--set {setting}", "no key and value", allowed))
    where = f"--set {key}"
    value = parse(raw, where).moved(where) if raw.strip() else Node(None, where)
    return _replace(root, steps, value, ())


def _replace(node: Node, steps: list[str], value: Node, path: Path) -> Node:
    if not steps:
        return value
    if isinstance(node.value, list):
        return _replace_item(node, steps, value, path)
    if node.value is not None and not isinstance(node.value, dict):
        raise RecipeError(message(value.where, f"{format_path(path)} is {node.value!r}, it has no key '{steps[0]}'"))
    children = node.value or {}
    for count in range(len(steps), 0, -1):  # pass names contain dots: the longest existing key wins
        name = ".".join(steps[:count])
        if name in children:
            changed = _replace(children[name], steps[count:], value, (*path, name))
            return Node({**children, name: changed}, node.where)
    if len(path) == 2 and path[0] == "passes" and children:
        named = ".".join(steps[:2])
        raise RecipeError(f"{value.where}: {format_path(path)} has no pass '{named}'{suggest(named, children)}")
    fresh = _replace(Node(None, value.where), steps[1:], value, (*path, steps[0]))
    return Node({**children, steps[0]: fresh}, node.where)


def _replace_item(node: Node, steps: list[str], value: Node, path: Path) -> Node:
    assert isinstance(node.value, list)
    items = list(node.value)
    place = int(steps[0]) if steps[0].isdecimal() else -1
    if not 0 <= place < len(items):
        allowed = f"an index from 0 to {len(items) - 1}" if items else "nothing, the list is empty"
        raise RecipeError(message(value.where, f"{format_path(path)} has no item '{steps[0]}'", allowed))
    items[place] = _replace(items[place], steps[1:], value, (*path, place))
    return Node(items, node.where)
