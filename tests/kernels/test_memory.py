"""Loading a native checkpoint never holds its weights twice: each layer is repacked and its records are dropped."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import engine
import families
import pytest

from moecompress.recipe import load_recipe
from moecompress.run import run
from moecompress_kernels import cpu

pytestmark = [
    pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable())),
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is counted by Linux"),
    pytest.mark.slow,
]
# The first load brings in all code; bytes of the second one at their most, and when it is done.
SCRIPT = """
import gc, sys, threading
import moecompress
from moecompress.packed import backends
def anonymous():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024
model = moecompress.load(sys.argv[1])
del model
gc.collect()
before, seen, done = anonymous(), [], threading.Event()
def watch():
    while not done.wait(0.0005):
        seen.append(anonymous() - before)
watcher = threading.Thread(target=watch)
watcher.start()
model = moecompress.load(sys.argv[1])
done.set()
watcher.join()
assert all(" by cpu, " in row for row in backends(model)), backends(model)
print(max(seen), anonymous() - before)
"""


def test_weights_are_never_in_memory_twice(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "moe_intermediate_size": 512, "num_experts": 16}
    source = families.save_tiny("qwen3_moe", tmp_path / "source", **sizes)
    step = {"quantize.rtn": {"bits": 8, "group_size": 128}}
    output = {"dir": str(tmp_path / "out"), "format": "native"}
    with pytest.MonkeyPatch.context() as patch:
        engine.reload_here(patch)
        out = run(load_recipe(engine.write_recipe(tmp_path, source, [step], output=output)))
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    done = subprocess.run([sys.executable, "-P", "-c", SCRIPT, str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    most, end = map(int, done.stdout.split())
    assert size > 50 << 20
    assert 0.7 * size < end and most < 1.35 * size, (size, most, end)  # a layer more is a quarter, all of them twice
