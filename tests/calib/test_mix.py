"""`mix`: shares, interleaving, masks and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engine
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from moecompress.calib import build_token_set
from moecompress.calib.mix import apportion, part_specs
from moecompress.calib.workshop import Workshop
from moecompress.errors import CalibrationError, RecipeError
from moecompress.fingerprint import fingerprint
from moecompress.recipe import load_recipe, recipe_data
from moecompress.stream.model import open_model

DEMO = Path(__file__).resolve().parents[1] / "checkpoints" / "bench-a"


@given(st.lists(st.floats(0.01, 9), min_size=1, max_size=5), st.integers(1, 200))
def test_rows_are_apportioned_by_largest_remainder(shares: list[float], total: int) -> None:
    counts = apportion(shares, total)
    assert sum(counts) == total
    assert all(abs(count - total * share / sum(shares)) < 1 for count, share in zip(counts, shares, strict=True))


def test_shares_are_weights_and_ties_go_to_the_first() -> None:
    assert apportion([1, 1], 3) == [2, 1] and apportion([3, 1], 128) == [96, 32]


def recipe_of(folder: Path, **changes: Any) -> Path:
    first, second = folder / "first.safetensors", folder / "second.safetensors"
    save_file({"ids": torch.full((20, 12), 3)}, first)
    save_file({"ids": torch.full((20, 12), 4)}, second)
    parts = [
        {"source": "tokens", "files": [str(first)], "share": 0.75},
        {"source": "tokens", "files": [str(second)], "share": 0.25},
    ]
    calibration = {"source": "mix", "samples": 16, "length": 12, "parts": parts, **changes}
    return engine.write_recipe(folder, DEMO, calibration=calibration)


def build(path: Path, folder: Path) -> Any:
    spec: Any = load_recipe(path).calibration["default"]
    from moecompress.calib import load_tokenizer

    workshop = Workshop(open_model(DEMO), folder / "scratch", folder / "kept")
    return build_token_set("m", spec, load_tokenizer(DEMO), vocab_size=4096, cache_dir=folder, workshop=workshop)


def test_each_part_is_spread_over_the_set(tmp_path: Path) -> None:
    made = build(recipe_of(tmp_path), tmp_path)
    kinds = made.ids[:, 0].tolist()
    assert kinds.count(3) == 12 and kinds.count(4) == 4
    for start in range(0, 16, 4):
        assert kinds[start : start + 4].count(4) == 1
    assert [part["rows"] for part in made.origin["parts"]] == [12, 4] and len(made.heldout) == 2


def test_self_sampled_text_and_answers_can_be_parts(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("<|endoftext|>\n".join(f"It was {i}\n" for i in range(20)))
    (tmp_path / "text.txt").write_text("def f(x):\n    return x\n" * 200)
    parts = [
        {"source": "ebss", "share": 1, "batch": 2},
        {"source": "answers", "share": 1, "files": [str(prompts)], "select": "reply", "max_tokens": 16},
        {"source": "text", "share": 2, "files": [str(tmp_path / "text.txt")]},
    ]
    path = recipe_of(tmp_path, parts=parts, samples=8)
    made = build(path, tmp_path)
    assert [part["source"] for part in made.origin["parts"]] == ["ebss", "answers", "text"]
    assert made.ids.shape == (8, 12) and made.selected is not None
    whole = made.selected.all(-1)
    assert int(whole.sum()) >= 6 and not bool(whole.all())  # only the answers are masked
    assert "generating: experts" in engine.command("plan", path, "--json").out
    told = engine.command("plan", recipe_of(tmp_path, parts=[*parts[:2], {**parts[2], "files": ["no.txt"]}]))
    assert told.code == 2 and "no.txt does not exist" in told.err + told.out


def test_a_resolved_recipe_gives_the_same_mixture_and_files_count_as_inputs(tmp_path: Path) -> None:
    recipe = load_recipe(recipe_of(tmp_path))
    data = recipe_data(recipe)["calibration"]["default"]
    assert data["parts"][0]["share"] == 0.75 and "samples" not in data["parts"][0]
    again = load_recipe(recipe_of(tmp_path, **data))
    assert part_specs(again.calibration["default"]) == part_specs(recipe.calibration["default"])  # type: ignore[arg-type]
    assert len(fingerprint(recipe, DEMO)["calibration"]) == 2


def test_what_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")

    def text(**keys: Any) -> dict[str, Any]:
        return {"source": "text", "files": [str(tmp_path / "a.txt")], "share": 1, **keys}

    with pytest.raises(RecipeError, match="calibration.parts"):
        load_recipe(recipe_of(tmp_path, parts=[text()]))
    with pytest.raises(RecipeError, match="share"):
        load_recipe(recipe_of(tmp_path, parts=[text(share=0), text()]))
    with pytest.raises(RecipeError, match="samples"):
        load_recipe(recipe_of(tmp_path, parts=[text(samples=3), text()]))
    with pytest.raises(RecipeError, match="parts"):
        load_recipe(recipe_of(tmp_path, parts=[{"source": "mix", "share": 1}, text()]))
    files = recipe_of(tmp_path)
    parts = [dict(part) for part in recipe_data(load_recipe(files))["calibration"]["default"]["parts"]]
    parts[1]["share"] = 0.0001
    with pytest.raises(CalibrationError, match=r"part 2 \(tokens\).*of 16 rows is none"):
        build(recipe_of(tmp_path, parts=parts), tmp_path)
