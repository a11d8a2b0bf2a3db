"""moecompress: post-training compression of Mixture-of-Experts language models (quantize, prune, merge).

Importing the package lets transformers load native checkpoints: `AutoModelForCausalLM.from_pretrained(dir)`. The
registration needs transformers, whose import takes seconds, so it waits until transformers' own table of quantizers
is imported (which every `from_pretrained` does); if that has already happened, it is done at once.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moecompress.plan import Plan
    from moecompress.recipe import Recipe

__version__ = "0.1.0"
__all__ = ["__version__", "load", "plan", "run"]
_TABLE = "transformers.quantizers.auto"
_FUNCTIONS = ("load", "plan", "run")


def run(recipe: Recipe | Path | str, **options: Any) -> Path:
    """Compress a model. recipe: a Recipe, or a path or catalogue name. Options and errors: `moecompress.run.run`."""
    from moecompress.run import run

    return run(_recipe(recipe), **options)


def plan(recipe: Recipe | Path | str, memory: int | None = None) -> Plan:
    """What `run` would do, without reading a tensor. memory: bytes it may use. Errors: `moecompress.plan.make_plan`."""
    from moecompress.plan import make_plan

    return make_plan(_recipe(recipe), memory)


def load(directory: Path | str, *, dequantize: bool = False, activation_bits: int | None = None, **options: Any) -> Any:
    """The model in `directory`, native weights packed unless `dequantize`. Options, errors: `moecompress.load.load`."""
    from moecompress.load import load

    return load(directory, dequantize=dequantize, activation_bits=activation_bits, **options)


def _recipe(recipe: Recipe | Path | str) -> Recipe:
    from moecompress.recipe import Recipe, load_recipe

    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe)


class _Package(ModuleType):
    """The import system sets a submodule as an attribute of its package; `run`, `plan`, `load` stay functions."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _FUNCTIONS and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


class _AfterTable(MetaPathFinder):
    """Imports our loader right after transformers' table of quantizers, once, then gets out of the way."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _TABLE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            import moecompress.load  # noqa: F401

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


sys.modules[__name__].__class__ = _Package
if _TABLE in sys.modules:
    import moecompress.load  # noqa: F401
else:
    sys.meta_path.insert(0, _AfterTable())
