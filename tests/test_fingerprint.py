from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moecompress import fingerprint as room
from moecompress.fingerprint import differences, file_facts, fingerprint, versions
from moecompress.recipe import Recipe, load_recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    (tmp_path / "text.txt").write_text("some words")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text("{}")
    save_file({"w": torch.arange(8)}, tmp_path / "source" / "model.safetensors")
    calibration = f"calibration={{source: text, files: ['{tmp_path / 'text.txt'}']}}"
    return load_recipe("rtn-w4", [f"model='{tmp_path / 'source'}'", calibration])


def test_it_is_json_and_repeatable(recipe: Recipe) -> None:
    first = fingerprint(recipe, Path(recipe.model))
    assert json.loads(json.dumps(first)) == first == fingerprint(recipe, Path(recipe.model))
    assert set(first["source"]) == {"config.json", "model.safetensors"}
    assert first["threads"] == torch.get_num_threads() and first["versions"]["torch"].startswith(torch.__version__[:3])


def changed(recipe: Recipe, *more: str) -> list[str]:
    before = fingerprint(recipe, Path(recipe.model))
    if more:
        other = load_recipe("rtn-w4", [f"model='{recipe.model}'", *more])
        return differences(before, fingerprint(other, Path(recipe.model)))
    return differences(before, before)


def test_every_part_of_a_run_counts(recipe: Recipe, tmp_path: Path) -> None:
    before = fingerprint(recipe, Path(recipe.model))

    def paths() -> set[str]:
        return {line.split(":")[0] for line in differences(before, fingerprint(recipe, Path(recipe.model)))}

    assert paths() == set()
    status = (tmp_path / "source" / "config.json").stat()
    os.utime(tmp_path / "source" / "config.json", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert paths() == {"source.config.json.mtime_ns"}
    (tmp_path / "source" / "config.json").write_text("{ }")
    os.utime(tmp_path / "source" / "config.json", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert paths() == {"source.config.json.size", "source.config.json.sha256"}
    (tmp_path / "text.txt").unlink()
    assert any(path.startswith("calibration.") for path in paths())


def test_a_changed_recipe_shows_the_key(recipe: Recipe) -> None:
    lines = changed(recipe, "passes.0.quantize.rtn.bits=3")
    assert "recipe.passes[0].quantize.rtn.bits: 4 before, 3 now" in lines


def test_threads_count(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(recipe, Path(recipe.model))
    monkeypatch.setattr(torch, "get_num_threads", lambda: before["threads"] + 1)
    assert differences(before, fingerprint(recipe, Path(recipe.model))) == [
        f"threads: {before['threads']} before, {before['threads'] + 1} now"
    ]


def test_a_safetensors_file_is_known_by_its_header_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.zeros(1000)}, path)
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    assert file_facts(path)["sha256"] == hashlib.sha256(raw[:end]).hexdigest()
    path.write_bytes(raw[:end] + bytes([1]) * (len(raw) - end))
    assert file_facts(path)["sha256"] == hashlib.sha256(raw[:end]).hexdigest()


def test_other_files_are_hashed_whole_up_to_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("x" * 100)
    assert file_facts(path)["sha256"] == hashlib.sha256(b"x" * 100).hexdigest()
    monkeypatch.setattr(room, "MAX_HASHED", 99)
    assert file_facts(path)["sha256"] == "" and file_facts(path)["size"] == 100


def test_a_hostile_header_length_is_no_problem(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"\xff" * 8 + b"short")
    assert file_facts(path)["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_versions_name_what_is_absent() -> None:
    found = versions(("torch", "surely-no-such-package"))
    assert list(found) == ["python", "torch", "surely-no-such-package"]
    assert found["surely-no-such-package"] == "absent"


@pytest.mark.parametrize(
    ("before", "now", "lines"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": 1}, {"b": 1}, ["a: 1 before, absent now", "b: absent before, 1 now"]),
        ({"a": [1, 2]}, {"a": [1, 3]}, ["a[1]: 2 before, 3 now"]),
        ({"a": [1]}, {"a": [1, 3]}, ["a: [1] before, [1, 3] now"]),
        ({"a": 1}, {"a": True}, ["a: 1 before, True now"]),
        ({"a": {"b": None}}, {"a": {"b": 0}}, ["a.b: None before, 0 now"]),
    ],
)
def test_differences(before: Any, now: Any, lines: list[str]) -> None:
    assert differences(before, now) == lines
