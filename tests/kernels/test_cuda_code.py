"""The machine code of the CUDA kernels on every architecture: registers, no spills, tensor cores. No device needed."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moecompress_kernels import cuda, cuda_build
from moecompress_kernels.build import SOURCES, BuildError, call

# three, two and one block on a multiprocessor; repacking runs once
LIMITS = {"decode_up": 80, "decode_down": 64, "prefill": 255, "pack_tiles": 96}
KERNELS = {  # of a unit: decode_up for 2 types x gated or not, decode_down for 2; prefill for 2 x (2 shapes, sum);
    "cuda_wgmma": 5,  # for 2 types x 2 shapes, and what deals columns
    "cuda_prefill": 6,
    "cuda_decode": 6,
    "cuda_sort": 3,
    "cuda_repack": 2,
}
CODE = cuda_build.units(cuda_build.ARCHITECTURES)
WIDTHS = 5  # loops of a kernel, one for each
# (in the name, mma in a loop). Decode: eight steps along a tile, in each one a row tile and one for the tokens' sums.
# Prefill: four steps (a loop over halves stays one), in each two row tiles times the groups of eight tokens; those of a
# warp group (HGMMA) have all tokens, and one group of them runs while the next is decoded: as many commits and waits.
PRODUCTS = {
    r"group_prefill": 4 * 2,
    r"decode_up.*Li1E": 8 * (1 + 1),
    r"decode_up.*Li2E": 8 * (2 + 1),
    r"decode_down": 8 * (1 + 1),
    r"prefill.*Li2E": 4 * 2 * 2,
    r"prefill.*Li8E": 4 * 2 * 8,
    r"sum_slots|deal_rows": 0,
}
COMPILED = re.compile(
    r"Compiling entry function '(\S+)' for '(\w+)'.*?"
    r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
    re.S,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def nvcc() -> list[str]:
    try:
        return cuda_build.find_nvcc()
    except BuildError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def units(nvcc: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """Unit -> (object file with code for all architectures, what ptxas said)."""
    folder = tmp_path_factory.mktemp("code")

    def made(unit: str) -> tuple[Path, str]:
        flags = [*cuda_build.FLAGS, *cuda_build.targets(CODE[unit]), "-Xptxas", "-v"]
        command = [*nvcc, *flags, "-c", str(SOURCES / f"{unit}.cu"), "-o", str(folder / f"{unit}.o")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return folder / f"{unit}.o", done.stderr

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(KERNELS, pool.map(made, KERNELS), strict=True))


@pytest.fixture
def cuobjdump(nvcc: list[str]) -> str:
    """The disassembler: nvcc's own, or the one that Triton brings."""
    triton = importlib.util.find_spec("triton")
    folders = [None, str(Path(shutil.which(nvcc[0]) or nvcc[0]).resolve().parent)]
    folders += [f"{place}/backends/nvidia/bin" for place in (triton.submodule_search_locations or () if triton else ())]
    for folder in folders:
        if found := shutil.which("cuobjdump", path=folder):
            return found
    pytest.skip("no cuobjdump beside nvcc or in Triton")


@pytest.mark.parametrize("unit", KERNELS)
def test_no_spills_on_any_architecture(unit: str, units: dict[str, tuple[Path, str]]) -> None:
    found = COMPILED.findall(units[unit][1])
    assert Counter(arch for _, arch, *_ in found) == {f"sm_{one}": KERNELS[unit] for one in CODE[unit]}
    assert "serialized" not in units[unit][1], "ptxas lets the products of a warp group wait for each other"
    for name, arch, stored, loaded, registers in found:
        assert int(stored) + int(loaded) == 0, f"{name} on {arch} spills"
        limit = next((most for part, most in LIMITS.items() if part in name), 64)
        assert int(registers) <= limit, f"{name} on {arch}: {registers} registers, limit {limit}"


def instructions(cuobjdump: str, path: Path, architecture: str) -> dict[str, Counter[str]]:
    """Of each kernel: how often each instruction (without its suffixes) is there."""
    command = [cuobjdump, "-sass", "-arch", f"sm_{architecture}", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {}
    for part in text.split("Function : ")[1:]:
        name, code = part.split("\n", 1)
        words = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z0-9]+)", code, re.M)
        found[name.strip()] = Counter(words)
    return found


PLACES = [(unit, one) for unit in ("cuda_decode", "cuda_prefill", "cuda_wgmma") for one in CODE[unit]]


@pytest.mark.parametrize(("unit", "architecture"), PLACES)
def test_products_are_on_tensor_cores(
    unit: str, architecture: str, units: dict[str, tuple[Path, str]], cuobjdump: str
) -> None:
    """As many mma as the loops have, copies past the registers, no local memory, the early start on 9.0 alone."""
    found = instructions(cuobjdump, units[unit][0], architecture)
    assert len(found) == KERNELS[unit]
    for name, counts in found.items():
        products = next(number for part, number in PRODUCTS.items() if re.search(part, name))
        ours, other = ("HGMMA", "HMMA") if unit == "cuda_wgmma" else ("HMMA", "HGMMA")
        assert counts[ours] == WIDTHS * products and not counts[other], name
        assert bool(counts["LDGSTS"]) == bool(products), name
        assert not counts["LDL"] and not counts["STL"], name
        early = architecture == "90a"
        assert bool(counts["PREEXIT"]) == (early and "decode_up" in name), name
        assert bool(counts["ACQBULK"]) == (early and "decode_down" in name), name


def test_the_library_loads_and_says_what_is_missing(
    nvcc: list[str], units: dict[str, tuple[Path, str]], tmp_path: Path
) -> None:
    """All units link to one library, which ctypes loads with or without a driver; calls give CUDA's own words."""
    library = tmp_path / "cuda.so"
    call([*cuda_build.link_command(nvcc, [str(path) for path, _ in units.values()]), "-o", str(library)])
    loaded = cuda.load(library)
    for name in ("decode", "prefill", "wgmma", "sort", "pack", "unpack", "linear_decode", "linear_wgmma"):
        assert getattr(loaded, f"mc_cuda_{name}")
    facts = (ctypes.c_int * 3)()
    code = loaded.mc_cuda_device(facts)
    assert (code == 0 and facts[0] >= 50) or b"CUDA" in loaded.mc_cuda_error(code)
