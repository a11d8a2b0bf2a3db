"""YAML that remembers where every value was written, reduced to the part of YAML a recipe needs.

Only mappings with text keys, lists, text, numbers, true/false and null. No tags, anchors or aliases (so nothing
is constructed and nothing can explode), no duplicate keys, and none of YAML 1.1's surprises: `no` is text and
`1e-3` a number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from moecompress.errors import RecipeError, message

Path = tuple[str | int, ...]
MAX_BYTES = 1 << 20
MAX_DEPTH = 32
_TAG = "tag:yaml.org,2002:"
_RESOLVERS = (
    ("null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789")),
    (
        "float",
        re.compile(r"^[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)$"),
        list("-+.0123456789"),
    ),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML 1.1 or our loader would not read back as text."""


for _name, _pattern, _first in _RESOLVERS:
    _Loader.add_implicit_resolver(_TAG + _name, _pattern, _first)
    _Dumper.add_implicit_resolver(_TAG + _name, _pattern, _first)


@dataclass(frozen=True)
class Node:
    """A value and where it was written (`recipe.yaml:7`, `--set seed`)."""

    value: str | int | float | bool | None | dict[str, Node] | list[Node]
    where: str

    def plain(self) -> Any:
        """The value without places, ready for JSON."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def child(self, step: str | int) -> Node | None:
        """The value under a key or index; None when there is none."""
        if isinstance(self.value, dict):
            return self.value.get(str(step)) if isinstance(step, str) else None
        if isinstance(self.value, list) and isinstance(step, int) and 0 <= step < len(self.value):
            return self.value[step]
        return None

    def moved(self, where: str) -> Node:
        """The same value, said to be written at `where`, in all its parts."""
        if isinstance(self.value, dict):
            return Node({key: child.moved(where) for key, child in self.value.items()}, where)
        if isinstance(self.value, list):
            return Node([child.moved(where) for child in self.value], where)
        return Node(self.value, where)


def format_path(path: Sequence[str | int]) -> str:
    """`("passes", 2, "quantize.rtn", "bits")` to `passes[2].quantize.rtn.bits`."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def parse(text: str, source: str) -> Node:
    """Read one document; `source` is what messages call it. Raises RecipeError with every problem."""
    if len(text) > MAX_BYTES:
        raise RecipeError(message(source, f"{len(text)} characters", f"at most {MAX_BYTES} in a recipe"))
    try:
        problems = _forbidden(text, source)
        if problems:
            raise RecipeError("\n".join(problems))
        root = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(_syntax(error, source)) from None
    if root is None:
        raise RecipeError(message(source, "the file is empty", then="write at least `model:` and `passes:`"))
    node = _build(root, _line(root, source), source, (), problems)
    if problems:
        raise RecipeError("\n".join(problems))
    return node


def dump(data: Any) -> str:
    """Deterministic block YAML that `parse` reads back as the same values, keys in the given order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=110)


def _forbidden(text: str, source: str) -> list[str]:
    """Tags, anchors, aliases, depth, more documents: seen in the event stream before anything is built."""
    problems: list[str] = []
    depth = documents = 0
    for event in yaml.parse(text, Loader=_Loader):
        where = _line(event, source)
        if isinstance(event, yaml.AliasEvent):
            problems.append(f"{where}: alias '*{event.anchor}'; use `extends: other.yaml` to share parts")
        elif isinstance(event, yaml.NodeEvent) and event.anchor:
            problems.append(f"{where}: anchor '&{event.anchor}'; use `extends: other.yaml` to share parts")
        tag = getattr(event, "tag", None)
        if tag:
            problems.append(f"{where}: tag '{tag}'; a recipe has only plain values")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                return [*problems, f"{where}: nested deeper than {MAX_DEPTH} levels"]
        depth -= isinstance(event, yaml.CollectionEndEvent)
        documents += isinstance(event, yaml.DocumentStartEvent)
        if documents > 1:
            return [*problems, f"{where}: a second document ('---'); a recipe is one document"]
    return problems


def _syntax(error: yaml.YAMLError, source: str) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is None:
        return message(source, f"not readable as YAML ({' '.join(str(error).split())})")
    problem = getattr(error, "problem", None) or getattr(error, "context", None)
    return f"{source}:{mark.line + 1}: not valid YAML at column {mark.column + 1}: {problem}"


def _build(node: yaml.Node, where: str, source: str, path: Path, problems: list[str]) -> Node:
    """`where` is the line of the key that holds this node, which is where a reader looks for it."""
    if isinstance(node, yaml.ScalarNode):
        return Node(_scalar(node, where, path, problems), where)
    if isinstance(node, yaml.SequenceNode):
        rows = enumerate(node.value)
        return Node([_build(n, _line(n, source), source, (*path, i), problems) for i, n in rows], where)
    children: dict[str, Node] = {}
    for key, value in node.value:
        line = _line(key, source)
        if not isinstance(key, yaml.ScalarNode) or key.tag != _TAG + "str":
            shown = key.value if isinstance(key, yaml.ScalarNode) else "a list or mapping"
            problems.append(f"{line}: {format_path(path) or 'recipe'}: key {shown} is not text")
        elif key.value in children:
            first = children[key.value].where
            problems.append(f"{line}: {format_path((*path, key.value))}: written twice (first at {first})")
        else:
            children[key.value] = _build(value, line, source, (*path, key.value), problems)
    return Node(children, where)


def _line(part: yaml.Node | yaml.Event, source: str) -> str:
    mark = part.start_mark
    return f"{source}:{mark.line + 1}" if mark else source


def _scalar(node: yaml.ScalarNode, where: str, path: Path, problems: list[str]) -> str | int | float | bool | None:
    kind, text = node.tag.removeprefix(_TAG), str(node.value)
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "str":
        return text
    value = float(text) if kind == "float" or len(text) > 19 else int(text)
    if not math.isfinite(value) or (kind == "int" and len(text) > 19):
        problems.append(f"{where}: {format_path(path)}: number out of range: {text[:24]}")
    return value
