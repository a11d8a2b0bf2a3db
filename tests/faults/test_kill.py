"""Runs that are killed, stopped or left without disk space: resumed, they give the same bytes as an undisturbed run.

Most runs here are forked from the test's process, which has everything imported already, and kill themselves at an
exact moment: before or after a file is put in place, or in the middle of writing hidden states or weights.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import engine
import pytest
import torch
from safetensors.torch import save_file

from moecompress.inspect import verify_dir

PASSES = [{"quantize.rtn": {"bits": 3, "group_size": 32, "targets": ["routed_experts", "attention"]}}]
COMPARED = ("model.safetensors.index.json", "config.json", "moecompress/recipe.yaml", "moecompress/manifest.json")


@pytest.fixture(scope="module")
def recipe(bench_a: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One place for all runs: the resolved recipe, which is compared, names it."""
    folder = tmp_path_factory.mktemp("kill")
    save_file({"ids": engine.random_ids(8, 32, vocabulary=4000)}, folder / "ids.safetensors")
    calibration = {"source": "tokens", "files": [str(folder / "ids.safetensors")], "samples": 8, "length": 32}
    output = {"format": "native", "shard_size": "300KiB"}
    return engine.write_recipe(folder, bench_a, PASSES, calibration=calibration, output=output)


@pytest.fixture(autouse=True)
def quick_and_clean(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    engine.reload_here(monkeypatch)
    yield
    for name in ("out", "out.run"):
        shutil.rmtree(recipe.parent / name, ignore_errors=True)


def contents(out: Path) -> dict[str, bytes]:
    """What must not depend on interruptions."""
    files = [*(path.name for path in sorted(out.glob("*.safetensors"))), *COMPARED]
    return {name: (out / name).read_bytes() for name in files}


@pytest.fixture(scope="module")
def wanted(recipe: Path) -> dict[str, bytes]:
    """The result of an undisturbed run; its directory is gone again."""
    with pytest.MonkeyPatch.context() as patch:
        engine.reload_here(patch)
        done = engine.command("run", recipe)
    assert done.code == 0, done.err
    found = contents(recipe.parent / "out")
    assert sum(name.endswith(".safetensors") for name in found) > 8
    shutil.rmtree(recipe.parent / "out")
    return found


def forked(prepare: Callable[[], object], *arguments: object) -> int:
    """Run the command line in a forked process after `prepare`; the process's status as `os.wait` gives it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            prepare()
            code = engine.command(*arguments).code
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def suicide(
    module: Any, name: str, number: int, part: Callable[..., tuple[Any, ...]] | None = None
) -> Callable[[], None]:
    """Makes the `number`th call of module.name the last one: killed before it, or after a call with other arguments."""

    def prepare() -> None:
        original, calls = getattr(module, name), [0]

        def counted(*arguments: Any, **options: Any) -> Any:
            calls[0] += 1
            if calls[0] == number:
                if part is not None:
                    original(*part(*arguments))
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        setattr(module, name, counted)

    return prepare


def half(descriptor: int, data: Any, *offset: int) -> tuple[Any, ...]:
    return (descriptor, bytes(data)[: len(data) // 2], *offset)


MOMENTS = {
    # every file that counts is put in place by a rename: shards, layers, cursor, decisions
    **{f"before rename {number}": (os, "replace", number, None) for number in (1, 6, 14, 31)},
    "while hidden states are written": (os, "pwrite", 7, half),
    "while hidden states of a late layer are written": (os, "pwrite", 19, half),
    "while weights are written": (os, "write", 25, half),
    "before the output is put in place": (os, "rename", 1, None),
    "after the output was put in place": (os, "rename", 1, lambda *paths: paths),
    "while the run directory is removed": (shutil, "rmtree", 1, None),
}


def test_killed_at_exact_moments_and_resumed(recipe: Path, wanted: dict[str, bytes]) -> None:
    out, state = recipe.parent / "out", recipe.parent / "out.run"
    for name, (module, function, number, part) in MOMENTS.items():
        status = forked(suicide(module, function, number, part), "run", recipe)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, name
        assert state.is_dir(), name
        assert out.exists() == ("after the output" in name or "removed" in name), name
        done = engine.command("run", recipe, "--resume")
        assert done.code == 0, (name, done.err)
        assert contents(out) == wanted, name
        assert verify_dir(out) == [] and not state.exists(), name
        assert not list(out.rglob(".*")), name
        shutil.rmtree(out)


def test_killed_again_and_again(recipe: Path, wanted: dict[str, bytes]) -> None:
    """Every attempt dies after a few more files; some layer gets done every time."""
    attempts = 0
    while os.WIFSIGNALED(forked(suicide(os, "replace", 14), "run", recipe, "--resume")):
        attempts += 1
        assert attempts < 20
    assert attempts >= 3
    assert contents(recipe.parent / "out") == wanted


def test_a_kill_before_anything_was_done(recipe: Path, wanted: dict[str, bytes]) -> None:
    forked(suicide(os, "posix_fallocate", 1), "run", recipe)
    assert "holds an unfinished run" in engine.command("run", recipe).err
    assert engine.command("run", recipe, "--restart").code == 0
    assert contents(recipe.parent / "out") == wanted


def test_another_recipe_does_not_continue_the_run(recipe: Path, wanted: dict[str, bytes]) -> None:
    forked(suicide(os, "replace", 9), "run", recipe)
    other = engine.command("run", recipe, "--resume", "--set", "passes.0.quantize.rtn.bits=2")
    assert other.code == 2 and "bits: 3 before, 2 now" in other.err
    assert engine.command("run", recipe, "--resume").code == 0
    assert contents(recipe.parent / "out") == wanted


# --- signals, by processes of their own


def started(recipe: Path, *options: str) -> subprocess.Popen[str]:
    command = engine.command_line("run", recipe, *options)
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_on_request_and_resumed(number: signal.Signals, recipe: Path, wanted: dict[str, bytes]) -> None:
    with started(recipe) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("calibration 1/"):  # so that the first layer is yet to come
                process.send_signal(number)
                break
        text = process.stderr.read()
    assert process.returncode == 75, text
    assert "stopped after" in text and "--resume" in text and "Traceback" not in text
    assert not (recipe.parent / "out").exists() and (recipe.parent / "out.run" / "run.json").is_file()
    done = engine.command("run", recipe, "--resume")
    assert done.code == 0, done.err
    assert contents(recipe.parent / "out") == wanted
    assert engine.read_json(recipe.parent / "out" / "moecompress" / "report.json")["resumed"] == 1


def test_stopped_while_it_finishes(recipe: Path, wanted: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    from moecompress import finish

    original = finish.write_manifest

    def signalled(*arguments: Any) -> None:
        original(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(finish, "write_manifest", signalled)
        done = engine.command("run", recipe)
    assert done.code == 75 and "--resume" in done.err
    assert not (recipe.parent / "out").exists()
    assert engine.command("run", recipe, "--resume").code == 0
    assert contents(recipe.parent / "out") == wanted


def test_killed_at_random_moments(recipe: Path, wanted: dict[str, bytes]) -> None:
    """The same by the clock, in a process that knows nothing of it; scripts/kill_test.py does many of these."""
    out = recipe.parent / "out"
    for delay in (0.1, 0.8):
        with started(recipe) as process:
            assert process.stderr is not None
            next(line for line in process.stderr if line.startswith("calibration"))
            time.sleep(delay)
            process.kill()
            process.stderr.read()
        done = engine.command("run", recipe, "--resume")
        assert done.code == 0, (delay, done.err)
        assert contents(out) == wanted, delay
        shutil.rmtree(out)


# --- a full disk


def full_after(module: Any, name: str, number: int, patch: pytest.MonkeyPatch) -> None:
    original, calls = getattr(module, name), [0]

    def limited(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] >= number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))
        return original(*arguments, **options)

    patch.setattr(module, name, limited)


@pytest.mark.parametrize(
    ("module", "name", "number"),
    [
        (os, "posix_fallocate", 1),  # hidden states of the first layer
        (os, "posix_fallocate", 9),
        (os, "pwrite", 12),
        (os, "write", 30),  # weights
        (os, "write", 90),
        (shutil, "copyfile", 2),  # tokenizer and the like
    ],
)
def test_a_disk_that_fills_up_stops_the_run(
    module: Any, name: str, number: int, recipe: Path, wanted: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        full_after(module, name, number, patch)
        done = engine.command("run", recipe)
    assert done.code == 75, done.err
    assert "Traceback" not in done.err and "--resume" in done.err
    assert not (recipe.parent / "out").exists()
    again = engine.command("run", recipe, "--resume")
    assert again.code == 0, again.err
    assert contents(recipe.parent / "out") == wanted


def test_threads_do_not_change_between_attempts() -> None:
    """Forked children and this process compute alike only with one thread; conftest sees to that."""
    assert torch.get_num_threads() == 1
