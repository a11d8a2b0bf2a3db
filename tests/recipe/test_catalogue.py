"""The shipped recipes and the schema, with the real passes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moecompress import registry
from moecompress.recipe import catalogue, load_recipe, schema

Write = Callable[..., Path]
REAL = dict(registry.PASSES)


@pytest.fixture
def real_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "PASSES", registry.table(REAL.items()))


@pytest.mark.usefixtures("real_passes")
@pytest.mark.parametrize("name", sorted(catalogue()))
def test_every_shipped_recipe_loads(name: str) -> None:
    recipe = load_recipe(name, ["model=some/model"])
    assert recipe.passes and all(step.where.startswith("recipes/") for step in recipe.passes)
    assert len(catalogue()[name]) > 20, "the first line of a shipped recipe says what it is for"


@pytest.mark.usefixtures("real_passes")
def test_a_shipped_recipe_is_found_before_a_file_of_that_name(write: Write) -> None:
    write("model: trap\n", "rtn-w4")
    recipe = load_recipe(write("extends: rtn-w4\nmodel: mine\n"))
    assert recipe.model == "mine" and recipe.passes[0].where == "recipes/rtn-w4.yaml:3"


def find(document: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """Follow a $ref inside the document."""
    if "$ref" not in part:
        return part
    return dict(document["$defs"][part["$ref"].removeprefix("#/$defs/")])


def test_the_schema_knows_every_pass_with_its_keys() -> None:
    document = json.loads(json.dumps(schema()))
    steps = document["properties"]["passes"]["items"]["oneOf"]
    keys = {}
    for step in steps:
        ((name, body),) = step["properties"].items()
        assert step["required"] == [name] and step["additionalProperties"] is False
        keys[name] = set(find(document, body["anyOf"][0])["properties"])
    assert keys == {"quantize.rtn": {"bits", "group_size", "grid", "scale"}, "prune.score": {"keep", "calibration"}}


def test_the_schema_refuses_unknown_keys_and_knows_the_sections() -> None:
    document = schema()
    assert document["additionalProperties"] is False
    assert set(document["properties"]) == {
        *("model", "revision", "trust_remote_code", "seed", "extends"),
        *("calibration", "passes", "output", "evaluate"),
    }
    sources = document["properties"]["calibration"]["anyOf"][0]["anyOf"]
    required = [set(find(document, source)["required"]) for source in sources]
    assert {"source", "manifest"} in required and {"source", "files"} in required


def test_every_reference_of_the_schema_exists() -> None:
    text = json.dumps(schema())
    names = {part.split('"')[0] for part in text.split('"#/$defs/')[1:]}
    assert names and names <= schema()["$defs"].keys()
