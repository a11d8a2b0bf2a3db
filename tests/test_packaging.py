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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy, with no compiler in reach and no torch that could be imported."""
    source = tmp_path_factory.mktemp("source")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    hook = tmp_path_factory.mktemp("hook")
    (hook / "sitecustomize.py").write_text(BLOCK_TORCH)
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    environment = {**os.environ, "PYTHONPATH": str(hook), "CC": "/bin/false", "CXX": "/bin/false"}
    built = subprocess.run(
        [*pip, "-w", str(out), str(source)], env=environment, cwd=out, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return next(out.glob("*.whl"))


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
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "-q"]
    target = tmp_path / "site"
    subprocess.run([*pip, "--target", str(target), str(wheel)], cwd=tmp_path, check=True, capture_output=True)
    code = f"import {', '.join(FOLDERS.values())}; print(moecompress.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(target)}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert Path(run.stdout.strip()).is_relative_to(target)
    assert (target / "bin" / "moecompress").exists()
