"""Where a recipe's text comes from: a file or the shipped catalogue, with its `extends` bases merged in."""

from __future__ import annotations

import importlib.resources
import os
from pathlib import Path

from moecompress.errors import RecipeError, suggest
from moecompress.recipe.yamlmap import Node, parse

CATALOGUE = "moecompress_recipes"


def catalogue() -> dict[str, str]:
    """Shipped recipes: name -> the comment on the first line of its file."""
    files = importlib.resources.files(CATALOGUE).iterdir()
    shipped = {f.name.removesuffix(".yaml"): f.read_text("utf-8") for f in files if f.name.endswith(".yaml")}
    return {name: text.splitlines()[0].lstrip("# ") for name, text in sorted(shipped.items())}


def read_tree(name: str, folder: Path | None = None, chain: tuple[str, ...] = (), asked: str = "") -> Node:
    """The tree of a recipe with its bases merged in.

    folder: what a relative path starts from (None: the working directory). chain: the files that led here.
    asked: the `extends` line that asked for it, for messages. Raises RecipeError.
    """
    text, source, inside = _open(name, folder, asked)
    if source in chain:
        raise RecipeError(f"{asked}`extends` goes in a circle: {' -> '.join((*chain, source))}")
    node = parse(text, source)
    if not isinstance(node.value, dict) or "extends" not in node.value:
        return node
    base = node.value["extends"]
    if not isinstance(base.value, str) or not base.value:
        raise RecipeError(f"{base.where}: extends: {base.plain()!r}: should be one file or catalogue name")
    below = read_tree(base.value, inside, (*chain, source), f"{base.where}: extends: ")
    if not isinstance(below.value, dict):
        return below
    own = {key: child for key, child in node.value.items() if key != "extends"}
    return Node(_merged(below.value, own), node.where)


def _open(name: str, folder: Path | None, asked: str) -> tuple[str, str, Path | None]:
    """(text, what to call it, folder of its relatives). A catalogue name means the catalogue, not a file."""
    known = catalogue()
    if name in known:
        file = importlib.resources.files(CATALOGUE) / f"{name}.yaml"
        return file.read_text("utf-8"), f"recipes/{name}.yaml", None
    path = Path(name) if folder is None else folder / name
    try:
        return path.read_text("utf-8-sig"), os.path.normpath(path), path.parent
    except FileNotFoundError:
        text = f"'{name}' is neither a file nor a catalogue recipe{suggest(name, known)}"
    except IsADirectoryError:
        text = f"'{name}' is a directory; a recipe is a YAML file or a catalogue name{suggest(name, known)}"
    except UnicodeDecodeError as error:
        text = f"'{name}' is not UTF-8 text (byte {error.start})"
    except (OSError, ValueError) as error:
        text = f"'{name}' cannot be read: {error}"
    raise RecipeError(asked + text)


def _merged(below: dict[str, Node], own: dict[str, Node]) -> dict[str, Node]:
    """Own keys replace; `output`, `evaluate` merge by key, and `calibration` unless it names a new source."""
    result = {**below, **own}
    for section in ("output", "evaluate", "calibration"):
        old, new = below.get(section), own.get(section)
        if old is None or new is None or not isinstance(old.value, dict) or not isinstance(new.value, dict):
            continue
        same_form = is_map_of_sets(old) == is_map_of_sets(new)
        if section != "calibration" or (same_form and "source" not in new.value):
            result[section] = Node({**old.value, **new.value}, new.where)
    return result


def is_map_of_sets(node: Node) -> bool:
    values = node.value.values() if isinstance(node.value, dict) else ()
    return bool(values) and all(isinstance(child.value, dict) for child in values)
