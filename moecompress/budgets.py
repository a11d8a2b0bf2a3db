"""`plan --sweep`: what a range of budgets would give, predicted from one set of statistics."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moecompress.allocated import allocated_to
from moecompress.barrier import model_context, saved_statistics
from moecompress.errors import RecipeError, message
from moecompress.job import Job
from moecompress.passes.allocator import Allocator
from moecompress.plan import make_plan
from moecompress.progress import NoProgress, Progress
from moecompress.recipe import Recipe
from moecompress.report.text import number
from moecompress.run import up_to_barrier
from moecompress.rundir import RunDir
from moecompress.sizes import parse_budget

_MOST = 200


def budget_range(text: str) -> list[float]:
    """`"1.5:4:0.25"` -> 1.5, 1.75, ..., 4. Raises RecipeError for anything else."""
    try:
        first, last, step = (float(part) for part in text.split(":"))
        count = math.floor((last - first) / step + 1e-9) + 1
        if first <= 0 or step <= 0 or not 1 <= count <= _MOST:
            raise ValueError
    except (ValueError, ZeroDivisionError):
        allowed = f"FIRST:LAST:STEP, such as 1.5:4:0.25, rising, at most {_MOST} values"
        raise RecipeError(message("--sweep", f"'{text}'", allowed)) from None
    return [round(first + step * number, 9) for number in range(count)]


def predict_budgets(
    recipe: Recipe, values: Sequence[float], memory: int | None = None, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """One row per value, as `Allocator.curve`: {budget, mean_bits, ..., predicted_kl} or {budget, problem}.

    values are in the unit of the recipe's own budget (bits, bpw, or GiB). The sweeps up to the allocation run once, in
    a temporary directory beside the output. Raises RecipeError for a recipe that cannot run or has no allocation.
    """
    shown = progress or NoProgress()
    recipe.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".moecompress-", dir=recipe.out.parent) as folder:
        output = recipe.output.model_copy(update={"dir": str(Path(folder) / "out")})
        recipe = recipe.model_copy(update={"output": output})
        plan = make_plan(recipe, memory)
        position = _allocation(recipe, plan.passes)
        if plan.problems:
            raise RecipeError("\n".join(plan.problems))
        step = plan.passes[position]
        assert isinstance(step, Allocator)
        kind = parse_budget(step.budget).kind
        budgets = [f"{value:g} {'GiB' if kind == 'bytes' else kind}" for value in values]
        run = RunDir(recipe.out, {})
        run.path.mkdir()
        job = Job(plan, plan.passes, run, {})
        up_to_barrier(job, position, shown)
        return step.curve(model_context(job, position, saved_statistics(job, position)), budgets)


def _allocation(recipe: Recipe, passes: Sequence[Any]) -> int:
    for position in range(len(passes)):
        if allocated_to(passes, position) is not None:
            return position
    raise RecipeError(message("--sweep", "the recipe has no allocate.* pass with a quantizer after it", "one"))


def render_budgets(rows: Sequence[dict[str, Any]]) -> str:
    """The rows for a terminal."""
    lines = [f"{'budget':>14}{'mean bits':>12}{'stored bpw':>12}{'predicted cost':>16}{'predicted KL':>14}"]
    for row in rows:
        if "problem" in row:
            lines.append(f"{row['budget']:>14}  {row['problem']}")
            continue
        values = (row["mean_bits"], row["stored_bits_per_weight"], row["predicted_cost"], row["predicted_kl"])
        cells = ["" if value is None else number(value) for value in values]
        lines.append(f"{row['budget']:>14}{cells[0]:>12}{cells[1]:>12}{cells[2]:>16}{cells[3]:>14}")
    return "\n".join(lines)
