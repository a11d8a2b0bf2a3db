"""The CPU kernels as an optional extension: built where there is a C++ compiler, otherwise left to the first use."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

_FILE = Path(__file__).resolve().parent / "kernels" / "build.py"
_SPEC = importlib.util.spec_from_file_location("moecompress_kernels_build", _FILE)
assert _SPEC is not None and _SPEC.loader is not None
build = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(build)


class BuildLibrary(build_ext):
    """A plain shared library, loaded through ctypes: it needs neither Python's nor torch's headers."""

    def build_extension(self, ext: Extension) -> None:
        try:
            build.compile_cpu(Path(self.get_ext_fullpath(ext.name)))
        except build.BuildError as error:  # optional: setuptools turns this into a warning
            raise CompileError(f"CPU kernels are not built now: {error}") from error


setup(
    ext_modules=[Extension("moecompress_kernels._cpu", sources=[], optional=True)],
    cmdclass={"build_ext": BuildLibrary},
)
