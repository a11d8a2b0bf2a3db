"""Building the CUDA library: which compiler, which architecture, the cache; and the kernels under AddressSanitizer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cudashim
import pytest

from moecompress_kernels import cuda_build
from moecompress_kernels.build import CACHE, BuildError


def test_architectures_of_devices() -> None:
    wanted = {(8, 0): "80", (8, 6): "86", (8, 7): "86", (8, 9): "89", (9, 0): "90a", (10, 0): "80", (12, 0): "80"}
    assert {one: cuda_build.architecture_of(one) for one in wanted} == wanted


def test_without_nvcc_the_reason_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("NVCC", raising=False)
    with pytest.raises(BuildError, match="no nvcc found"):
        cuda_build.find_nvcc()
    monkeypatch.setenv("NVCC", "nowhere")
    with pytest.raises(BuildError, match="that NVCC names, nowhere, does not exist"):
        cuda_build.find_nvcc()


def fake_nvcc(folder: Path, script: str) -> Path:
    path = folder / "nvcc"
    path.write_text(f"#!{sys.executable}\nimport sys, pathlib\n{script}\n")
    path.chmod(0o755)
    return path


WRITES = "out = pathlib.Path(sys.argv[sys.argv.index('-o') + 1]); out.write_text('built')"


def test_a_library_is_built_once_for_each_architecture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = f"{WRITES}\nopen({str(log)!r}, 'a').write(' '.join(sys.argv) + chr(10))"
    monkeypatch.setenv("NVCC", str(fake_nvcc(tmp_path, script)))
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    first, how = cuda_build.cached_cuda("90a")
    assert first.read_text() == "built" and how.startswith("built into the cache")
    calls = log.read_text().splitlines()
    assert len(calls) == len(cuda_build.UNITS) + 1
    assert all("arch=compute_90a,code=sm_90a" in call for call in calls[:-1]) and "-cudart static" in calls[-1]
    assert any("csrc/cuda_wgmma.cu" in call for call in calls[:-1])
    assert cuda_build.cached_cuda("90a") == (first, f"from the cache {first.parent}")
    assert len(log.read_text().splitlines()) == len(calls)
    other, _ = cuda_build.cached_cuda("86")
    more = log.read_text().splitlines()[len(calls) :]
    assert other != first and "sm_86,compute_80" in more[0] and not any("cuda_wgmma" in call for call in more)


def test_processes_that_need_a_library_at_once_build_it_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = f"import time; time.sleep(0.3)\n{WRITES}\nopen({str(log)!r}, 'a').write('called' + chr(10))"
    environment = dict(os.environ) | {"NVCC": str(fake_nvcc(tmp_path, script)), CACHE: str(tmp_path / "cache")}
    code = "from moecompress_kernels.cuda_build import cached_cuda; print(cached_cuda('80')[0].read_text())"
    both = [subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE) for _ in range(2)]
    assert [one.communicate()[0].strip() for one in both] == [b"built", b"built"]
    assert len(log.read_text().splitlines()) == len(cuda_build.units(["80"])) + 1


def test_units_have_code_for_the_architectures_that_can_run_it() -> None:
    code = cuda_build.units(cuda_build.ARCHITECTURES)
    assert list(code) == list(cuda_build.UNITS) and code.pop("cuda_wgmma") == ["90a"]
    assert set(map(tuple, code.values())) == {cuda_build.ARCHITECTURES}
    assert "cuda_wgmma" not in cuda_build.units(["80", "89"]) and len(cuda_build.units(["90a"])) == 5


def test_libraries_are_built_ahead_of_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NVCC", str(fake_nvcc(tmp_path, WRITES)))
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    assert cuda_build.main(["80", "90a"]) == 0
    assert len(list((tmp_path / "cache").rglob("cuda.so"))) == 2
    assert cuda_build.cached_cuda("90a")[1].startswith("from the cache")
    assert cuda_build.main(["70"]) == 2 and "no architecture 70; there are 80 86 89 90a" in capsys.readouterr().err
    monkeypatch.setenv("NVCC", str(fake_nvcc(tmp_path, "sys.exit('broken')")))
    assert cuda_build.main(["86"]) == 2 and "broken" in capsys.readouterr().err


def test_a_failing_compiler_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NVCC", str(fake_nvcc(tmp_path, "sys.exit('unsupported host compiler')")))
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    with pytest.raises(BuildError, match="unsupported host compiler"):
        cuda_build.cached_cuda("80")
    assert not list((tmp_path / "cache").rglob("cuda.so"))


@pytest.mark.slow
def test_no_access_out_of_bounds(tmp_path: Path) -> None:
    """The kernels under AddressSanitizer, in a process of their own: all widths, all paths, ragged sizes."""
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout
    if not Path(runtime.strip()).is_absolute():
        pytest.skip("no AddressSanitizer beside g++")
    library = cudashim.compile_shim(tmp_path, ["-fsanitize=address"])
    script = Path(__file__).with_name("sanitized.py")
    environment = {"LD_PRELOAD": runtime.strip(), "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", str(script), str(library)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "ERROR: AddressSanitizer" not in done.stderr, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "done"
