from __future__ import annotations

import math
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from moecompress.errors import RecipeError
from moecompress.recipe.yamlmap import MAX_BYTES, MAX_DEPTH, Node, dump, format_path, parse

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=12)
SCALAR = (
    st.none()
    | st.booleans()
    | st.integers(-(10**15), 10**15)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT
    | st.sampled_from(["yes", "no", "on", "1e3", "0x1F", "010", "1:30", "2026-01-01", "~", "null", "<<", "=", "1_0"])
)
DATA = st.dictionaries(
    TEXT, st.recursive(SCALAR, lambda d: st.lists(d, max_size=3) | st.dictionaries(TEXT, d, max_size=3), max_leaves=8)
)


def refused(text: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        parse(text, "r.yaml")
    return str(caught.value).splitlines()


@given(DATA)
def test_what_is_dumped_is_read_back(data: dict[str, Any]) -> None:
    assert parse(dump(data), "r.yaml").plain() == data


@given(DATA)
def test_a_dump_means_the_same_to_a_stock_yaml_reader(data: dict[str, Any]) -> None:
    assert yaml.safe_load(dump(data)) == data


def test_the_surprises_of_yaml_1_1_are_plain_text_or_plain_numbers() -> None:
    text = "[no, on, 1:30, 010, 0x1F, 2026-01-01, .inf, 1_000, 1e-3, 5., .5, +3, -0, ~, true]"
    node = parse(text, "r.yaml")
    words = ["no", "on", "1:30", "010", "0x1F", "2026-01-01", ".inf", "1_000"]
    assert node.plain() == [*words, 0.001, 5.0, 0.5, 3, 0, None, True]


def test_every_value_knows_the_line_of_its_key() -> None:
    node = parse("a: 1\nb:\n  - x: 2\n    y:\n      z: 3\n  - 4\n", "r.yaml")
    places = {}

    def walk(part: Node, path: tuple[str | int, ...]) -> None:
        places[format_path(path)] = part.where
        if isinstance(part.value, dict):
            for key, child in part.value.items():
                walk(child, (*path, key))
        if isinstance(part.value, list):
            for index, child in enumerate(part.value):
                walk(child, (*path, index))

    walk(node, ())
    lines = {"": 1, "a": 1, "b": 2, "b[0]": 3, "b[0].x": 3, "b[0].y": 4, "b[0].y.z": 5, "b[1]": 6}
    assert places == {path: f"r.yaml:{line}" for path, line in lines.items()}


def test_paths_are_written_as_in_messages() -> None:
    assert format_path(("passes", 2, "quantize.rtn", "bits", 0)) == "passes[2].quantize.rtn.bits[0]"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: !!python/object/apply:os.system [x]", "r.yaml:1: tag 'tag:yaml.org,2002:python/object/apply:os.system'"),
        ("a: !!str 5", "r.yaml:1: tag 'tag:yaml.org,2002:str'"),
        ("a: !env HOME", "r.yaml:1: tag '!env'"),
        ("a: &x 1\nb: *x", "r.yaml:1: anchor '&x'"),
        ("a: 1\nb: 2\na: 3", "r.yaml:3: a: written twice (first at r.yaml:1)"),
        ("a: {b: {c: 1, c: 2}}", "r.yaml:1: a.b.c: written twice"),
        ("1: x", "r.yaml:1: recipe: key 1 is not text"),
        ("a:\n  [x]: 1", "r.yaml:2: a: key a list or mapping is not text"),
        ("a: 1\n---\nb: 2", "r.yaml:2: a second document"),
        ("a: [1, 2", "r.yaml:1: not valid YAML at column 9"),
        ("a: 1\n  b: 2", "r.yaml:2: not valid YAML at column 4"),
        ("a: 'x", "not valid YAML"),
        ("\ta: 1", "not valid YAML"),
        ("a: \x00", "r.yaml: not readable as YAML"),
        ("", "r.yaml: the file is empty"),
        ("# nothing\n", "r.yaml: the file is empty"),
        ("a: 1e999", "r.yaml:1: a: number out of range"),
        ("a: " + "9" * 5000, "r.yaml:1: a: number out of range"),
        ("a: " + "[" * (MAX_DEPTH + 1), "nested deeper"),
        ("a: " + "[" * 100_000, "nested deeper"),
        ("#" * (MAX_BYTES + 1), "characters. Allowed: at most"),
    ],
)
def test_refused(text: str, expected: str) -> None:
    lines = refused(text)
    assert expected in lines[0]
    assert all(len(line) < 300 for line in lines)


def test_an_exploding_file_is_refused_line_by_line() -> None:
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    lines = refused("\n".join(rows))
    assert len(lines) == 9 + 8 * 9  # one per anchor, one per alias
    assert lines[0].startswith("r.yaml:1: anchor '&a0'") and "extends" in lines[0]
    assert lines[-1].startswith("r.yaml:9: alias '*a7'")


def test_all_duplicates_are_named_at_once() -> None:
    assert len(refused("a: 1\na: 2\nb: {c: 1, c: 1}\n3: 4")) == 3


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_survive_exactly(value: float) -> None:
    back = parse(dump({"v": value}), "r.yaml").plain()["v"]
    assert isinstance(back, float) and math.copysign(1, back) == math.copysign(1, value) and back == value
