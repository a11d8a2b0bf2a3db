"""Text that every Python installation carries: standard library sources, docstrings and help topics.

It needs no network and no download, and is the same for the same Python version. Two parts share no module:
`calibration` and `heldout`.
"""

from __future__ import annotations

import ast
import hashlib
import platform
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moecompress.errors import MachineError, message

Part = Literal["calibration", "heldout"]
Kind = Literal["code", "prose", "all"]

HELDOUT_SHARE = 5  # one module in so many is held out
DOCUMENT_CHARS = 20_000  # of each file, so that a few giant modules do not dominate
MIN_CHARS = 200
# Tests, bundled wheels, code page tables and whole applications: little of it reads like code people write.
SKIPPED = frozenset(
    "test tests site-packages dist-packages distutils encodings ensurepip idlelib lib2to3 pydoc_data turtledemo".split()
)


@dataclass(frozen=True)
class StdlibDocument:
    """name: path below the library (`json/decoder.py`) or `topics/NAME`; domain: what the text is."""

    name: str
    domain: Literal["code", "prose"]
    text: str


def stdlib_documents(part: Part, kind: Kind) -> tuple[StdlibDocument, ...]:
    """Documents of one part, sorted by name; docstrings occur both in code and in prose.

    Raises MachineError where the library's sources are not installed as files.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = [document for document in _documents(root, part, kind) if len(document.text) >= MIN_CHARS]
    if not documents:
        then = "use `source: text` with files of your own"
        raise MachineError(message("python-stdlib", f"no Python sources below {root}", then=then))
    return tuple(sorted(documents, key=lambda document: (document.name, document.domain)))


def stdlib_text(part: Part, kind: Kind = "all", limit: int = 400_000) -> str:
    """The first `limit` characters of a part, its documents in the order of their names' hashes."""
    documents = sorted(stdlib_documents(part, kind), key=lambda document: _scatter(document.name + document.domain))
    return "\n\n".join(document.text.strip("\n") for document in documents)[:limit]


def stdlib_origin() -> dict[str, Any]:
    """What the text depends on."""
    return {"python": platform.python_version(), "implementation": platform.python_implementation()}


def part_of(name: str) -> Part:
    """Which part a document belongs to, decided by module family: `_pydecimal` goes with `decimal`."""
    family = name.removesuffix(".py").split("/")[0]
    if family.startswith("_"):
        family = family.lstrip("_").removeprefix("py")
    return "heldout" if _scatter(family) % HELDOUT_SHARE == 0 else "calibration"


def _scatter(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def _documents(root: Path, part: Part, kind: Kind) -> Iterator[StdlibDocument]:
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        top = relative.parts[0].removesuffix(".py")
        if SKIPPED.intersection(relative.parts) or top not in sys.stdlib_module_names:
            continue
        name = relative.as_posix()
        if part_of(name) != part:
            continue
        with tokenize.open(path) as file:  # minds the encoding line
            source = file.read()
        if kind != "prose":
            yield StdlibDocument(name, "code", _head(source))
        if kind != "code":
            yield StdlibDocument(name, "prose", _head(_docstrings(source)))
    if kind != "code" and part == "calibration":  # topics quote each other at length: all in one part
        yield from _topics()


def _topics() -> Iterator[StdlibDocument]:
    from pydoc_data.topics import topics  # 0.5 MB of text: only when it is wanted

    for topic, text in topics.items():
        yield StdlibDocument(f"topics/{topic}", "prose", _head(text))


def _docstrings(source: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        tree = ast.parse(source)
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, holders))
    return "\n\n".join(text for text in texts if text)


def _head(text: str) -> str:
    if len(text) <= DOCUMENT_CHARS:
        return text
    return text[: text.rfind("\n", 0, DOCUMENT_CHARS) + 1] or text[:DOCUMENT_CHARS]
