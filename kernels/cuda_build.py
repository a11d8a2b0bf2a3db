"""Compile the CUDA library with nvcc into the cache: at first use, for the device at hand, or ahead of time.

    python -m moecompress_kernels.cuda_build [80] [86] [89] [90a]     # all four without a name; needs no device

Standard library only.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from moecompress_kernels.build import SOURCES, BuildError, cached_library, call, compile_and_link

UNITS = ("cuda_repack", "cuda_sort", "cuda_decode", "cuda_prefill", "cuda_wgmma")
ARCHITECTURES = ("80", "86", "89", "90a")
_ONLY = {"cuda_wgmma": ("90a",)}  # units whose instructions no other architecture has
FLAGS = "-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden".split()


def find_nvcc() -> list[str]:
    """nvcc as a command: $NVCC, from the path, or below $CUDA_HOME or /usr/local/cuda. Raises BuildError."""
    chosen = shlex.split(os.environ.get("NVCC", ""))
    if chosen:
        if shutil.which(chosen[0]) is None:
            raise BuildError(f"the compiler that NVCC names, {chosen[0]}, does not exist")
        return chosen
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc"
    for name in ("nvcc", str(home)):
        if (found := shutil.which(name)) is not None:
            return [found]
    raise BuildError("no nvcc found (NVCC names one; CUDA_HOME, /usr/local/cuda and the path were tried)")


def targets(architectures: Sequence[str]) -> list[str]:
    """Flags for code of these architectures. 80, 86 and 89 share their PTX, so nvcc reads the sources once for them.

    Their PTX is kept too: a device newer than all of them translates it when it loads.
    """
    plain = [f"sm_{one}" for one in architectures if not one.startswith("9")]
    flags = [f"arch=compute_80,code=[{','.join([*plain, 'compute_80'])}]"] if plain else []
    flags += [f"arch=compute_{one},code=sm_{one}" for one in architectures if one.startswith("9")]
    return [word for flag in flags for word in ("-gencode", flag)]


def units(architectures: Sequence[str]) -> dict[str, list[str]]:
    """The units of a library for these architectures, and those of them that each one has code for."""
    found = {unit: [one for one in architectures if one in _ONLY.get(unit, ARCHITECTURES)] for unit in UNITS}
    return {unit: those for unit, those in found.items() if those}


def architecture_of(capability: tuple[int, int]) -> str:
    """The architecture in ARCHITECTURES whose code a device of this compute capability runs."""
    number = 10 * capability[0] + capability[1]
    if capability[0] == 9:
        return "90a"
    return next((one for one in ("89", "86", "80") if int(one) <= number and capability[0] == 8), "80")


def sources_hash(architectures: Sequence[str]) -> str:
    """16 hex digits of everything that decides what the library does."""
    digest = hashlib.sha256(" ".join((*FLAGS, *architectures)).encode())
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".cu", ".cuh"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def compile_cuda(target: Path, architectures: Sequence[str]) -> None:
    """Build the library at `target`, whole or not at all, without torch. Raises BuildError."""
    nvcc, code = find_nvcc(), units(architectures)
    with tempfile.TemporaryDirectory(prefix="moecompress-build-") as folder:
        objects = {name: str(Path(folder) / f"{name}.o") for name in code}

        def compile_one(name: str) -> None:
            call([*nvcc, *FLAGS, *targets(code[name]), "-c", str(SOURCES / f"{name}.cu"), "-o", objects[name]])

        compile_and_link(objects, compile_one, link_command(nvcc, objects.values()), target)


def link_command(nvcc: Sequence[str], objects: Iterable[str]) -> list[str]:
    """What makes one library of the units' object files, with CUDA's own runtime in it; `-o FILE` is still missing."""
    return [*nvcc, "-shared", "-cudart", "static", *objects]


def cached_cuda(architecture: str) -> tuple[Path, str]:
    """(library, how it came about) for devices of an architecture: from the cache, or built now. Raises BuildError."""
    one = [architecture]
    return cached_library(
        "cuda.so", sources_hash(one), lambda target: compile_cuda(target, one), "CUDA kernels (once, about a minute)"
    )


def main(words: Sequence[str]) -> int:
    unknown = [word for word in words if word not in ARCHITECTURES]
    if unknown:
        print(f"cuda_build: no architecture {' '.join(unknown)}; there are {' '.join(ARCHITECTURES)}", file=sys.stderr)
        return 2
    for architecture in words or ARCHITECTURES:
        try:
            path, how = cached_cuda(architecture)
        except BuildError as error:
            print(f"cuda_build: {error}", file=sys.stderr)
            return 2
        print(f"{architecture}: {path}, {how}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
