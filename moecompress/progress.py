"""How far the work is: a live display on a terminal, one line per step elsewhere. Passed down, never global."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichBar
    from rich.progress import TaskID


class Progress(Protocol):
    """What work reports to. Stages follow one another; a stage has `total` steps, `done` of them before it began."""

    def stage(self, title: str, total: int, done: int = 0) -> None: ...

    def step(self, text: str) -> None:
        """One more step of the stage is done; text says which ("layer 3")."""

    def note(self, text: str) -> None:
        """Something a reader should know, kept on the screen (warnings, fallbacks)."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class NoProgress:
    """Says nothing: for use as a library and in tests."""

    def stage(self, title: str, total: int, done: int = 0) -> None:
        pass

    def step(self, text: str) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class PlainProgress(NoProgress):
    """One line per step: `quantize 3/16 layer 2 (4.1 s, about 53 s left)`. clock: seconds, monotonic."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._title, self._total, self._done = "", 0, 0
        self._first = 0
        self._begin = self._last = clock()

    def stage(self, title: str, total: int, done: int = 0) -> None:
        self._title, self._total, self._done, self._first = title, total, done, done
        self._begin = self._last = self._clock()
        again = f", {done} done before" if done else ""
        self._line(f"{title}: {total} {'step' if total == 1 else 'steps'}{again}")

    def step(self, text: str) -> None:
        now = self._clock()
        self._done += 1
        left = (now - self._begin) / (self._done - self._first) * max(0, self._total - self._done)
        rest = f", about {duration(left)} left" if self._done < self._total else ""
        self._line(f"{self._title} {self._done}/{self._total} {text} ({duration(now - self._last)}{rest})")
        self._last = now

    def note(self, text: str) -> None:
        self._line(f"note: {text}")

    def _line(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class LiveProgress(NoProgress):
    """A bar per stage with elapsed and remaining time; needs a terminal."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}", markup=False),
        )
        self._bar: RichBar = Bar(*columns, console=Console(file=stream), speed_estimate_period=600)
        self._task: TaskID | None = None

    def stage(self, title: str, total: int, done: int = 0) -> None:
        self._task = self._bar.add_task(title, total=total, completed=done, text="")

    def step(self, text: str) -> None:
        assert self._task is not None, "step() before stage()"
        self._bar.update(self._task, advance=1, text=text)

    def note(self, text: str) -> None:
        self._bar.console.print(f"note: {text}", markup=False, highlight=False)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


def open_progress(stream: TextIO) -> Progress:
    """The live display when `stream` is a terminal, plain lines otherwise. Use as a context manager."""
    return LiveProgress(stream) if stream.isatty() else PlainProgress(stream)


def duration(seconds: float) -> str:
    """4.2 s, 3 min 12 s, 2 h 05 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"
