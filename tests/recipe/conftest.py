"""Two small passes for recipes, so that these tests say nothing about the real ones."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Literal, Protocol

import pytest
from pydantic import BaseModel, ConfigDict, Field

from moecompress import registry


class Rtn(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: int | tuple[int, ...] = 4
    group_size: int = Field(128, ge=-1)
    grid: Literal["minmax", "mse"] = "minmax"
    scale: float = 1.0


class Prune(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    keep: float
    calibration: str = "default"


class Write(Protocol):
    def __call__(self, text: str, name: str = "recipe.yaml") -> Path: ...


@pytest.fixture(autouse=True)
def passes(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("recipe_test_passes")
    module.Rtn, module.Prune = Rtn, Prune  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "recipe_test_passes", module)
    known = [("quantize.rtn", "recipe_test_passes:Rtn"), ("prune.score", "recipe_test_passes:Prune")]
    monkeypatch.setattr(registry, "PASSES", registry.table(known))


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a file into the working directory, an empty folder; gives its relative path."""
    monkeypatch.chdir(tmp_path)

    def one(text: str, name: str = "recipe.yaml") -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return one
