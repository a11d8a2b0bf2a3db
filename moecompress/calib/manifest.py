"""Manifests: small YAML files that say exactly what a public calibration source is.

Keys: `kind` (datasets | python-stdlib), `licence`, `description`; for datasets `id`, `config`, `split`,
`revision`, `files`, `template`, `join`; for python-stdlib `text` (code | prose | all); `reference` = the
samples, length and seed of published results, and `sha256` {tokenizer hash: hash of the ids} made with them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from moecompress.errors import CalibrationError, message, suggest

SHIPPED = "moecompress_calibration"
_COMMON: dict[str, type] = {"kind": str, "licence": str, "description": str, "reference": dict}
_KINDS: dict[str, dict[str, type]] = {
    "datasets": {
        "id": str,
        "config": str,
        "split": str,
        "revision": str,
        "files": list,
        "template": str,
        "join": str,
    },
    "python-stdlib": {"text": str},
}
_REQUIRED = {
    "datasets": ("licence", "id", "revision", "split", "template"),
    "python-stdlib": ("licence", "text"),
}
_REFERENCE: dict[str, type] = {"samples": int, "length": int, "seed": int, "sha256": dict}
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Reference:
    """Size and seed under which `sha256` (tokenizer hash -> token set digest) holds."""

    samples: int
    length: int
    seed: int
    sha256: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """One parsed manifest; the dataset's fields are empty for kind python-stdlib."""

    name: str
    kind: Literal["datasets", "python-stdlib"]
    licence: str
    reference: Reference | None = None
    id: str = ""
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    files: tuple[str, ...] = ()
    template: str = "text"
    join: str | None = None  # all rows make one document, with this text between them
    text: Literal["code", "prose", "all"] = "all"

    def origin(self) -> dict[str, Any]:
        """What goes into manifest.json and the report."""
        keys = ("id", "config", "split", "revision", "template") if self.kind == "datasets" else ("text",)
        return {"manifest": self.name, "licence": self.licence, **{key: getattr(self, key) for key in keys}}


def load_manifest(ref: str | Path) -> Manifest:
    """A shipped manifest by name, or a YAML file by path. Raises CalibrationError naming file and key."""
    shipped = {item.name.removesuffix(".yaml"): item for item in _shipped()}
    if str(ref) in shipped:
        return _parse(str(ref), shipped[str(ref)].read_text(encoding="utf-8"), f"manifest {ref}")
    path = Path(ref)
    if not path.is_file():
        found = f"'{ref}' is neither a file nor a shipped manifest{suggest(str(ref), shipped)}"
        raise CalibrationError(message("manifest", found))
    try:
        return _parse(path.stem, path.read_text(encoding="utf-8"), f"manifest {path}")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(message(f"manifest {path}", f"cannot be read ({error})")) from None


def check_digest(manifest: Manifest, tokenizer: str, samples: int, length: int, seed: int, digest: str) -> None:
    """Compare a token set with the manifest's hash where one applies; CalibrationError when they differ."""
    reference = manifest.reference
    if reference is None or (samples, length, seed) != (reference.samples, reference.length, reference.seed):
        return
    expected = reference.sha256.get(tokenizer, digest)
    if expected != digest:
        found = f"token ids have sha256 {digest}"
        then = "the source is not the one described: check revision and files, and remove a damaged local copy"
        raise CalibrationError(message(f"manifest {manifest.name}", found, expected, then))


def _shipped() -> list[Any]:
    return [item for item in package_files(SHIPPED).iterdir() if item.name.endswith(".yaml")]


def _parse(name: str, text: str, where: str) -> Manifest:
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise CalibrationError(message(where, f"not YAML: {error}")) from None
    if not isinstance(data, dict):
        raise CalibrationError(message(where, f"a {type(data).__name__}", "a mapping of keys"))
    kind = str(data.get("kind"))
    if kind not in _KINDS:
        raise CalibrationError(message(where, f"kind '{kind}'{suggest(kind, _KINDS)}"))
    _check(data, {**_COMMON, **_KINDS[kind]}, _REQUIRED[kind], where)
    if kind == "python-stdlib" and data["text"] not in ("code", "prose", "all"):
        raise CalibrationError(message(where, f"text '{data['text']}'", "code, prose or all"))
    fields = {key: value for key, value in data.items() if key not in ("kind", "reference", "description")}
    if "files" in fields:
        fields["files"] = tuple(map(str, fields["files"]))
    literal = cast(Literal["datasets", "python-stdlib"], kind)
    return Manifest(name=name, kind=literal, reference=_reference(data.get("reference"), where), **fields)


def _reference(data: dict[str, Any] | None, where: str) -> Reference | None:
    if data is None:
        return None
    where = f"{where}: reference"
    _check(data, _REFERENCE, ("samples", "length", "seed"), where)
    for key, value in data.get("sha256", {}).items():
        if not (_HASH.fullmatch(str(key)) and _HASH.fullmatch(str(value))):
            raise CalibrationError(message(f"{where}: sha256", f"{key}: {value}", "tokenizer sha256: ids sha256"))
    return Reference(**data)


def _check(data: Mapping[str, Any], types: Mapping[str, type], required: tuple[str, ...], where: str) -> None:
    for key, value in data.items():
        if key not in types:
            raise CalibrationError(message(where, f"unknown key '{key}'{suggest(str(key), types)}"))
        if not isinstance(value, types[key]) or isinstance(value, bool):
            found = f"{key}: {value!r} is a {type(value).__name__}"
            raise CalibrationError(message(where, found, types[key].__name__))
    missing = [key for key in required if key not in data]
    if missing:
        raise CalibrationError(message(where, f"missing key '{missing[0]}'", f"needed: {', '.join(required)}"))
