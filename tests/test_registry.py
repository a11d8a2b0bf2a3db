from __future__ import annotations

import sys
import types

import pytest
from pydantic import BaseModel

from moecompress import registry
from moecompress.errors import RecipeError
from moecompress.passes.base import Pass


@pytest.mark.parametrize("name", registry.pass_names())
def test_every_registered_pass_is_what_its_line_says(name: str) -> None:
    found = registry.pass_class(name)
    assert (
        issubclass(found, Pass)
        and found.name == name
        and found.paper
        and (found.changes or name.startswith("allocate."))
    )
    assert found.model_config.get("frozen") and found.model_config.get("extra") == "forbid"


def test_a_name_given_twice_is_an_error() -> None:
    with pytest.raises(ValueError, match="'a.b' is registered twice: m:A and n:B"):
        registry.table([("a.b", "m:A"), ("c.d", "m:C"), ("a.b", "n:B")])


def test_the_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        registry.PASSES["x.y"] = "m:X"  # type: ignore[index]


def test_an_unknown_name_gets_a_suggestion_and_the_whole_list() -> None:
    with pytest.raises(RecipeError, match=r"unknown pass 'quantise.rtn'; did you mean 'quantize.rtn'\?") as caught:
        registry.pass_class("quantise.rtn")
    assert f"(allowed: {', '.join(registry.pass_names())})" in str(caught.value)


def test_a_module_is_imported_only_when_its_pass_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("registry_test_pass")
    module.Fine = type("Fine", (BaseModel,), {})  # type: ignore[attr-defined]
    module.Wrong = dict  # type: ignore[attr-defined]
    lines = [
        ("a.fine", "registry_test_pass:Fine"),
        ("a.wrong", "registry_test_pass:Wrong"),
        ("a.gone", "no_such_module:X"),
    ]
    monkeypatch.setattr(registry, "PASSES", registry.table(lines))
    assert registry.pass_names() == ("a.fine", "a.gone", "a.wrong")
    monkeypatch.setitem(sys.modules, "registry_test_pass", module)
    assert registry.pass_class("a.fine") is module.Fine
    with pytest.raises(TypeError, match="'a.wrong': registry_test_pass:Wrong is not a pydantic model"):
        registry.pass_class("a.wrong")
    with pytest.raises(ModuleNotFoundError):
        registry.pass_class("a.gone")
