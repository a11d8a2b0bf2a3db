"""Nothing in the repository depends on, or tells about, the machine it was written on; nothing is left half done."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Written in pieces, so that this file does not match itself.
MACHINE = re.compile(
    r"(?<![\w.<>{}*-])/(?:" + "|".join(("work", "farm", "root", "home", "Users")) + r")/"
    r"|/tmp/[\w-]"
    r"|\.\./" + "shared"
    r"|\b" + r"(?:pypi|pythonhosted|download\.pytorch)" + r"\.org\b"
)
UNFINISHED = re.compile(r"\b(?:" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK")) + r")\b")
STUB = re.compile("raise Not" + "Implemented")


def repository_files() -> list[Path]:
    """What git tracks or would track; without git, everything that is not hidden or built."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
        return [path for name in names if (path := ROOT / name).is_file()]
    built = {"build", "dist", "out", "__pycache__"}
    return [
        path
        for path in ROOT.rglob("*")
        if path.is_file() and not any(p in built or p.startswith(".") for p in path.relative_to(ROOT).parts)
    ]


def matches(pattern: re.Pattern[str], *, within: str = "") -> list[str]:
    found = []
    for path in repository_files():
        if not path.is_relative_to(ROOT / within):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # binary: weights, pictures
        for number, line in enumerate(text.splitlines(), 1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    return found


def test_no_machine_paths_and_no_package_hosts() -> None:
    assert not (found := matches(MACHINE)), "\n".join(found)


def test_nothing_is_marked_unfinished() -> None:
    assert not (found := matches(UNFINISHED)), "\n".join(found)


def test_no_stubs_in_the_package() -> None:
    assert not (found := matches(STUB, within="moecompress")), "\n".join(found)


@pytest.mark.parametrize(
    "line", ["cd /" + "work/x", "open('/" + "root/a')", "see ../" + "shared", "/tmp/" + "venv/bin"]
)
def test_the_pattern_finds_what_it_should(line: str) -> None:
    assert MACHINE.search(line)


@pytest.mark.parametrize("line", ["out/work/file", "https://example.com/home/page", "~/.cache", "the /tmp folder"])
def test_the_pattern_leaves_other_text_alone(line: str) -> None:
    assert not MACHINE.search(line)
