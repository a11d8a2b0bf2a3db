from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from moecompress.errors import RecipeError
from moecompress.recipe import load_recipe, recipe_data, resolved_yaml

Write = Callable[..., Path]
ONE = "model: m\npasses:\n  - quantize.rtn: {bits: 3}\n"


def problems(path: Path | str, *settings: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, settings)
    return str(caught.value).splitlines()


def test_model_and_one_pass_is_a_recipe(write: Write) -> None:
    recipe = load_recipe(write("model: org/name\npasses:\n  - quantize.rtn:\n"))
    assert (recipe.model, recipe.revision, recipe.trust_remote_code, recipe.seed) == ("org/name", None, False, 0)
    (step,) = recipe.passes
    assert (step.name, step.where, step.line) == ("quantize.rtn", "recipe.yaml:3", 3)
    assert step.params.model_dump() == {"bits": 4, "group_size": 128, "grid": "minmax", "scale": 1.0}
    assert recipe.calibration == {} and recipe.out == Path("out/name")
    assert (recipe.output.format, recipe.output.shard_bytes) == ("auto", 4 * 1024**3)
    assert (recipe.evaluate.perplexity, recipe.evaluate.length, recipe.evaluate.windows) == ((), 512, 40)


def test_the_output_directory_is_named_after_a_model_directory(write: Write) -> None:
    assert load_recipe(write(ONE.replace("model: m", "model: models/tiny/"))).out == Path("out/tiny")


def test_a_recipe_cannot_be_changed(write: Write) -> None:
    recipe = load_recipe(write(ONE))
    for changing in (recipe, recipe.output, recipe.passes[0], recipe.passes[0].params):
        with pytest.raises(ValidationError):
            changing.seed = 1  # type: ignore[union-attr]


FULL = """
model: org/name
revision: "1234567"
seed: 7
calibration:
  default: {source: text, files: [a.txt, b.txt], samples: 8, heldout: 0}
  chat: {source: jsonl, files: [c.jsonl], field: "{q} {a}"}
  hub: {source: datasets, name: org/set, config: en, revision: abc}
  shipped: {source: manifest, manifest: c4}
  ready: {source: tokens, files: [t.safetensors], length: 64}
passes:
  - prune.score: {keep: 0.5, calibration: chat}
  - quantize.rtn: {bits: [2, 3], scale: 2}
output: {dir: o, format: native, shard_size: 1.5GB}
evaluate: {perplexity: [held.txt], limit: 9}
"""


def test_every_section_is_read(write: Write) -> None:
    recipe = load_recipe(write(FULL))
    assert recipe.revision == "1234567" and recipe.seed == 7
    assert list(recipe.calibration) == ["default", "chat", "hub", "shipped", "ready"]
    chat, hub = recipe.calibration["chat"], recipe.calibration["hub"]
    assert (chat.files, chat.field, chat.samples, chat.heldout) == (("c.jsonl",), "{q} {a}", 128, 0.125)
    assert (hub.name, hub.config, hub.split, hub.revision, hub.files) == ("org/set", "en", "train", "abc", None)
    assert recipe.passes[1].params.model_dump()["bits"] == (2, 3)
    assert recipe.output.shard_bytes == 1_500_000_000


@pytest.mark.parametrize("text", [ONE, FULL])
def test_the_resolved_recipe_is_the_same_recipe(write: Write, text: str) -> None:
    recipe = load_recipe(write(text))
    resolved = resolved_yaml(recipe)
    again = load_recipe(write(resolved, "again.yaml"))
    assert recipe_data(again) == recipe_data(recipe)
    assert resolved_yaml(again) == resolved == resolved_yaml(load_recipe("recipe.yaml"))
    assert "heldout: 0.125" in resolved or recipe.calibration == {}


def test_one_calibration_set_is_the_default_one(write: Write) -> None:
    recipe = load_recipe(write(ONE + "calibration: {source: text, files: [a]}"))
    assert list(recipe.calibration) == ["default"] and recipe.calibration["default"].files == ("a",)


