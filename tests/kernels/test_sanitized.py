"""The CPU library under AddressSanitizer and UndefinedBehaviorSanitizer, in a process that imports nothing else.

Buffers are exactly as large as the interface says, so a byte read or written beyond them ends the process. AMX tiles
are emulated, so that what is around them runs, too.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import packed_fuzz as fuzz
import packed_layers as layers
import pytest
import torch

from moecompress import ops
from moecompress.types import Scheme
from moecompress_kernels import build, cpu
from moecompress_kernels.cpu_table import SPARE, make_table

RUNNER = """
import base64, ctypes, json, sys
library = ctypes.CDLL(sys.argv[1])
P, L, I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
library.mc_pack.argtypes = [P, P, P, I]
library.mc_unpack.argtypes = [P, P, L, P]
library.mc_moe_mlp.argtypes = [P, P, P, L, P, P, L, L, P, I, I]
library.mc_linear.argtypes = [P, P, P, L, L, P, I, I]
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = P, [ctypes.c_size_t], [P]
libc.calloc.restype, libc.calloc.argtypes = P, [ctypes.c_size_t] * 2
def buffer(data):
    at = libc.malloc(max(1, len(data)))
    ctypes.memmove(at, data, len(data))
    return at
for case in json.load(open(sys.argv[2])):
    data = {name: base64.b64decode(text) for name, text in case["data"].items()}
    table, x = buffer(data["table"]), buffer(data["x"])
    records = [buffer(base64.b64decode(record)) for record in case["records"]]
    blob = libc.calloc(case["blob"], 1)  # biases, which are not set here, are zeros
    assert library.mc_pack(table, (P * len(records))(*records), blob, 2) == 0
    for expert, record in enumerate(case["records"]):
        wanted = base64.b64decode(record)
        back = buffer(bytes(len(wanted)))
        assert library.mc_unpack(table, blob, expert, back) == 0
        assert ctypes.string_at(back, len(wanted)) == wanted
        libc.free(back)
    found = set()
    for isa in case["isas"]:
        out = libc.malloc(case["out"])
        if "ids" in data:
            ids, gates = buffer(data["ids"]), buffer(data["gates"])
            code = library.mc_moe_mlp(table, blob, x, case["dtype"], ids, gates, *case["sizes"], out, 2, isa)
            libc.free(ids), libc.free(gates)
        else:
            code = library.mc_linear(table, blob, x, case["dtype"], case["sizes"][0], out, 2, isa)
        assert code == case["code"], code
        if code == 0:
            found.add(ctypes.string_at(out, case["out"]))
        libc.free(out)
    assert len(found) <= 1 or not case["integers"], "instruction sets differ"
    for at in (table, x, blob, *records):
        libc.free(at)
print("clean")
"""


def text(value: torch.Tensor) -> str:
    flat = value.reshape(-1).clone(memory_format=torch.contiguous_format)  # one value may have any stride
    return base64.b64encode(flat.view(torch.uint8).numpy().tobytes()).decode()


def isas() -> list[int]:
    """Those of this machine, and emulated AMX where the rest of what it uses is there."""
    numbers = [number for number, _ in cpu.isas()]
    return [*numbers, 5] if 4 in numbers else numbers


def case(packed: layers.Packed, inputs: list[torch.Tensor], code: int = 0) -> dict[str, Any]:
    slots = packed.slot_map.tolist()
    table, size, _ = make_table(packed.layer, slots)
    data = {"table": text(table), "x": text(inputs[0])}
    sizes = [inputs[0].shape[0]]
    if len(inputs) > 1:
        data |= {"ids": text(inputs[1]), "gates": text(inputs[2])}
        sizes = list(inputs[1].shape)
    return {
        "data": data,
        "records": [text(packed.records[k][row]) for k, row in slots],
        "blob": size - SPARE,
        "out": inputs[0].shape[0] * packed.layer.rows * inputs[0].element_size(),
        "dtype": {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}[inputs[0].dtype],
        "sizes": sizes,
        "isas": isas(),
        "integers": all(m.rounding for record in packed.layer.records for m in record.matrices),
        "code": code,
    }


def cases() -> list[dict[str, Any]]:
    mixed = [
        (Scheme(4, 24), Scheme(3)),
        (Scheme(3, 16, False, "int"), Scheme(2, -1, False, "float")),
        (Scheme(1, binary=True), Scheme(8, activation="int8")),
        (Scheme(16), Scheme(16)),
    ]
    found = []
    for width, dtype in ((20, torch.bfloat16), (48, torch.float16), (33, torch.float32)):
        for activation in (
            layers.SILU,
            ops.Activation("silu", interleaved=True, limit=1.0),
            ops.Activation("relu2", False),
        ):
            packed = layers.experts(mixed, 48, width, activation, dtype)
            for tokens in (1, 2, 30):
                found.append(case(packed, layers.routing(tokens, 4, 3, 48, dtype)))
            wrong = layers.routing(2, 4, 3, 48, dtype)
            wrong[1][1, 2] = 5
            found.append(case(packed, wrong, code=1))
    for group, rounding in itertools.product((16, 24, -1), ("int4", "int8")):
        schemes = [
            Scheme(b, group, b % 2 == 0, "int" if b % 2 else "none", activation=rounding) for b in (1, 2, 3, 4, 8)
        ]
        packed = layers.experts(list(zip(schemes, schemes[::-1], strict=True)), 48, 48)
        found += [case(packed, layers.routing(n, 5, 3, 48, torch.bfloat16)) for n in (0, 1, 2, 5, 120)]
    packed = layers.linear(layers.weight(35, 1123, Scheme(3, activation="int8")))
    found += [case(packed, [torch.randn(n, 1123)]) for n in (1, 2, 21, 97)]
    for bits in (1, 2, 3, 4, 8, 16):
        packed = layers.linear(
            layers.weight(35, 41, Scheme(bits, zero="none" if bits == 16 else "int", symmetric=bits == 16))
        )
        found += [
            case(packed, [torch.randn(n, 41).to(dtype)]) for n in (0, 1, 9) for dtype in (torch.float32, torch.bfloat16)
        ]
    for seed in range(60):
        packed = fuzz.layer(seed)
        drawn = fuzz.call(packed, seed)
        inputs = [drawn.hidden.contiguous(), drawn.ids.long().contiguous(), drawn.weights.float().contiguous()]
        found.append(case(packed, inputs, code=int(drawn.wrong)))
    return found


@pytest.mark.slow
@pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
def test_no_byte_out_of_bounds(tmp_path: Path) -> None:
    compiler = build.find_compiler()
    runtime = subprocess.run([*compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=False)
    if not Path(runtime.stdout.strip()).is_file():
        pytest.skip("the compiler has no AddressSanitizer")
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-sanitize=alignment", "-O1")
    flags += ("-DMC_AMX_EMULATED", f"-I{Path(__file__).resolve().parent}")
    build.compile_cpu(tmp_path / "cpu.so", flags)
    (tmp_path / "cases.json").write_text(json.dumps(cases()))
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONMALLOC": "malloc",
    }
    run = subprocess.run(
        [sys.executable, "-I", "-c", RUNNER, str(tmp_path / "cpu.so"), str(tmp_path / "cases.json")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0 and run.stdout.strip() == "clean", run.stderr[-3000:]
