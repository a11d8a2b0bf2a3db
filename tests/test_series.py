"""`sweep FILE`: which runs it stands for, what it refuses before any work, and that it goes on where it stopped."""

from __future__ import annotations

from pathlib import Path

import engine
import families
import pytest
import torch

import moecompress.series
from moecompress.errors import RecipeError
from moecompress.recipe import Recipe
from moecompress.series import read_series

BITS = "passes.0.quantize.rtn.bits"
GROUP = "passes.0.quantize.rtn.group_size"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    engine.reload_here(monkeypatch)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Four runs of rounding to nearest on a tiny model."""
    model = families.save_tiny("qwen3_moe", tmp_path / "model", torch.bfloat16)
    (tmp_path / "recipe.yaml").write_text(f"model: {model}\npasses:\n  - quantize.rtn: {{bits: 8}}\n")
    path = tmp_path / "sweep.yaml"
    path.write_text(
        f"recipe: recipe.yaml\nout: {tmp_path / 'out'}\nset:\n  output.format: native\n"
        f"vary:\n  {BITS}: [2, 4]\n  {GROUP}: [16, 32]\n"
    )
    return path


def test_every_combination_is_a_run_with_its_own_directory(file: Path) -> None:
    folder, members = read_series(file)
    assert [member.name for member in members] == [f"bits={b},group_size={g}" for b in (2, 4) for g in (16, 32)]
    for member, (bits, group) in zip(members, [(2, 16), (2, 32), (4, 16), (4, 32)], strict=True):
        step = member.recipe.passes[0].params
        assert (step.bits, step.group_size) == (bits, group)  # type: ignore[attr-defined]
        assert member.recipe.out == folder / member.name and member.recipe.output.format == "native"
    assert read_series(file, Path("elsewhere"))[1][0].recipe.out == Path("elsewhere/bits=2,group_size=16")


def test_runs_and_compares_and_goes_on(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    whole = moecompress.series.run

    def counted(recipe: Recipe, **keys: object) -> Path:
        done.append(recipe.out.name)
        if len(done) == 3:
            raise KeyboardInterrupt
        return whole(recipe, **keys)  # type: ignore[arg-type]

    monkeypatch.setattr(moecompress.series, "run", counted)
    with pytest.raises(KeyboardInterrupt):
        moecompress.series.run_series(file)
    done.clear()
    written = moecompress.series.run_series(file)
    assert done == ["bits=4,group_size=16", "bits=4,group_size=32"]  # the first two were there
    compared = engine.read_json(next(path for path in written if path.suffix == ".json"))
    sizes = [run["bytes"] for run in compared["runs"]]
    assert len(sizes) == 4 and sizes[0] > sizes[1] and sizes[2] > sizes[3] and sizes[2] > sizes[0]
    assert set(compared["recipes"]) == {key.replace("passes.0", "passes[0]") for key in (BITS, GROUP)}
    done.clear()
    assert engine.command("sweep", file).code == 0 and not done


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("recipe: a\nout: b\nvary: {seed: [1, 2]}\nvari: 1\n", "no key 'vari'"),
        ("recipe: a\nvary: {seed: [1, 2]}\n", "`out:` is missing"),
        ("recipe: rtn-w4\nout: b\n", "`vary:` is missing"),
        ("recipe: rtn-w4\nout: b\nvary: {passes.0.quantize.rtn.bits: 3}\n", "no list"),
        ("recipe: rtn-w4\nout: b\nvary: {passes.0.quantize.rtn.bits: [3]}\n", "1 runs"),
        (
            "recipe: rtn-w4\nout: b\nset: {model: m}\nvary: {passes.0.quantize.rtn.bits: [3, 3]}\n",
            "two runs would be called 'bits=3'",
        ),
        ("recipe: rtn-w4\nout: b\nset: {model: m}\nvary: {passes.0.quantize.rtn.bits: [3, 5]}\n", "rtn.bits"),
        ("recipe: rtn-w9\nout: b\nvary: {passes.0.quantize.rtn.bits: [3, 4]}\n", "rtn-w9"),
        ("- recipe\n", "a sweep is a mapping"),
    ],
)
def test_what_is_no_sweep_is_refused(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    done = engine.command("sweep", path)
    assert done.code == 2 and problem in done.err, done.err


def test_all_problems_of_all_runs_are_told_before_any_work(file: Path) -> None:
    file.write_text(file.read_text().replace("[16, 32]", "[32, 7, 5]"))
    done = engine.command("sweep", file)
    assert done.code == 2 and not (file.parent / "out").exists()
    for name in ("bits=2,group_size=7", "bits=4,group_size=5"):
        assert f"{name}: " in done.err, done.err
    assert "group_size=32: " not in done.err


def test_an_output_of_another_recipe_is_not_taken_for_a_run(file: Path) -> None:
    _, members = read_series(file)
    members[1].recipe.out.mkdir(parents=True)
    with pytest.raises(RecipeError, match=r"bits=2,group_size=32: .*made by another recipe"):
        moecompress.series.run_series(file)


def test_labels_tell_equal_ends_apart(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(
        "recipe: mc-2.5\nout: b\nset: {model: some/model}\n"
        "vary: {passes.0.allocate.pmq.tokens: [64, 128], passes.2.prune.odp.tokens: [64]}\n"
    )
    _, members = read_series(path)
    assert [member.name for member in members] == ["pmq.tokens=64,odp.tokens=64", "pmq.tokens=128,odp.tokens=64"]
