"""Compile the CPU library: by `pip install` through setup.py, or at first use into a cache. Standard library only."""

from __future__ import annotations

import atexit
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "csrc"
CACHE = "MOECOMPRESS_KERNEL_CACHE"  # environment: a directory instead of the user's cache
_FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -ffp-contract=off -w".split()
_AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mprefer-vector-width=512".split()
_X86 = {
    "isa_avx2": "-mavx2 -mfma".split(),
    "isa_avx512": _AVX512,
    "isa_avx512_vnni": [*_AVX512, "-mavx512vnni"],
    "isa_avx512_bf16": [*_AVX512, "-mavx512bf16"],
    "isa_amx": [*_AVX512, *"-mavx512vnni -mamx-tile -mamx-int8".split()],
}
_PLAIN = ("isa_scalar", "layout", "pool", "driver", "api")


class BuildError(Exception):
    """There is no compiler, or it failed; the text says which and how."""


def find_compiler() -> list[str]:
    """The C++ compiler as a command: $CXX, or the first of c++, g++, clang++ that exists. Raises BuildError."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    if chosen:
        if shutil.which(chosen[0]) is None:
            raise BuildError(f"the compiler that CXX names, {chosen[0]}, does not exist")
        return chosen
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise BuildError("no C++ compiler found (tried c++, g++, clang++; CXX names another)")


def sources_hash() -> str:
    """16 hex digits of everything that decides what the library does."""
    flags = [word for own in _X86.values() for word in own]
    digest = hashlib.sha256(" ".join((*_FLAGS, *flags, platform.machine())).encode())
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".cpp", ".h"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def compile_cpu(target: Path, extra: tuple[str, ...] = ()) -> None:
    """Build the library at `target`, whole or not at all. extra: more flags (sanitizers). Raises BuildError."""
    compiler = find_compiler()
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    flags = [*_FLAGS, f'-DMC_SOURCES="{sources_hash()}"', *extra]
    with tempfile.TemporaryDirectory(prefix="moecompress-build-") as folder:
        objects = {name: Path(folder) / f"{name}.o" for name in (*_X86, *_PLAIN)}

        def compile_one(name: str) -> None:
            own = _X86.get(name, []) if x86 else []
            own = own if _knows(compiler, own) else []  # the file is then empty but for saying so
            call([*compiler, *flags, *own, "-c", str(SOURCES / f"{name}.cpp"), "-o", str(objects[name])])

        link = [*compiler, "-shared", *extra, *map(str, objects.values()), "-pthread"]
        compile_and_link(objects, compile_one, link, target)


def compile_and_link(units: Iterable[str], compile_one: Callable[[str], None], link: list[str], target: Path) -> None:
    """All units in parallel, then the library by `link -o`, put at `target` whole or not at all. Raises BuildError."""
    names = list(units)
    with ThreadPoolExecutor(max(1, min(len(names), len(os.sched_getaffinity(0))))) as pool:
        list(pool.map(compile_one, names))
    with tempfile.TemporaryDirectory(prefix="moecompress-build-") as folder:
        built = Path(folder) / "library.so"
        call([*link, "-o", str(built)])
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.copyfile(built, partial)
        partial.replace(target)


def _knows(compiler: list[str], flags: list[str]) -> bool:
    """Whether the compiler takes these flags; older ones lack instruction sets."""
    if not flags:
        return True
    try:
        call([*compiler, *flags, "-fsyntax-only", "-x", "c++", os.devnull])
    except BuildError:
        return False
    return True


def cache_directory() -> Path:
    """Where libraries built at first use are kept."""
    chosen = os.environ.get(CACHE)
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "moecompress" / "kernels"


def cached_cpu() -> tuple[Path, str]:
    """(library, how it came about): from the cache, or built now. Raises BuildError."""
    return cached_library("cpu.so", sources_hash(), compile_cpu, "CPU kernels (once, some seconds)")


def cached_library(name: str, digest: str, build: Callable[[Path], None], what: str) -> tuple[Path, str]:
    """The library `name` of these sources, made by `build` where it is not there. Raises BuildError.

    Processes that need it at the same time wait for the one that builds. A cache that cannot be written is not an
    error: the library is then built for this process only.
    """
    folder = cache_directory() / digest
    target = folder / name
    if target.is_file():
        return target, f"from the cache {folder}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "lock"):
            if not target.is_file():
                _say(what)
                build(target)
        return target, f"built into the cache {folder}"
    except OSError as error:
        _say(what)
        private = Path(tempfile.mkdtemp(prefix="moecompress-kernels-")) / name
        atexit.register(shutil.rmtree, private.parent, ignore_errors=True)
        build(private)
        return private, f"built for this process only, the cache {folder} cannot be written ({error.strerror})"


def _say(what: str) -> None:
    print(f"moecompress: compiling {what}", file=sys.stderr, flush=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def call(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error.strerror}") from error
    if done.returncode:
        tail = (done.stderr or done.stdout).strip().splitlines()[-3:]
        raise BuildError(f"{command[0]} failed with {done.returncode}: {' | '.join(tail)}")
