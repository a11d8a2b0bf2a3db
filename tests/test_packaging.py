"""What a user gets from `pip install`: every module and data file, without a compiler and without torch to build."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Folder in the repository -> import name
FOLDERS = {
    "moecompress": "moecompress",
    "kernels": "moecompress_kernels",
    "recipes": "moecompress_recipes",
    "calibration": "moecompress_calibration",
}
BLOCK_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "numpy", "transformers"):
            raise ImportError(f"the build imports {name}")
sys.meta_path.insert(0, Refuse())
"""


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def files_to_ship() -> Iterator[str]:
    """Path inside the wheel of every module and data file in the four folders."""
    for folder, name in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*")):
            inside = path.relative_to(ROOT / folder)
            if path.is_file() and "__pycache__" not in inside.parts and path.suffix not in (".pyc", ".so"):
                yield f"{name}/{inside.as_posix()}"


def run(command: list[str], cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command, env={**os.environ, **environment}, cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copied_source(folder: Path) -> Path:
    source = folder / "source"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    return source


def build_wheel(folder: Path, compiler: dict[str, str]) -> Path:
    """The wheel, built from a copy with the compilers that CC and CXX name, and no torch that could be imported: what
    pip's isolated build has, too, is setuptools alone."""
    source, hook, out = copied_source(folder), folder / "hook", folder / "wheel"
    hook.mkdir()
    out.mkdir()
    (hook / "sitecustomize.py").write_text(BLOCK_TORCH)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    run([*pip, "-w", str(out), str(source)], out, PYTHONPATH=str(hook), **compiler)
    return next(out.glob("*.whl"))


@pytest.fixture
def quick_compiler(tmp_path: Path) -> dict[str, str]:
    """The compiler, but without the optimisation that takes most of its time."""
    if shutil.which("c++") is None:
        pytest.skip("there is no compiler")
    script = tmp_path / "quick-c++"
    script.write_text('#!/bin/sh\nexec c++ "$@" -O0\n')
    script.chmod(0o755)
    return {"CXX": str(script)}


def install(wheel: Path, target: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "-q"]
    subprocess.run([*pip, "--target", str(target), str(wheel)], cwd=wheel.parent, check=True, capture_output=True)
    return target


def doctor_says(site: Path, cwd: Path, **environment: str) -> str:
    """What `moecompress doctor` of an installation says of the CPU kernels."""
    said = run([sys.executable, "-m", "moecompress", "doctor"], cwd, PYTHONPATH=str(site), **environment)
    return next(line for line in said.splitlines() if line.startswith("kernels   cpu"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel made where no compiler is in reach."""
    return build_wheel(tmp_path_factory.mktemp("plain"), {"CC": "/bin/false", "CXX": "/bin/false"})


def test_every_package_folder_is_listed() -> None:
    found = {
        ".".join((name, *path.parent.relative_to(ROOT / folder).parts))
        for folder, name in FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    assert found == set(project()["tool"]["setuptools"]["packages"])


def test_locked_versions_satisfy_the_project() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    locked = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines}
    extras = project()["project"]["optional-dependencies"]
    for text in (*project()["project"]["dependencies"], *extras["eval"], *extras["test"]):
        wanted = Requirement(text)
        assert wanted.specifier.contains(locked[canonicalize_name(wanted.name)]), text


@pytest.mark.slow
def test_wheel_holds_every_file_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    shipped = {name for name in names if ".dist-info/" not in name}
    assert shipped == set(files_to_ship())
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_installed_wheel_imports_from_anywhere(wheel: Path, tmp_path: Path) -> None:
    target = install(wheel, tmp_path / "site")
    code = f"import {', '.join(FOLDERS.values())}; print(moecompress.__file__)"
    said = run([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(target))
    assert Path(said.strip()).is_relative_to(target)
    assert (target / "bin" / "moecompress").exists()


@pytest.mark.slow
def test_without_a_compiler_kernels_say_what_is_missing(wheel: Path, tmp_path: Path) -> None:
    site = install(wheel, tmp_path / "site")
    own = {"MOECOMPRESS_KERNEL_CACHE": str(tmp_path / "cache")}
    for compiler, reason in (("/no/such/compiler", "does not exist"), ("/bin/false", "failed with 1")):
        said = doctor_says(site, tmp_path, CXX=compiler, **own)
        assert "not available" in said and compiler in said and reason in said


@pytest.mark.slow
def test_a_compiler_at_the_first_use_fills_the_cache(
    wheel: Path, tmp_path: Path, quick_compiler: dict[str, str]
) -> None:
    site, cache = install(wheel, tmp_path / "site"), tmp_path / "cache"
    own = {"MOECOMPRESS_KERNEL_CACHE": str(cache), **quick_compiler}
    assert f"built into the cache {cache}" in doctor_says(site, tmp_path, **own)
    assert f"from the cache {cache}" in doctor_says(site, tmp_path, **own)


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_is_said(wheel: Path, tmp_path: Path, quick_compiler: dict[str, str]) -> None:
    site, temporary = install(wheel, tmp_path / "site"), tmp_path / "temporary"
    (tmp_path / "file").touch()  # a folder below a file: not even the superuser can make it
    temporary.mkdir()
    own = {"MOECOMPRESS_KERNEL_CACHE": str(tmp_path / "file" / "cache"), "TMPDIR": str(temporary)}
    said = doctor_says(site, tmp_path, **own, **quick_compiler)
    assert "available" in said and "built for this process only" in said and "cannot be written" in said
    assert not list(temporary.glob("moecompress-*"))  # and gone with the process


@pytest.mark.slow
def test_with_a_compiler_the_library_is_installed(tmp_path: Path, quick_compiler: dict[str, str]) -> None:
    made = build_wheel(tmp_path, quick_compiler)
    with zipfile.ZipFile(made) as archive:
        assert any(Path(name).match("moecompress_kernels/_cpu*.so") for name in archive.namelist())
    site = install(made, tmp_path / "site")
    # no compiler any more, and a cache that does not exist: what was installed is used
    own = {"MOECOMPRESS_KERNEL_CACHE": str(tmp_path / "cache"), "CXX": "/no/such/compiler"}
    assert "built at installation" in doctor_says(site, tmp_path, **own)
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_an_editable_installation_runs_from_the_source(tmp_path: Path, quick_compiler: dict[str, str]) -> None:
    """In an environment of its own that finds the libraries of this one."""
    source, place = copied_source(tmp_path), tmp_path / "venv"
    run([sys.executable, "-m", "venv", "--without-pip", str(place)], tmp_path)
    python, paths = place / "bin" / "python", [path for path in sys.path if path.endswith("site-packages")]
    (next((place / "lib").glob("python3*")) / "site-packages" / "zz.pth").write_text("\n".join(paths))
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-build-isolation"]
    run([*pip, "--no-index", "-q", "-e", str(source)], tmp_path, **quick_compiler)
    said = run([str(place / "bin" / "moecompress"), "doctor"], tmp_path, CXX="/no/such/compiler")
    assert "built at installation" in said
    code = "import moecompress_kernels, os; print(os.path.realpath(moecompress_kernels.build.__file__))"
    found = run([str(python), "-c", "import moecompress_kernels.build;" + code], tmp_path)
    assert Path(found.strip()).is_relative_to(source)
