"""Names of evaluation tasks as recipes and the command line give them: built-in names or YAML files."""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from moecompress.errors import message

INSTALL = "pip install 'moecompress[eval]'"


def split_names(given: Iterable[str]) -> tuple[str, ...]:
    """Names from items that may hold several, separated by commas."""
    return tuple(name.strip() for item in given for name in item.split(",") if name.strip())


def is_file_name(name: str) -> bool:
    """Whether a task is given by a file rather than by a built-in name."""
    return name.endswith((".yaml", ".yml"))


def task_problems(names: Iterable[str], where: str) -> list[str]:
    """What can be said to be wrong without loading lm-eval: the package is not installed, a file is not there."""
    wanted = tuple(names)
    problems = []
    if wanted and find_spec("lm_eval") is None:
        problems.append(message(where, "needs lm-eval, which is not installed", then=INSTALL))
    for name in wanted:
        if is_file_name(name) and not Path(name).is_file():
            problems.append(message(where, f"no file '{name}'", "a task's YAML file or a built-in task name"))
    return problems


def memory_problems(names: Iterable[str], where: str, weights: int) -> list[str]:
    """Tasks run on the whole model: a problem when `weights` bytes are more than this machine's memory."""
    if not tuple(names) or not hasattr(os, "sysconf"):
        return []
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if weights <= memory:
        return []
    found = f"{weights / 2**30:.1f} GiB of weights do not fit into {memory / 2**30:.1f} GiB of memory"
    return [message(where, found, then="measure perplexity, which holds one layer at a time")]
