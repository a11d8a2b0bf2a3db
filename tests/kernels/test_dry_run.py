"""What waits for a device gets through its Python without one: the tests of `-m gpu`, and the benchmark."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import fakecuda
import pytest

ROOT = Path(__file__).resolve().parents[2]
HAS_TRITON = importlib.util.find_spec("triton") is not None
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="there is a GPU")


@pytest.mark.slow
def test_the_tests_for_devices(shim_library: Path) -> None:
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "fakecuda", "-p", "no:cacheprovider", "-m", "gpu"]
    path = os.pathsep.join(filter(None, [str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]))
    environment = dict(os.environ) | {"FAKE_CUDA": str(shim_library), "PYTHONPATH": path}
    command += ["tests/gpu", *([] if HAS_TRITON else ["-k", "not triton"])]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    found = re.findall(r"(\d+) (passed|skipped|failed)", done.stdout)
    assert found == [("16" if HAS_TRITON else "11", "passed")], done.stdout[-300:]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_cuda", ROOT / "scripts" / "bench_cuda.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SHAPES", {"qwen3": ("Small", 128, 128, 4, 2)})
    monkeypatch.setattr(module, "CALLS", 2)
    monkeypatch.setattr(module, "COPIED", 1 << 10)
    monkeypatch.setattr(fakecuda.Graph, "replay", lambda self: None)  # dozens of them, for times that mean nothing
    return module


def test_the_benchmark(
    bench: ModuleType, shim_library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    words = ["--quick", "--no-checks", "--tokens", "1,40", "--json", str(out)]
    backends = ["cuda", "triton"] if HAS_TRITON else ["cuda"]
    bench.BACKENDS = backends
    with fakecuda.pretended(shim_library):
        assert bench.main(words) == 0
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if line.startswith("| Small")]
    result, timed = json.loads(out.read_text()), ["cuda", "cuda wgmma", *backends[1:]]
    wanted = [  # warp groups where a block has 64 tokens: mma for fewer
        (bits, name, tokens)
        for bits in (4, 3)
        for name in timed
        for tokens in ((40,) if name == "cuda wgmma" else (1, 40))
    ]
    assert len(lines) == len(wanted) and all(line.count("|") == 10 for line in lines)
    assert result["capability"] == "9.0" and list(result["backends"]) == timed
    assert "prefill with wgmma" in result["backends"]["cuda wgmma"]
    assert [(r["bits"], r["backend"], r["M"]) for r in result["rows"]] == wanted
    for row in result["rows"]:  # a graph of two calls takes 100 ms
        assert row["ms"] == 50.0 and row["peers"] == {bench.PEER: 50.0} and row["gbs"] > 0 and row["tflops"] > 0


def test_the_benchmark_without_a_device(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--quick"]) == 2
    assert "cuda cannot run: PyTorch sees no CUDA device" in capsys.readouterr().err


def test_failing_checks_stop_the_benchmark(
    bench: ModuleType, shim_library: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "checks", lambda: 1)
    with fakecuda.pretended(shim_library):
        assert bench.main(["--quick"]) == 1
    assert "nothing is timed" in capsys.readouterr().err
