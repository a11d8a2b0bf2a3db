"""Every error a user can cause, and the one way its text is built.

A message says where the problem is, what was found, what is allowed and what to do next. The command line prints
it without a traceback and exits with the error's `exit_code`; anything that is not a `MoecompressError` is our bug.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MoecompressError(Exception):
    """Base of all errors a user can act on. `exit_code` is what the command line returns."""

    exit_code = 2


class RecipeError(MoecompressError):
    """The recipe is wrong: unknown key, pass or option, impossible combination, unreadable YAML."""


class CheckpointError(MoecompressError):
    """The source (or output) directory is wrong: missing, truncated, hostile or contradicting files; NaN weights."""


class NotFinite(CheckpointError):
    """A source tensor holds NaN or Inf: whatever was made with it, or would be, is worthless."""


class UnsupportedModel(MoecompressError):
    """The checkpoint is sound but this architecture (or its present form) cannot be handled."""


class CoverageError(MoecompressError):
    """An expert saw too few calibration tokens and the declared policy is `error`; or a tensor was left over."""


class CalibrationError(MoecompressError):
    """The calibration source is empty, too short, unreadable or does not match its manifest."""


class OutputError(MoecompressError):
    """The output cannot be written: it exists, the disk is too small, the format cannot hold the result."""


class MachineError(MoecompressError):
    """This machine lacks something the recipe asks for: memory, an optional package, a network, a device."""


class Stopped(MoecompressError):
    """Work was stopped on request or by a full disk; the run directory keeps its state and `--resume` continues."""

    exit_code = 75


def suggest(found: str, allowed: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest allowed word, or `""`; then the sorted list of what is allowed."""
    words = sorted(allowed)
    near = difflib.get_close_matches(found, words, n=1, cutoff=0.6)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return f"{hint} (allowed: {', '.join(words)})"


def message(where: str, found: str, allowed: str = "", then: str = "") -> str:
    """One error text: `where: found. Allowed: ... Next: ...` with the empty parts left out."""
    text = f"{where}: {found}"
    if allowed:
        text += f". Allowed: {allowed}"
    if then:
        text += f". Next: {then}"
    return text
