from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moecompress.errors import RecipeError
from moecompress.recipe import load_recipe, recipe_data

Write = Callable[..., Path]
BASE = """model: base
calibration: {source: text, files: [a], samples: 4}
passes:
  - quantize.rtn: {bits: 3, scale: 2}
  - prune.score: {keep: 0.5}
output: {dir: o, format: dense}
"""


def data(path: Path | str, *settings: str) -> dict[str, Any]:
    return recipe_data(load_recipe(path, settings))


def refused(path: Path | str, *settings: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, settings)
    return str(caught.value)


def test_own_keys_replace_and_the_rest_stays(write: Write) -> None:
    write(BASE, "base.yaml")
    child = data(write("extends: base.yaml\nmodel: mine\npasses:\n- quantize.rtn: {bits: 8}\n"))
    assert child["model"] == "mine"
    assert child["passes"] == [{"quantize.rtn": {"bits": 8, "group_size": 128, "grid": "minmax", "scale": 1.0}}]
    assert child["output"]["dir"] == "o" and child["calibration"]["default"]["samples"] == 4


def test_output_and_calibration_merge_key_by_key(write: Write) -> None:
    write(BASE, "base.yaml")
    child = data(write("extends: base.yaml\noutput: {dir: p}\ncalibration: {length: 64}\n"))
    assert (child["output"]["dir"], child["output"]["format"]) == ("p", "dense")
    spec = child["calibration"]["default"]
    assert (spec["files"], spec["samples"], spec["length"]) == (["a"], 4, 64)


def test_a_new_source_replaces_the_old_one_whole(write: Write) -> None:
    write(BASE, "base.yaml")
    child = data(write("extends: base.yaml\ncalibration: {source: manifest, manifest: c4}\n"))
    assert child["calibration"]["default"]["samples"] == 128
    assert data(write("extends: base.yaml\ncalibration: null\n"))["calibration"] is None


def test_named_sets_are_added_one_by_one(write: Write) -> None:
    write(BASE.replace("calibration: {", "calibration:\n  one: {"), "base.yaml")
    child = data(write("extends: base.yaml\ncalibration:\n  two: {source: text, files: [b]}\n"))
    assert list(child["calibration"]) == ["one", "two"]


def test_paths_start_at_the_file_that_names_them(write: Write) -> None:
    write(BASE, "lib/deep/base.yaml")
    write("extends: deep/base.yaml\nseed: 3\n", "lib/middle.yaml")
    child = data(write("extends: lib/middle.yaml\n"))
    assert (child["model"], child["seed"]) == ("base", 3)


def test_a_problem_is_reported_where_it_was_written(write: Write) -> None:
    write(BASE.replace("bits: 3", "bitz: 3"), "lib/base.yaml")
    text = refused(write("extends: lib/base.yaml\nsede: 3\n"))
    assert "recipe.yaml:2: recipe: unknown key 'sede'; did you mean 'seed'?" in text
    assert "lib/base.yaml:4: passes[0].quantize.rtn: unknown key 'bitz'; did you mean 'bits'?" in text


def test_circles_are_refused(write: Write) -> None:
    write("extends: b.yaml\n", "a.yaml")
    write("extends: ./a.yaml\n", "b.yaml")
    assert "goes in a circle: a.yaml -> b.yaml -> a.yaml" in refused("a.yaml")
    assert "goes in a circle" in refused(write("extends: self.yaml\n", "self.yaml"))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("absent.yaml", "recipe.yaml:1: extends: 'absent.yaml' is neither a file nor a catalogue recipe"),
        ("[a, b]", "recipe.yaml:1: extends: ['a', 'b']: should be one file or catalogue name"),
        ("", "recipe.yaml:1: extends: None: should be one file"),
    ],
)
def test_bad_bases(write: Write, value: str, expected: str) -> None:
    assert expected in refused(write(f"extends: {value}\n"))


@pytest.mark.parametrize(
    ("setting", "path", "expected"),
    [
        ("model=other", ("model",), "other"),
        ("passes.0.quantize.rtn.bits=8", ("passes", 0, "quantize.rtn", "bits"), 8),
        ("passes[0].quantize.rtn.bits=[2, 3]", ("passes", 0, "quantize.rtn", "bits"), [2, 3]),
        ("passes.1.prune.score={keep: 0.25}", ("passes", 1, "prune.score", "keep"), 0.25),
        ("output.dir='x=y: z'", ("output", "dir"), "x=y: z"),
        ("evaluate.perplexity=[a, b]", ("evaluate", "perplexity"), ["a", "b"]),
        ("calibration.samples=9", ("calibration", "default", "samples"), 9),
        ("calibration=", ("calibration",), None),
        ("revision=null", ("revision",), None),
    ],
)
def test_set(write: Write, setting: str, path: tuple[str | int, ...], expected: Any) -> None:
    before: Any = data(write(BASE))
    changed: Any = data("recipe.yaml", setting)
    found = changed
    for step in path:
        found = found[step]
    assert found == expected
    for place in (before, changed):
        for step in path[:-1]:
            place = place[step]
        place.pop(path[-1])
    assert changed == before or path[-1] == "prune.score"


def test_a_pass_without_parameters_takes_settings(write: Write) -> None:
    found = data(write("model: m\npasses:\n- quantize.rtn:\n"), "passes.0.quantize.rtn.bits=2")
    assert found["passes"][0]["quantize.rtn"]["bits"] == 2


def test_later_settings_win(write: Write) -> None:
    assert data(write(BASE), "seed=1", "seed=2")["seed"] == 2


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("seed", "--set seed: no key and value. Allowed: KEY=VALUE"),
        ("=3", "--set =3: no key and value"),
        ("a..b=3", "--set a..b=3: no key and value"),
        ("sede=3", "--set sede: recipe: unknown key 'sede'; did you mean 'seed'?"),
        ("seed=x", "--set seed: seed: 'x': should be a valid integer"),
        ("passes.0.quantize.rtn.bitz=3", "--set passes.0.quantize.rtn.bitz: passes[0].quantize.rtn: unknown key"),
        ("passes.2.prune.score.keep=1", "passes has no item '2'. Allowed: an index from 0 to 1"),
        ("passes.x=1", "passes has no item 'x'"),
        ("passes.0.prune.score.keep=1", "passes[0] has no pass 'prune.score' (allowed: quantize.rtn)"),
        ("model.name=1", "model is 'base', it has no key 'name'"),
        ("model=[", "--set model:1: not valid YAML"),
        ("model=&a b", "--set model:1: anchor"),
    ],
)
def test_bad_settings(write: Write, setting: str, expected: str) -> None:
    assert expected in refused(write(BASE), setting)
