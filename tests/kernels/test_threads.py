"""Who works in parallel on the CPU: as many threads as asked for and allowed, in forked children, for many callers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moecompress_kernels import cpu

ALLOWED = sorted(os.sched_getaffinity(0))
pytestmark = [
    pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable())),
    pytest.mark.slow,
]
# Large enough for panels to be shared among threads, small enough for PyTorch to compare results with one thread: its
# others do not live in a forked child either.
START = """
import os, signal, sys, threading
import torch
sys.path.append(sys.argv[1])
import packed_layers as layers
from moecompress import ops
from moecompress.types import Scheme
from moecompress_kernels import cpu
library = cpu._library()
if sys.argv[2] == "own":
    library.mc_use_openmp(None)
schemes = [(Scheme(4, 32), Scheme(3, 16, False, "int")), (Scheme(8, activation="int8"), Scheme(4))]
packed = layers.experts(schemes, 768, 256)
inputs = layers.routing(40, 2, 2, 768, torch.bfloat16)
handle = layers.sealed_handle(packed, "cpu")
def run():
    return ops.moe_mlp(*inputs, handle, "cpu", packed.layer.text)
def tasks():
    return len(os.listdir("/proc/self/task"))
"""


def output(code: str, pool: str = "openmp", **environment: str) -> list[str]:
    """Printed words of a process of its own, which takes seconds."""
    own = {**os.environ, **environment}
    command = [sys.executable, "-P", "-c", START + code, str(Path(__file__).resolve().parents[1]), pool]
    done = subprocess.run(command, env=own, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    return done.stdout.split()


@pytest.mark.parametrize("pool", ["openmp", "own"])
def test_affinity_bounds_the_threads_and_their_number_changes_no_bit(pool: str) -> None:
    code = f"""
found = []
for processors in ({set(ALLOWED)}, {{{ALLOWED[0]}}}, {set(ALLOWED)}):
    os.sched_setaffinity(0, processors)
    for threads in (1, 2, 3, 64):
        torch.set_num_threads(threads)
        found.append(run())
    print(library.mc_threads(64))
print(all(torch.equal(found[0], one) for one in found))
"""
    most = str(min(64, len(ALLOWED)))
    assert output(code, pool) == [most, "1", most, "True"]


@pytest.mark.parametrize("pool", ["openmp", "own"])
def test_a_process_that_starts_on_one_cpu_starts_no_threads(pool: str) -> None:
    code = """
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
torch.set_num_threads(8)
before = tasks()  # PyTorch itself starts as many as it is told
run()
print(library.mc_threads(8), tasks() - before)
"""
    assert output(code, pool) == ["1", "0"]


def test_omp_num_threads_is_obeyed() -> None:
    code = "before = tasks(); run(); print(torch.get_num_threads(), tasks() - before)"
    assert output(code, OMP_NUM_THREADS="1") == ["1", "0"]


@pytest.mark.parametrize("pool", ["openmp", "own"])
def test_a_forked_child_computes_what_its_parent_does(pool: str) -> None:
    """libgomp's threads do not come along, and it would wait for them forever."""
    code = """
torch.set_num_threads(2)
wanted = run()
for _ in range(2):
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os._exit(0 if torch.equal(run(), wanted) and torch.equal(run(), wanted) else 1)
    print(os.waitpid(child, 0)[1], torch.equal(run(), wanted))
"""
    assert output(code, pool) == ["0", "True"] * 2


@pytest.mark.parametrize("pool", ["openmp", "own"])
def test_many_threads_may_call_at_once(pool: str) -> None:
    code = """
torch.set_num_threads(2)
wanted, same = run(), []
def many():
    torch.set_num_threads(2)
    same.extend(torch.equal(run(), wanted) for _ in range(20))
callers = [threading.Thread(target=many) for _ in range(8)]
[caller.start() for caller in callers]
[caller.join() for caller in callers]
print(len(same), all(same))
"""
    assert output(code, pool) == ["160", "True"]


def test_a_thread_that_ends_leaves_no_memory_behind() -> None:
    """A server may start one for every request."""
    code = """
def anonymous():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1])
def requests(count):
    for _ in range(count):
        caller = threading.Thread(target=run)
        caller.start()
        caller.join()
inputs = [one[:2].clone() for one in inputs]
requests(100)
before = anonymous()
requests(400)
print((anonymous() - before) // 400)
"""
    assert int(output(code, OMP_NUM_THREADS="1")[0]) < 5  # KB


@pytest.mark.parametrize("pool", ["openmp", "own"])
def test_the_interpreter_may_end_while_the_library_computes(pool: str) -> None:
    """The library alone: daemon threads inside any operator of PyTorch end the process with an abort (Python 3.11)."""
    code = """
torch.set_num_threads(2)
out, places = torch.empty_like(inputs[0]), [one.data_ptr() for one in (*handle[1::-1], *inputs)]
started = threading.Barrier(4)
def compute():
    return library.mc_moe_mlp(*places[:3], 1, *places[3:], 40, 2, out.data_ptr(), 2, 0)
def forever():
    assert compute() == 0
    started.wait()
    while True:
        compute()
[threading.Thread(target=forever, daemon=True).start() for _ in range(3)]
started.wait()
print("ends")
"""
    assert output(code, pool) == ["ends"]
