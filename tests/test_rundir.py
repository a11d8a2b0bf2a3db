from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moecompress.errors import OutputError
from moecompress.rundir import RunDir, open_run

FACTS: dict[str, Any] = {"recipe": {"seed": 0, "passes": [{"a.b": {"bits": 4}}]}, "threads": 1}


class Killed(BaseException):
    """Stands for the end of the process."""


def stop_after(out: Path, cursor: dict[str, Any], facts: dict[str, Any] = FACTS, **options: bool) -> None:
    """A run that saves one cursor and one staged file, then ends without publishing."""
    with pytest.raises(Killed), open_run(out, facts, **options) as run:
        run.save_cursor(cursor)
        (run.staging / "part").write_text(json.dumps(cursor))
        raise Killed


def refused(out: Path, facts: dict[str, Any] = FACTS, **options: bool) -> str:
    with pytest.raises(OutputError) as caught, open_run(out, facts, **options):
        pass
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_a_finished_run_leaves_the_output_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with open_run(out, FACTS) as run:
        assert run.path == tmp_path / "deep" / "out.run" and not out.exists()
        assert all(folder.is_dir() for folder in (run.staging, run.hidden, run.stats, run.decisions))
        assert run.load_cursor() == {}
        run.save_cursor({"layer": 1})
        (run.staging / "config.json").write_text("{}")
        (run.hidden / "x").write_text("big")
        run.publish()
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == [
        "deep",
        "deep/out",
        "deep/out/config.json",
    ]


def test_resume_continues_where_the_cursor_is(tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop_after(out, {"layer": 2})
    with open_run(out, FACTS, resume=True) as run:
        assert run.load_cursor() == {"layer": 2} and (run.staging / "part").exists()
        run.publish()
    assert (out / "part").read_text() == '{"layer": 2}'


def test_resume_without_state_starts_fresh(tmp_path: Path) -> None:
    with open_run(tmp_path / "out", FACTS, resume=True) as run:
        assert run.load_cursor() == {}


def test_restart_discards(tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop_after(out, {"layer": 2})
    other = {**FACTS, "threads": 2}
    with open_run(out, other, restart=True) as run:
        assert run.load_cursor() == {} and not (run.staging / "part").exists()
        run.save_cursor({"layer": 1})
    assert "threads" not in refused(out, other)
    assert "threads: 2 before, 1 now" in refused(out, FACTS, resume=True)


def test_state_without_a_choice_names_both_options(tmp_path: Path) -> None:
    stop_after(tmp_path / "out", {"layer": 2})
    text = refused(tmp_path / "out")
    assert "holds an unfinished run" in text and "--resume" in text and "--restart" in text


def test_both_options_at_once_are_refused(tmp_path: Path) -> None:
    assert "both given" in refused(tmp_path / "out", resume=True, restart=True)


def test_another_fingerprint_is_refused_with_every_difference(tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop_after(out, {"layer": 2})
    changed = {"recipe": {"seed": 1, "passes": [{"a.b": {"bits": 3}}]}, "threads": 1}
    text = refused(out, changed, resume=True)
    assert "recipe.seed: 0 before, 1 now" in text and "recipe.passes[0].a.b.bits: 4 before, 3 now" in text
    assert "threads" not in text and "--restart" in text
    assert "2 things have changed since" in refused(out, changed)
    with open_run(out, FACTS, resume=True) as run:
        assert run.load_cursor() == {"layer": 2}


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"restart": True}])
def test_a_finished_output_is_never_touched(tmp_path: Path, options: dict[str, bool]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    assert "exists already" in refused(out, **options)
    assert (out / "precious").read_text() == "x" and not (tmp_path / "out.run").exists()


def test_an_empty_directory_may_become_the_output(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with open_run(out, FACTS) as run:
        (run.staging / "a").write_text("")
        run.publish()
    assert (out / "a").exists()


def test_links_and_files_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    assert "exists already" in refused(tmp_path / "link") and "exists already" in refused(tmp_path / "file")


def test_an_output_that_appeared_meanwhile_stops_the_publication(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="exists already"), open_run(out, FACTS) as run:
        run.save_cursor({"layer": 1})
        out.mkdir()
        (out / "other").write_text("x")
        run.publish()
    assert (out / "other").exists() and RunDir(out, FACTS).load_cursor() == {"layer": 1}


def test_a_run_without_a_cursor_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(Killed), open_run(tmp_path / "out", FACTS) as run:
        (run.hidden / "x").write_text("")
        raise Killed
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_directory_of_that_name_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out.run").mkdir()
    (tmp_path / "out.run" / "thesis.txt").write_text("x")
    assert "was not made by moecompress" in refused(tmp_path / "out", restart=True)
    assert (tmp_path / "out.run" / "thesis.txt").exists()
    (tmp_path / "b.run").write_text("x")
    assert "was not made by moecompress" in refused(tmp_path / "b", restart=True)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 1}', '{"schema": 2, "cursor": {}, "fingerprint": {}}'])
def test_state_that_is_not_ours_is_an_error(tmp_path: Path, text: str) -> None:
    stop_after(tmp_path / "out", {"layer": 1})
    (tmp_path / "out.run" / "run.json").write_text(text)
    assert "run.json" in refused(tmp_path / "out", resume=True)


def test_state_without_its_staged_files_cannot_be_resumed(tmp_path: Path) -> None:
    stop_after(tmp_path / "out", {"layer": 1})
    (tmp_path / "out.run" / "out" / "part").unlink()
    (tmp_path / "out.run" / "out").rmdir()
    assert "its folder 'out' is gone" in refused(tmp_path / "out", resume=True)


def test_no_name_for_a_directory() -> None:
    assert "no name for a directory" in refused(Path("/"))


HOLDER = """
import sys
from pathlib import Path
from moecompress.rundir import open_run
with open_run(Path(sys.argv[1]), {}) as run:
    run.save_cursor({"layer": 1})
    print("ready", flush=True)
    sys.stdin.readline()
"""


def test_two_runs_on_one_output_are_refused_and_a_killed_one_frees_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", HOLDER, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "ready\n"
        for options in ({"resume": True}, {"restart": True}, {}):
            assert f"another run is working here (process {other.pid})" in refused(out, {}, **options)
        other.kill()
    with open_run(out, {}, resume=True) as run:
        assert run.load_cursor() == {"layer": 1}


def test_a_cursor_is_whole_or_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Killed), open_run(tmp_path / "out", FACTS) as run:
        run.save_cursor({"layer": 1})

        def fail(*_: object) -> None:
            raise Killed

        monkeypatch.setattr(os, "replace", fail)
        run.save_cursor({"layer": 2})
    assert run.load_cursor() == {"layer": 1}
