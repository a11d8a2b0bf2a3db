"""Files on disk: written whole, read back equal, refused with a reason when they are wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moecompress.errors import CheckpointError
from moecompress.report.build import read_evaluation, read_report, write_report, write_report_json
from moecompress.report.schema import Evaluation, Report

Make = Callable[[int, int], Report]


def test_roundtrip(tmp_path: Path, make_report: Make) -> None:
    report = make_report(2, 8)
    path = write_report_json(tmp_path, report)
    assert path == tmp_path / "moecompress" / "report.json"
    assert read_report(tmp_path) == report
    assert read_evaluation(tmp_path) is None


def test_pages_are_beside_the_json_and_nothing_else(tmp_path: Path, make_report: Make) -> None:
    write_report_json(tmp_path, make_report(1, 8))
    pages = write_report(tmp_path)
    assert [page.name for page in pages] == ["report.md", "report.html"]
    found = sorted(file.name for file in (tmp_path / "moecompress").iterdir())
    assert found == ["report.html", "report.json", "report.md"]


def test_equal_inputs_give_equal_bytes(tmp_path: Path, make_report: Make) -> None:
    texts = []
    for folder in (tmp_path / "a", tmp_path / "b", tmp_path / "b"):  # the last one overwrites
        write_report_json(folder, make_report(2, 16))
        texts.append([page.read_bytes() for page in write_report(folder)])
    assert texts[0] == texts[1] == texts[2]


def test_evaluation_is_shown_once_it_is_there(
    tmp_path: Path, make_report: Make, make_evaluation: Callable[[int], Evaluation]
) -> None:
    write_report_json(tmp_path, make_report(2, 4))
    before = [page.read_text() for page in write_report(tmp_path)]
    (tmp_path / "moecompress" / "eval.json").write_text(make_evaluation(2).model_dump_json())
    after = [page.read_text() for page in write_report(tmp_path)]
    for old, new in zip(before, after, strict=True):
        assert "there is no eval.json" in old and "8.432 ± 0.051" not in old
        assert "there is no eval.json" not in new and "8.432 ± 0.051" in new


def test_values_that_are_not_finite_become_null_and_a_warning(tmp_path: Path, make_report: Make) -> None:
    report = make_report(2, 2)
    broken = report.layers[1].model_copy(update={"output_error": float("nan")})
    report = report.model_copy(update={"layers": (report.layers[0], broken), "seconds": float("inf")})
    found = read_report(write_report_json(tmp_path, report).parent.parent)
    assert found.layers[1].output_error is None and found.seconds is None
    assert found.warnings[: len(report.warnings)] == report.warnings
    added = " ".join(found.warnings[len(report.warnings) :])
    assert "layers[1].output_error was nan" in added and "seconds was inf" in added


def test_no_report(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"report\.json: no such file"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not readable as JSON"),
        ('{"seconds": NaN}', "NaN is no JSON number"),
        ("[]", "top level"),
        ('{"schema": "moecompress.report/9"}', "schema"),
    ],
)
def test_wrong_report_names_file_and_place(tmp_path: Path, text: str, expected: str) -> None:
    folder = tmp_path / "moecompress"
    folder.mkdir()
    (folder / "report.json").write_text(text)
    with pytest.raises(CheckpointError) as error:
        write_report(tmp_path)
    assert str(folder / "report.json") in str(error.value) and expected in str(error.value)
    assert not (folder / "report.html").exists()


def test_wrong_evaluation_names_file_and_place(tmp_path: Path, make_data: Callable[[int, int], Any]) -> None:
    folder = tmp_path / "moecompress"
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(make_data(1, 2)))
    (folder / "eval.json").write_text('{"kl": {"a": "much"}}')
    with pytest.raises(CheckpointError, match=r"eval\.json: kl\.a"):
        write_report(tmp_path)
