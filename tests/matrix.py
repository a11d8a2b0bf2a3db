"""Every registered pass on every supported family: run, reload, generate; or the plan refuses and says why.

`scripts/matrix.py` runs all of it and writes `tests/matrix.json` and the table in the README; the tests run a part that
covers every pass and every family, and compare.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import engine
import families
import torch

from moecompress import load, registry
from moecompress.errors import RecipeError
from moecompress.plan import make_plan
from moecompress.recipe import load_recipe
from moecompress.run import run

KEPT = Path(__file__).resolve().parent / "matrix.json"
README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- matrix: scripts/matrix.py writes this -->", "<!-- end of the matrix -->"

FAMILIES = engine.STREAMED
IDS = engine.random_ids(4, 24)
# What a pass is given when it has a parameter of that name: what it must be told, and sizes that suit tiny models.
VALUES: Mapping[str, Any] = {"group_size": 16, "block": 16, "keep": 0.75, "budget": "3 bits"}
QUICK: Mapping[str, Mapping[str, Any]] = {"quantize.learned": {"steps": 4}, "smooth.awq": {"ratios": 4}}
FOLLOWER = {"quantize.rtn": {"bits": 4, "group_size": 16}}


def steps_of(name: str) -> list[dict[str, Any]]:
    """The recipe's passes that try `name`: it alone, and a quantizer after what only prepares for one."""
    fields = registry.pass_class(name).model_fields
    step = {name: {key: value for key, value in VALUES.items() if key in fields} | dict(QUICK.get(name, {}))}
    if name.startswith(("quantize.", "prune.", "merge.")):
        return [step]
    width = {"group_size": 16} if name.startswith("allocate.") else FOLLOWER["quantize.rtn"]
    return [step, {"quantize.rtn": dict(width)}]


@dataclass(frozen=True)
class Outcome:
    """refused: the plan's reasons; None when the output was loaded and generated, or, for a plan alone, accepted."""

    refused: str | None


def source(family: str, folder: Path) -> Path:
    """The tiny checkpoint of a family in `folder`, made when it is not there."""
    path = folder / family
    return path if path.is_dir() else families.save_tiny(family, path)


def attempt(steps: Sequence[Any], model: Path, folder: Path, *, planned: bool = False) -> Outcome:
    """One recipe through plan, run, reload and generate. Raises for anything but success and a refusal by the plan.

    The reload check works in this process where `engine.reload_here` was called. planned: nothing but the plan.
    """
    folder.mkdir()
    calibration = engine.token_calibration(folder, IDS)
    kind = "native" if any(name.startswith("quantize.") for step in steps for name in step) else "auto"
    path = engine.write_recipe(folder, model, steps, calibration=calibration, output={"format": kind})
    recipe = load_recipe(path)
    if planned:
        return Outcome(_reasons(recipe))
    try:
        out = run(recipe)
    except RecipeError:
        refused = _reasons(recipe)
        if refused is None:  # it came from later on
            raise
        return Outcome(refused)
    loaded: Any = load(out)
    with torch.no_grad():
        logits = loaded(input_ids=IDS[:1], use_cache=False).logits
        made = loaded.generate(IDS[:1, :8], max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    assert bool(torch.isfinite(logits).all()) and made.shape == (1, 11)
    return Outcome(None)


def _reasons(recipe: Any) -> str | None:
    return "; ".join(dict.fromkeys(reason(problem) for problem in make_plan(recipe).problems)) or None


def reason(problem: str) -> str:
    """A problem of the plan without its place in the recipe and the layer."""
    text = re.sub(r"^\S*recipe\.yaml:\d+: ", "", problem)
    text = re.sub(r"^[a-z_.]+: (layer \d+: )?", "", text)
    found, _, then = re.sub(r"layer \d+|(\w+\.)*layers\.\d+", "a layer", text).partition(". Next: ")
    return f"{found}; {then}" if then else found


def kept() -> dict[str, Any]:
    """What was found: `passes`, `families`, `refused`: pass -> family -> reason, `planned`: pass -> families of which
    only the plan was made, and accepted."""
    return dict(json.loads(KEPT.read_text("utf-8")))


def table(found: Mapping[str, Any]) -> str:
    """The README's block: a line for every set of families that agree on all passes, numbered reasons under it."""
    refused: Mapping[str, Mapping[str, str]] = found["refused"]
    planned: Mapping[str, Sequence[str]] = found["planned"]
    columns: dict[tuple[Any, ...], list[str]] = {}
    for name in found["passes"]:
        key = (*sorted(refused.get(name, {}).items()), *sorted(planned.get(name, ())))
        columns.setdefault(key, []).append(name)
    notes: dict[str, int] = {}
    rows: dict[tuple[str, ...], list[str]] = {}
    for family in found["families"]:
        cells = []
        for names in columns.values():
            why = refused.get(names[0], {}).get(family)
            if why is not None:
                cells.append(f"no ({notes.setdefault(why, len(notes) + 1)})")
            else:
                cells.append("plan" if family in planned.get(names[0], ()) else "yes")
        rows.setdefault(tuple(cells), []).append(family)
    head = ["families", *("<br>".join(f"`{name}`" for name in names) for names in columns.values())]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for cells, names in sorted(rows.items(), key=lambda row: -len(row[1])):
        lines.append(f"| {', '.join(names)} | {' | '.join(cells)} |")
    lines += ["", *(f"{number}. {why}" for why, number in notes.items())]
    count = f"{len(found['passes'])} passes on {len(found['families'])} families"
    summary = f"<details><summary>{count}</summary>"
    words = "yes: ran, was loaded again and generated. no: `plan` refuses it, for the reason below."
    words += " plan: `plan` accepts it; not run for this table." if any(planned.values()) else ""
    return "\n".join([BEGIN, summary, "", words, "", *lines, "", "</details>", END])
