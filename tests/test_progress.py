from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator

import pytest

from moecompress.progress import LiveProgress, PlainProgress, duration, open_progress


def lines_of(clock: list[float], total: int, done: int, steps: int) -> list[str]:
    stream = io.StringIO()
    ticks: Iterator[float] = iter(clock)
    with PlainProgress(stream, lambda: next(ticks)) as progress:
        progress.stage("quantize", total, done)
        for number in range(steps):
            progress.step(f"layer {done + number}")
        progress.note("expert 3 saw no token")
    return stream.getvalue().splitlines()


def test_plain_progress_is_one_line_per_step_with_the_time_left() -> None:
    # Clock: made, stage, then steps of 2, 4 and 6 seconds: after two of three, 3 s each are expected.
    assert lines_of([0, 10, 12, 16, 22], 3, 0, 3) == [
        "quantize: 3 steps",
        "quantize 1/3 layer 0 (2.0 s, about 4.0 s left)",
        "quantize 2/3 layer 1 (4.0 s, about 3.0 s left)",
        "quantize 3/3 layer 2 (6.0 s)",
        "note: expert 3 saw no token",
    ]


def test_steps_done_before_a_stop_do_not_make_the_rest_look_faster() -> None:
    assert lines_of([0, 0, 60], 10, 8, 1) == [
        "quantize: 10 steps, 8 done before",
        "quantize 9/10 layer 8 (1 min 00 s, about 1 min 00 s left)",
        "note: expert 3 saw no token",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (192, "3 min 12 s"),
        (3599.7, "1 h 00 min"),
        (7500, "2 h 05 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_what_is_no_terminal_gets_plain_lines() -> None:
    assert isinstance(open_progress(io.StringIO()), PlainProgress)


def everything(descriptor: int) -> str:
    """What can be read without waiting."""
    os.set_blocking(descriptor, False)
    found = b""
    with contextlib.suppress(BlockingIOError):
        while piece := os.read(descriptor, 4096):
            found += piece
    return found.decode()


def test_a_terminal_gets_bars_with_the_time_left() -> None:
    main, side = os.openpty()
    with open(side, "w", encoding="utf-8") as terminal:
        progress = open_progress(terminal)
        assert isinstance(progress, LiveProgress)
        with progress:
            progress.stage("quantize", 4, done=1)
            progress.step("layer [mlp]")
            progress.note("expert [3] saw no token")
        terminal.flush()
        shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", everything(main))
    os.close(main)
    assert (
        "quantize" in shown and "2/4" in shown and "layer [mlp]" in shown and "note: expert [3] saw no token" in shown
    )
