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


def build_wheel(folder: Path, compiler: dict[str, str]) -> Path:
    """The wheel, built from a copy with the compilers that CC and CXX name, and no torch that could be imported."""
    source, hook, out = (folder / name for name in ("source", "hook", "wheel"))
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    hook.mkdir()
    out.mkdir()
    (hook / "sitecustomize.py").write_text(BLOCK_TORCH)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    environment = {**os.environ, "PYTHONPATH": str(hook), **compiler}
    built = subprocess.run(
        [*pip, "-w", str(out), str(source)], env=environment, cwd=out, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return next(out.glob("*.whl"))


def install(wheel: Path, target: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "-q"]
    subprocess.run([*pip, "--target", str(target), str(wheel)], cwd=wheel.parent, check=True, capture_output=True)
    return target


def kernels_say(site: Path, cwd: Path, **environment: str) -> str:
    """Which backends an installation has and why, asked in a process of its own."""
    code = (
        "from moecompress import ops; print([(n, ops.unavailable(n) or ops.backend(n).describe()) for n in ops.ORDER])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(site), **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


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
    environment = {**os.environ, "PYTHONPATH": str(target)}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert Path(run.stdout.strip()).is_relative_to(target)
    assert (target / "bin" / "moecompress").exists()


@pytest.mark.slow
def test_without_a_compiler_kernels_say_what_is_missing(wheel: Path, tmp_path: Path) -> None:
    site = install(wheel, tmp_path / "site")
    own = {"MOECOMPRESS_KERNEL_CACHE": str(tmp_path / "cache")}
    assert "/no/such/compiler, does not exist" in kernels_say(site, tmp_path, CXX="/no/such/compiler", **own)
    assert "/bin/false failed with 1" in kernels_say(site, tmp_path, CXX="/bin/false", **own)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no compiler")
def test_a_cache_that_cannot_be_written_is_said(wheel: Path, tmp_path: Path) -> None:
    site = install(wheel, tmp_path / "site")
    (tmp_path / "file").touch()  # a folder below a file: not even the superuser can make it
    said = kernels_say(site, tmp_path, MOECOMPRESS_KERNEL_CACHE=str(tmp_path / "file" / "cache"))
    assert "built for this process only" in said and "cannot be written" in said


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no compiler")
def test_with_a_compiler_the_library_is_installed(tmp_path: Path) -> None:
    made = build_wheel(tmp_path, {})
    with zipfile.ZipFile(made) as archive:
        assert any(Path(name).match("moecompress_kernels/_cpu*.so") for name in archive.namelist())
    site = install(made, tmp_path / "site")
    # no compiler any more, and a cache that does not exist: what was installed is used
    own = {"MOECOMPRESS_KERNEL_CACHE": str(tmp_path / "cache"), "CXX": "/no/such/compiler"}
    assert "built at installation" in kernels_say(site, tmp_path, **own)
    assert not (tmp_path / "cache").exists()
