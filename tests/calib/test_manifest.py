"""Shipped manifests parse and are documented; own manifests are checked key by key; hashes are compared."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml

from moecompress.calib import SourceSpec, build_token_set
from moecompress.calib.manifest import load_manifest
from moecompress.calib.sources import read_documents
from moecompress.calib.spec import columns_of
from moecompress.calib.tokenizer import tokenizer_hash
from moecompress.errors import CalibrationError

NAMES = ("c4", "gsm8k", "humaneval", "python-stdlib", "wikitext2")


def write(path: Path, **keys: Any) -> Path:
    path.write_text(yaml.safe_dump(keys), encoding="utf-8")
    return path


def local(root: Path, rows: list[str], **keys: Any) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": rows}).save_to_disk(str(root / "rows"))
    base = {"kind": "datasets", "licence": "MIT", "id": str(root / "rows"), "revision": "0", "split": "train"}
    return write(root / "own.yaml", **base, template="{text}", **keys)


def test_all_shipped_manifests_are_complete_and_in_the_readme() -> None:
    folder = files("moecompress_calibration")
    shipped = sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))
    assert shipped == sorted(NAMES)
    listed = re.findall(r"^\| `([^`]+)` \|", (folder / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(listed) == shipped
    for name in shipped:
        manifest = load_manifest(name)
        assert manifest.name == name and manifest.licence and manifest.reference
        if manifest.kind == "datasets":
            assert re.fullmatch("[0-9a-f]{40}", manifest.revision or "")
            assert columns_of(manifest.template, name)


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"kind": "dataset"}, "kind 'dataset'; did you mean 'datasets'"),
        ({"kind": "python-stdlib", "licence": "x"}, "missing key 'text'"),
        ({"kind": "python-stdlib", "licence": "x", "text": "poems"}, "text 'poems'"),
        ({"kind": "python-stdlib", "licence": "x", "text": "all", "licens": 1}, "unknown key 'licens'; did you mean"),
        ({"kind": "datasets", "licence": "x", "id": 3}, "id: 3 is a int"),
        ({"kind": "datasets", "licence": "x", "id": "a", "split": "b"}, "missing key 'revision'"),
        (
            {"kind": "python-stdlib", "licence": "x", "text": "all", "reference": {"samples": 4}},
            "reference: missing key 'length'",
        ),
    ],
)
def test_wrong_keys_are_named(tmp_path: Path, keys: dict[str, Any], text: str) -> None:
    with pytest.raises(CalibrationError, match=text):
        load_manifest(write(tmp_path / "own.yaml", **keys))


def test_unreadable_manifests(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="neither a file nor a shipped manifest; did you mean 'wikitext2'"):
        load_manifest("wikitext")
    (tmp_path / "own.yaml").write_text("a: [", encoding="utf-8")
    with pytest.raises(CalibrationError, match="not YAML"):
        load_manifest(tmp_path / "own.yaml")
    (tmp_path / "own.yaml").write_text("- a", encoding="utf-8")
    with pytest.raises(CalibrationError, match="a list"):
        load_manifest(tmp_path / "own.yaml")
    with pytest.raises(CalibrationError, match="without a manifest"):
        read_documents(SourceSpec("manifest"), "x")


def test_rows_are_documents_or_one_joined_document(tmp_path: Path) -> None:
    spec = SourceSpec("manifest", manifest=local(tmp_path, ["a", "", "b"]))
    assert list(read_documents(spec, "x").texts) == ["a", "", "b"]
    local(tmp_path, ["a", "", "b"], join="\n\n")
    documents = read_documents(spec, "x")
    assert list(documents.texts) == ["a\n\n\n\nb"]
    assert documents.origin["licence"] == "MIT" and documents.origin["manifest"] == "own"


def test_hash_is_compared_at_the_reference_size_only(tmp_path: Path, tokenizer: Any) -> None:
    rows = [f"row {i} of many rows with a few words each" for i in range(50)]

    def build(path: Path, length: int) -> Any:
        spec = SourceSpec("manifest", manifest=path, samples=8, length=length)
        return build_token_set("x", spec, tokenizer, vocab_size=320, cache_dir=None)

    digest = build(local(tmp_path, rows), 16).digest
    key = tokenizer_hash(tokenizer)
    reference = {"samples": 8, "length": 16, "seed": 0}
    assert build(local(tmp_path, rows, reference={**reference, "sha256": {key: digest}}), 16).digest == digest
    wrong = local(tmp_path, rows, reference={**reference, "sha256": {key: "0" * 64}})
    with pytest.raises(CalibrationError, match=f"manifest own: token ids have sha256 {digest}.*{'0' * 64}"):
        build(wrong, 16)
    assert build(wrong, 17).ids.shape == (8, 17)
    other = local(tmp_path, rows, reference={**reference, "sha256": {"1" * 64: "0" * 64}})
    assert build(other, 16).digest == digest  # made with another tokenizer: nothing to compare with
    with pytest.raises(CalibrationError, match="sha256: abc: def"):
        build(local(tmp_path, rows, reference={**reference, "sha256": {"abc": "def"}}), 16)
