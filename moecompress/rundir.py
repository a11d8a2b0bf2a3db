"""`<out>.run/`: everything an unfinished run keeps, and the rules for continuing, discarding and publishing it.

run.json      fingerprint and cursor (what is done), replaced atomically
out/          the output directory as it is built; renamed to `<out>` when it is complete and checked
hidden/ stats/ decisions/
probe/        every finished layer on a few tokens, for the reload check
lock          held by the one process that works here
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moecompress.checkpoint.writer import atomic_write
from moecompress.errors import OutputError, message
from moecompress.fingerprint import differences

SCHEMA = 1
STATE = "run.json"
LOCK = "lock"
_EITHER = "--resume to continue it or --restart to discard it"


@dataclass(frozen=True)
class RunDir:
    """Paths of one run and its cursor. out: absolute; it does not exist (or is empty) before `publish`."""

    out: Path
    fingerprint: Mapping[str, Any]

    @property
    def path(self) -> Path:
        return self.out.with_name(self.out.name + ".run")

    @property
    def staging(self) -> Path:
        return self.path / "out"

    @property
    def hidden(self) -> Path:
        return self.path / "hidden"

    @property
    def stats(self) -> Path:
        return self.path / "stats"

    @property
    def probe(self) -> Path:
        return self.path / "probe"

    @property
    def decisions(self) -> Path:
        return self.path / "decisions"

    def load_cursor(self) -> dict[str, Any]:
        """What is done; {} at the start of a run."""
        state = _read_state(self.path / STATE)
        return dict(state["cursor"]) if state else {}

    def save_cursor(self, cursor: Mapping[str, Any]) -> None:
        """Replace the cursor atomically and durably; files it speaks of must be complete before."""
        state = {"schema": SCHEMA, "fingerprint": self.fingerprint, "cursor": cursor}
        atomic_write(self.path / STATE, json.dumps(state, indent=1, ensure_ascii=False) + "\n")

    def discard(self) -> None:
        """Forget what is done: the run directory goes when the run ends."""
        self.save_cursor({})

    def publish(self) -> None:
        """Rename the finished staging directory to `out` and remove the rest. Raises OutputError."""
        _check_free(self.out)
        try:
            os.rename(self.staging, self.out)
        except OSError as error:
            then = "free that path and run again with --resume"
            raise OutputError(message(str(self.out), f"cannot be created ({error.strerror})", then=then)) from None
        descriptor = os.open(self.out.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        for entry in self.path.iterdir():
            if entry.name not in (STATE, LOCK):
                _remove(entry)
        shutil.rmtree(self.path)


def already_published(out: Path) -> bool:
    """Whether a run was killed after it had put `out` in place; what it left behind is removed."""
    run = RunDir(Path(os.path.abspath(out)), {})
    if not (run.path / STATE).is_file() or run.staging.exists() or not run.out.is_dir():
        return False
    with _locked(run):
        shutil.rmtree(run.path)
    return True


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink()


@contextmanager
def open_run(
    out: Path, fingerprint: Mapping[str, Any], *, resume: bool = False, restart: bool = False
) -> Iterator[RunDir]:
    """The run directory of `out`, locked; continued, fresh, or refused.

    resume: continue state with an equal fingerprint, start fresh where there is none. restart: discard state.
    A run that ends without having saved any cursor leaves nothing behind.
    Raises OutputError: `out` exists, another run is at work, state without either option, another fingerprint.
    """
    run = RunDir(Path(os.path.abspath(out)), json.loads(json.dumps(fingerprint)))
    if not run.out.name:
        raise OutputError(message(str(out), "no name for a directory", "a directory that does not exist yet"))
    if resume and restart:
        raise OutputError(message("--resume --restart", "both given", "one of them"))
    _check_free(run.out)
    with _locked(run):
        state = _read_state(run.path / STATE)
        if state is not None and not restart:
            _check_continues(run, state, resume)
        else:
            _begin(run)
        try:
            yield run
        finally:
            if run.path.exists() and not run.load_cursor():
                shutil.rmtree(run.path)


def _check_free(out: Path) -> None:
    if not os.path.lexists(out):
        return
    empty = out.is_dir() and not out.is_symlink() and not os.path.ismount(out) and not any(out.iterdir())
    if not empty:
        then = "move it away or choose another output directory (--out)"
        raise OutputError(message(str(out), "exists already", "a directory that does not exist, or is empty", then))


def _check_continues(run: RunDir, state: Mapping[str, Any], resume: bool) -> None:
    changed = differences(state["fingerprint"], run.fingerprint)
    if changed and resume:
        lines = "".join(f"\n  {line}" for line in changed)
        then = "undo the change, or discard the state with --restart"
        raise OutputError(f"{run.path}: the stopped run was another one. Different:{lines}\nNext: {then}")
    if not resume:
        also = f" ({len(changed)} things have changed since, so only --restart can work)" if changed else ""
        raise OutputError(message(str(run.path), f"holds an unfinished run{also}", then=_EITHER))
    if not run.staging.is_dir():
        raise OutputError(message(str(run.path), "its folder 'out' is gone", then="--restart to begin again"))


def _begin(run: RunDir) -> None:
    for entry in run.path.iterdir():
        if entry.name != LOCK:
            _remove(entry)
    for folder in (run.staging, run.hidden, run.stats, run.decisions):
        folder.mkdir()
    run.save_cursor({})


def _read_state(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        state = json.loads(path.read_text("utf-8"))
        if state["schema"] == SCHEMA and isinstance(state["cursor"], dict):
            return {"fingerprint": state["fingerprint"], "cursor": state["cursor"]}
        found = f"schema {state['schema']}"
    except (ValueError, KeyError, TypeError) as error:
        found = f"not the state of a run ({error})"
    raise OutputError(message(str(path), found, f"schema {SCHEMA}", f"remove {path.parent}"))


@contextmanager
def _locked(run: RunDir) -> Iterator[None]:
    """Hold the lock of the run directory, which is created where it is missing."""
    if run.path.exists() and not (run.path / LOCK).is_file() and (not run.path.is_dir() or any(run.path.iterdir())):
        found = "exists and was not made by moecompress"
        raise OutputError(message(str(run.path), found, then="move it away or choose another --out"))
    descriptor = _take(run)
    try:
        yield
    finally:
        os.close(descriptor)


def _take(run: RunDir) -> int:
    """Descriptor of the locked file. A run that ends may remove it just then: try again with the new one."""
    while True:
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(run.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue
        except OSError as error:
            found = f"cannot be written ({error.strerror})"
            raise OutputError(message(str(run.path), found, then="choose another --out")) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(run.path / LOCK) and os.path.samestat(os.fstat(descriptor), os.stat(run.path / LOCK)):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
                return descriptor
            os.close(descriptor)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            found = f"another run is working here (process {holder})"
            raise OutputError(message(str(run.path), found, then="wait for it, or choose another --out")) from None
