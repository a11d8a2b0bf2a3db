"""The AMX file: with emulated tile instructions (amx_emulated.h) it gives the bits of plain C++, and it compiles."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import packed_layers as layers
import pytest
import torch

from moecompress.types import Scheme
from moecompress_kernels import build, cpu

SCALAR, BF16_PRODUCTS, AMX = 0, 4, 5
HERE = Path(__file__).resolve().parent
EMULATED = ("-DMC_AMX_EMULATED", f"-I{HERE}", "-O1")
pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The library with emulated tiles, in place of the real one."""
    if BF16_PRODUCTS not in dict(cpu.isas()):
        pytest.skip("what AMX needs besides tiles, this machine lacks")
    target = tmp_path_factory.mktemp("amx") / "cpu.so"
    build.compile_cpu(target, EMULATED)
    library = cpu._open(target)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_loaded", lambda: (library, None, "for a test"))
        yield


@pytest.mark.slow
def test_tiles_give_the_bits_of_plain_products(emulated: Any) -> None:
    assert dict(cpu.isas())[AMX] == "AMX"
    kinds: list[Any] = [(True, "none"), (False, "int"), (False, "float")]
    cases = itertools.product((1, 2, 3, 4, 8), (16, 96, -1), kinds)
    schemes = [Scheme(bits, group, *kind) for bits, group, kind in cases]
    schemes.append(Scheme(1, 96, binary=True))
    for number, scheme in enumerate(schemes):
        columns = 1248 if scheme.group_size == -1 else 192  # 1248: two whole pieces, and one that ends in half a tile
        matrix = layers.weight(40, columns, replace(scheme, activation="int8"), seed=number)
        packed = layers.linear(matrix)
        handle = cpu.prepare(packed.layer, packed.records, packed.slot_map, [])
        x = torch.randn(100, columns, generator=layers.generator(number))  # more rows than one call takes
        for rows in (1, 5, 16, 17, 100):
            found, wanted = (cpu.packed_linear(packed.layer, handle, x[:rows], isa=isa) for isa in (AMX, SCALAR))
            assert torch.equal(found, wanted), (scheme, rows)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_with_and_without_rounding(emulated: Any, dtype: torch.dtype) -> None:
    schemes = [(Scheme(4, 32, activation="int8"), Scheme(3, 16, activation="int4")), (Scheme(4, 32), Scheme(2, 16))]
    packed = layers.experts(schemes, bias=True)
    inputs = layers.routing(50, 2, 2, 64, dtype)
    handle = cpu.prepare(packed.layer, packed.records, packed.slot_map, packed.biases)
    found, wanted = (cpu.moe_mlp(packed.layer, handle, *inputs, isa=isa) for isa in (AMX, BF16_PRODUCTS))
    assert torch.equal(found, wanted)


@pytest.mark.slow
def test_a_compiler_that_knows_tiles_compiles_them(tmp_path: Path) -> None:
    compiler, flags = build.find_compiler(), build._X86["isa_amx"]
    if not build._knows(compiler, flags):
        pytest.skip("the compiler does not know AMX")
    target = tmp_path / "amx.s"
    build.call([*compiler, *build._FLAGS, *flags, "-S", str(build.SOURCES / "isa_amx.cpp"), "-o", str(target)])
    text = target.read_text()
    assert all(word in text for word in ("ldtilecfg", "tileloadd", "tdpbsud", "tilestored", "tilerelease"))
