"""Run a Python program that a model wrote in a process of its own, with little of everything.

Limits: processor seconds, wall-clock seconds, memory, file size, open files, no further processes; an empty working
directory and environment, no site packages, no input or output. Where the system allows it also no network and a
process table of its own, and as root the program runs as `nobody`. This contains accidents of generated code. It is
no wall against an attacker: files that the user may read can be read.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from moecompress.errors import MachineError, message

# Runs in the new process. Reads "token\nprogram"; the token, written to the report at the end, proves that the program
# ran to its end rather than leaving early with exit code 0.
_START = """
import os, resource, sys
seconds, memory, user = (int(text) for text in sys.argv[1:])
token, _, program = sys.stdin.read().partition("\\n")
report = os.dup(1)
null = os.open(os.devnull, os.O_RDWR)
for stream in (0, 1, 2):
    os.dup2(null, stream)
limits = {"CPU": seconds, "AS": memory, "DATA": memory, "FSIZE": 1 << 20, "NOFILE": 32, "CORE": 0, "STACK": 64 << 20}
for name, most in limits.items():
    try:
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
    except (ValueError, OSError):
        if sys.platform == "linux":
            raise
if user:
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
if sys.platform == "linux":
    import ctypes
    libc = ctypes.CDLL(None)
    libc.prctl(1, 9, 0, 0, 0)  # die with the parent; forgotten when the user changes, so set after it
    libc.prctl(38, 1, 0, 0, 0)  # no new privileges
resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
os.environ.clear()
try:
    exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
    said = token
except BaseException as error:
    said = type(error).__name__[:60]
os.write(report, said.encode())
os._exit(0)
"""
_NOBODY = 65534
_PROBES = (("--net", "--pid"), ("--user", "--map-root-user", "--net", "--pid"))


@dataclass(frozen=True)
class Sandbox:
    """How programs are run. prefix: command that takes namespaces away; user: id to change to, 0 = stay."""

    seconds: int
    memory_bytes: int
    prefix: tuple[str, ...]
    user: int

    @property
    def network(self) -> bool:
        """Whether programs can reach a network."""
        return not self.prefix

    def describe(self) -> dict[str, object]:
        """What eval.json says about it."""
        kept: dict[str, object] = {"seconds": self.seconds, "memory_bytes": self.memory_bytes}
        return kept | {"network": self.network, "unprivileged_user": self.user != 0}


@dataclass(frozen=True)
class Outcome:
    """passed: the program ran to its end without an exception. reason: passed, timeout, killed, or the exception."""

    passed: bool
    reason: str


def open_sandbox(seconds: int = 5, memory_bytes: int = 1 << 30) -> Sandbox:
    """The strictest sandbox this machine allows, tried with a harmless program.

    Raises MachineError where not even that one runs, so that a broken sandbox is never taken for wrong answers.
    """
    if os.name != "posix":
        raise MachineError(message("code execution", f"no resource limits on {os.name}", "Linux or macOS"))
    user = _NOBODY if os.geteuid() == 0 else 0
    prefixes = [*_prefixes(), ()]
    users = [user, 0] if user else [0]
    reasons = []
    for prefix in prefixes:
        for identity in users:
            box = Sandbox(seconds, memory_bytes, prefix, identity)
            outcome = run_program(box, "import collections, math, re, typing\nassert math.gcd(12, 18) == 6")
            if outcome.passed:
                return box
            reasons.append(outcome.reason)
    raise MachineError(message("code execution", f"the sandbox runs nothing here ({', '.join(reasons)})"))


def _prefixes() -> list[tuple[str, ...]]:
    program = shutil.which("unshare")
    if program is None:
        return []
    tries = [(program, *flags, "--fork", "--kill-child", "--") for flags in _PROBES]
    return tries if os.geteuid() == 0 else tries[1:]


def run_program(box: Sandbox, program: str) -> Outcome:
    """Run one program to its end or to a limit. Everything it started is gone afterwards, its directory too."""
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="moecompress-code-") as place:
        inside = Path(place, "empty")
        inside.mkdir()
        if box.user:
            os.chmod(place, 0o711)
            os.chown(inside, box.user, box.user)
        Path(place, "program").write_text(f"{token}\n{program}", encoding="utf-8", errors="replace")
        arguments = [str(box.seconds), str(box.memory_bytes), str(box.user)]
        command = [*box.prefix, sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c", _START, *arguments]
        with open(Path(place, "program"), "rb") as given, open(Path(place, "report"), "w+b") as report:
            ended = _wait(command, inside, given.fileno(), report.fileno(), box.seconds + 1)
            report.seek(0)
            said = report.read(100).decode("utf-8", "replace")
    if not ended:
        return Outcome(False, "timeout")
    return Outcome(True, "passed") if said == token else Outcome(False, said or "killed")


def _wait(command: list[str], place: Path, given: int, report: int, seconds: float) -> bool:
    """Whether the process ended by itself in time."""
    process = subprocess.Popen(
        command,
        cwd=place,
        env={},
        stdin=given,
        stdout=report,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        process.wait(seconds)
        return True
    except subprocess.TimeoutExpired:
        return False
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