def test_all_problems_come_at_once_with_their_lines_and_a_way_out(write: Write) -> None:
    text = """model: 12
pases: []
calibration: {source: text, fils: [a], length: 1}
passes:
  - quantize.rtn: {bits: four, grup_size: 3, grid: msee}
  - quantize.rtm: {}
  - quantize.rtn:
      group_size: true
    extra: 1
  - quantize.rtn
  - prune.score: {calibration: other}
output: {format: portabel, shard_size: 4, dri: 1}
evaluate: {tasks: piqa, windows: 0}
seed: -1
"""
    head = "calibration, evaluate, extends, model, output, passes, revision, seed, trust_remote_code"
    one = "each item is one `name: parameters`, for example `- quantize.rtn: {bits: 4}`"
    assert problems(write(text)) == [
        "recipe.yaml:1: model: 12: should be a valid string (put it in quotes)",
        f"recipe.yaml:2: recipe: unknown key 'pases'; did you mean 'passes'? (allowed: {head})",
        "recipe.yaml:3: calibration: missing key 'files'; unknown key 'fils'; did you mean 'files'? "
        "(allowed: balance, files, heldout, length, samples, seed, source)",
        "recipe.yaml:3: calibration.length: 1: should be greater than or equal to 2",
        "recipe.yaml:5: passes[0].quantize.rtn.bits: 'four': should be a valid integer; 'four': should be a list",
        "recipe.yaml:5: passes[0].quantize.rtn.grid: 'msee' is not a choice here; did you mean 'mse'? "
        "(allowed: minmax, mse)",
        "recipe.yaml:5: passes[0].quantize.rtn: unknown key 'grup_size'; did you mean 'group_size'? "
        "(allowed: bits, grid, group_size, scale)",
        "recipe.yaml:6: passes[1]: unknown pass 'quantize.rtm'; did you mean 'quantize.rtn'? "
        "(allowed: prune.score, quantize.rtn)",
        f"recipe.yaml:7: passes[2]: 2 keys; {one}",
        f"recipe.yaml:10: passes[3]: 'quantize.rtn'; {one}",
        "recipe.yaml:11: passes[4].prune.score: missing key 'keep'",
        "recipe.yaml:11: passes[4].prune.score.calibration: 'other' is no calibration set (allowed: default)",
        "recipe.yaml:12: output.format: 'portabel' is not a choice here; did you mean 'portable'? "
        "(allowed: auto, dense, native, portable)",
        "recipe.yaml:12: output.shard_size: 4: should be a valid string (put it in quotes)",
        "recipe.yaml:12: output: unknown key 'dri'; did you mean 'dir'? (allowed: dir, format, shard_size)",
        "recipe.yaml:13: evaluate.tasks: 'piqa': should be a list",
        "recipe.yaml:13: evaluate.windows: 0: should be greater than or equal to 1",
        "recipe.yaml:14: seed: -1: should be greater than or equal to 0",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a", "recipe.yaml:1: a recipe is a mapping"),
        ("passes:\n  - quantize.rtn: {}", "recipe.yaml:1: recipe: missing key 'model' (a directory or a hub id"),
        ("model: ''\npasses:\n  - quantize.rtn: {}", "recipe.yaml:1: model: ''"),
        ("model: m", "recipe.yaml:1: passes: missing or empty; give at least one pass"),
        ("model: m\npasses: []", "recipe.yaml:2: passes: missing or empty"),
        ("model: m\npasses: {quantize.rtn: {}}", "recipe.yaml:2: passes: should be a list"),
        ("model: m\npasses:\n- quantize.rtn: 4", "recipe.yaml:3: passes[0].quantize.rtn: 4: should be a mapping"),
        (ONE + "output: here", "recipe.yaml:4: output: 'here': should be a mapping"),
        (ONE + "calibration: {}", "recipe.yaml:4: calibration: missing key 'source' (allowed: answers, datasets"),
        (ONE + "calibration: {source: ebss, tau: 0}", "calibration.tau: 0: should be greater than 0"),
        (ONE + "calibration: {source: answers}", "recipe.yaml:4: calibration: missing key 'files'"),
        (ONE + "calibration: {source: txt}", "calibration.source: no source 'txt'; did you mean 'text'?"),
        (ONE + "calibration: {source: [text]}", "calibration.source: no source '['text']'"),
        (ONE + "calibration: {source: text, files: []}", "calibration.files: []"),
        (ONE + "calibration: {source: tokens, files: [a, b]}", "calibration.files: ['a', 'b']"),
        (ONE + "calibration: {source: text, files: [a], name: x}", "unknown key 'name'"),
        (ONE + "calibration: {source: text, files: [a], heldout: 1}", "calibration.heldout: 1: should be less than 1"),
        (ONE + "calibration: {a: {source: text}}", "recipe.yaml:4: calibration.a: missing key 'files'"),
        (ONE + "trust_remote_code: 1", "trust_remote_code: 1: should be a valid boolean"),
        (ONE + "seed: '1'", "seed: '1': should be a valid integer"),
        (ONE + "seed: 1.0", "recipe.yaml:4: seed: 1.0: should be a valid integer"),
        (ONE + "output: {shard_size: 4 GiBs}", "'4 GiBs' is not a size; write a number and a unit (B, KB"),
    ],
)
def test_refused(write: Write, text: str, expected: str) -> None:
    (line,) = problems(write(text))
    assert expected in line


def test_a_list_item_of_a_union_is_named_by_its_own_place(write: Write) -> None:
    lines = problems(write("model: m\npasses:\n- quantize.rtn:\n    bits:\n    - 2\n    - x\n"))
    assert lines == [
        "recipe.yaml:4: passes[0].quantize.rtn.bits: [2, 'x']: should be a valid integer",
        "recipe.yaml:6: passes[0].quantize.rtn.bits[1]: 'x': should be a valid integer",
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("absent.yaml", "'absent.yaml' is neither a file nor a catalogue recipe"),
        ("quikstart", "did you mean 'quickstart'?"),
        (".", "'.' is a directory"),
        ("latin.yaml", "'latin.yaml' is not UTF-8 text (byte 7)"),
    ],
)
def test_unreadable_files(write: Write, name: str, expected: str) -> None:
    write("").with_name("latin.yaml").write_bytes("model: \xe9".encode("latin-1"))
    assert expected in problems(name)[0]


def test_a_byte_order_mark_is_no_part_of_the_recipe(write: Write) -> None:
    assert load_recipe(write("\ufeff" + ONE)).model == "m"
