"""Recipe + checkpoint headers -> Plan: what every tensor becomes, what it will cost, everything that is wrong.

No tensor is read. All problems are collected, so that one look at the plan is enough.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moecompress.actions import tensor_actions
from moecompress.allocated import allocation_of, allocation_problems, reworded, with_allocation
from moecompress.calib.estimate import generation_problems
from moecompress.calib.mix import part_specs
from moecompress.calib.sources import required_files, resolve_text
from moecompress.errors import MoecompressError, UnsupportedModel, message
from moecompress.estimate import Estimate, estimate, remaining_shares
from moecompress.gated import gate_problems, unheld_gate
from moecompress.passes.base import Pass, Scope
from moecompress.planned import Plan, Sweep
from moecompress.portable import portable_problems
from moecompress.recipe import Recipe
from moecompress.reshaped import reshape
from moecompress.stream.inventory import owners
from moecompress.stream.locate import locate_model
from moecompress.stream.model import StreamModel, open_model
from moecompress.stream.structure import with_structure
from moecompress.tasknames import memory_problems, task_problems
from moecompress.types import ModelFacts, Scheme
from moecompress.writing import Format

BATCH_TOKENS = 4096
PROBE_TOKENS = 64


def passes_of(recipe: Recipe) -> tuple[Pass, ...]:
    """The recipe's passes in order."""
    made = tuple(step.params for step in recipe.passes)
    assert all(isinstance(step, Pass) for step in made)
    return made  # type: ignore[return-value]


def cut_sweeps(passes: tuple[Pass, ...]) -> tuple[Sweep, ...]:
    """Cut the ordered passes at every pass that decides only after all layers were seen.

    Sweep k applies everything before barrier k; passes decided in an earlier sweep are replayed from their decision.
    """
    sweeps = []
    for position, step in enumerate(passes):
        if step.decides is not Scope.LAYER:
            sweeps.append(Sweep(tuple(range(position)), position))
    return (*sweeps, Sweep(tuple(range(len(passes)))))


def make_plan(recipe: Recipe, memory: int | None = None) -> Plan:
    """Resolve the recipe against its checkpoint. Raises only when the checkpoint cannot be opened at all."""
    root = locate_model(recipe.model, recipe.revision)
    model = with_structure(open_model(root, trust_remote_code=recipe.trust_remote_code))
    if model.compressed:
        found = "is already compressed by moecompress"
        raise UnsupportedModel(message(f"model '{recipe.model}'", found, then="start from the original checkpoint"))
    passes = passes_of(recipe)
    reshaped = reshape(model, passes)
    model, stages = reshaped.model, reshaped.stages
    problems = _pass_problems(recipe, passes, stages) + list(reshaped.problems)
    problems += _turn_problems(recipe, passes) + _order_problems(recipe, passes)
    warnings = list(reshaped.warnings)
    schemes = {layer.index: _schemes(passes, stages, layer.index) for layer in model.facts.layers}
    output = _format(recipe, model, schemes, problems, reshaped.native)
    problems += _calibration_problems(recipe, model, root)
    problems += _output_problems(recipe)
    owned = owners(model)

    def cost_of(steps: tuple[Pass, ...]) -> Estimate:
        sound = [step for step, facts in zip(steps, stages, strict=False) if not step.check(facts)]
        held = {layer.index: max((s.statistics_bytes(layer) for s in sound), default=0) for layer in model.facts.layers}
        sweeps = len(cut_sweeps(steps))
        added = sum(step.added_bytes(layer) for step in sound for layer in stages[-1].layers)
        sizes = (sweeps, BATCH_TOKENS, PROBE_TOKENS, stages[-1], reshaped.dropped, added)
        return estimate(recipe, model, owned, schemes, output, held, *sizes)

    cost = cost_of(passes)
    if memory is not None and cost.peak_bytes > memory:
        passes = tuple(step.lighter(model.facts, cost.peak_bytes - memory) for step in passes)
        cost = cost_of(passes)
    actions = tensor_actions(model, owned, schemes, output, remaining_shares(model, stages[-1]), reshaped.dropped)
    allocation = allocation_of(passes)
    problems += allocation_problems(passes) + gate_problems(passes)
    if allocation is not None:
        cost, wrong = with_allocation(cost, allocation, model, stages[-1], schemes)
        actions = reworded(actions, owned)
        problems += wrong
    problems += _resource_problems(recipe, cost, memory)
    problems += memory_problems(recipe.evaluate.tasks, "evaluate.tasks", cost.output_bytes)
    if not recipe.calibration:
        warnings.append("no calibration: token counts and held-out errors are not measured")
    return Plan(
        recipe,
        root,
        passes,
        cut_sweeps(passes),
        output,
        schemes,
        owned,
        actions,
        cost,
        tuple(problems),
        tuple(warnings),
        model,
        stages,
        reshaped.config,
        reshaped.dropped,
    )


def _pass_problems(recipe: Recipe, passes: tuple[Pass, ...], stages: tuple[ModelFacts, ...]) -> list[str]:
    problems = []
    for spec, step, facts in zip(recipe.passes, passes, stages, strict=False):
        problems += [f"{spec.where}: {spec.name}: {problem}" for problem in step.check(facts)]
        if step.needs_data and not recipe.calibration:
            names = ", ".join(item.name for item in step.needs()) or "inputs of every matrix"
            problems.append(
                message(
                    f"{spec.where}: {spec.name}",
                    f"needs data ({names}) but the recipe has no calibration",
                    then="add e.g. `calibration: {source: manifest, manifest: python-stdlib}`",
                )
            )
    return problems


def _order_problems(recipe: Recipe, passes: tuple[Pass, ...]) -> list[str]:
    late = [spec for spec, step in list(zip(recipe.passes, passes, strict=True))[1:] if step.moves_residual]
    return [
        message(f"{spec.where}: {spec.name}", "comes after another pass, which knew the old basis", then="put it first")
        for spec in late
    ]


def _turn_problems(recipe: Recipe, passes: tuple[Pass, ...]) -> list[str]:
    """Passes that would read experts whose inputs are turned as if they were not."""
    turning = next((position for position, step in enumerate(passes) if step.turns_inputs), len(passes))
    return [
        message(
            f"{spec.where}: {spec.name}",
            f"does not understand experts that turn their inputs ({passes[turning].name} before it)",
            then=f"put it before {passes[turning].name}",
        )
        for spec, step in list(zip(recipe.passes, passes, strict=True))[turning + 1 :]
        if not step.takes_turned
    ]


def _schemes(passes: tuple[Pass, ...], stages: tuple[ModelFacts, ...], index: int) -> dict[str, Scheme]:
    chosen: dict[str, Scheme] = {}
    for step, facts in zip(passes, stages, strict=False):
        if step.check(facts):
            continue  # its sizes cannot be told
        for name, scheme in step.schemes(facts.layers[index]).items():
            chosen.setdefault(name, scheme)  # the first quantizer of a matrix owns it
    return chosen


def _format(
    recipe: Recipe,
    model: StreamModel,
    schemes: Mapping[int, Mapping[str, Scheme]],
    problems: list[str],
    native: str | None,
) -> Format:
    """The output's format. native: why it has to be that, if it has to."""
    wanted = recipe.output.format
    if native is not None:
        if wanted not in ("auto", "native"):
            problems.append(message(f"output.format {wanted}", native, "native", "use format: native"))
        return "native"
    quantized = any(schemes.values())
    unheld = unheld_gate(passes_of(recipe))
    if unheld is not None:
        if wanted in ("dense", "portable"):
            problems.append(message(f"output.format {wanted}", unheld))
        return "native"
    if wanted in ("native", "portable") and not quantized and not problems:
        problems.append(message("output.format", f"{wanted}, but nothing is quantized", "dense", "use format: dense"))
    if wanted == "dense" and any(s.activation != "none" for chosen in schemes.values() for s in chosen.values()):
        found = "dense, whose matrices would run with full activations (activation_bits)"
        problems.append(message("output.format", found, "native"))
    if wanted in ("dense", "native") or not quantized:
        return "native" if wanted == "native" else "dense"
    unfit = portable_problems(model, schemes)
    if any(step.turns_inputs for step in passes_of(recipe)):
        unfit.append("experts turn their inputs while they run (rotate.*), which the format cannot say; use native")
    if allocation_of(passes_of(recipe)) is not None:
        unfit.append("experts get different widths (allocate.*), and one scheme for all is allowed; use format: native")
    if wanted == "portable":
        problems += [message("output.format portable", text) for text in unfit]
    return "native" if unfit and wanted == "auto" else "portable"


def _calibration_problems(recipe: Recipe, model: StreamModel, root: Path) -> list[str]:
    from moecompress.calib.tokenizer import load_tokenizer

    problems = []
    for name, spec in recipe.calibration.items():
        for one in part_specs(spec) or (spec,):
            if one.source not in ("text", "jsonl", "tokens", "answers"):
                continue
            try:
                required_files(one, f"calibration '{name}'")
            except MoecompressError as error:
                problems.append(str(error))
    for name, spec in recipe.calibration.items():
        problems += generation_problems(spec, model, f"calibration '{name}'")
    texts = [spec for spec in recipe.calibration.values() if spec.source != "tokens"]
    if texts or recipe.evaluate.perplexity or recipe.evaluate.tasks:
        try:
            tokenizer = load_tokenizer(root, trust_remote_code=recipe.trust_remote_code)
            problems += _text_problems(recipe, tokenizer)
        except MoecompressError as error:
            problems.append(str(error))
    problems += task_problems(recipe.evaluate.tasks, "evaluate.tasks")
    return problems


def _text_problems(recipe: Recipe, tokenizer: Any) -> list[str]:
    """Evaluation texts that are absent or too short: found now, not after the work."""
    problems, length = [], recipe.evaluate.length
    for ref in recipe.evaluate.perplexity:
        if ":" not in ref and not Path(ref).is_file():
            problems.append(message("evaluate.perplexity", f"no file '{ref}'", "a text file or python-stdlib:heldout"))
            continue
        try:
            start = resolve_text(ref)[: 100 * length]  # far more than `length` tokens of any language
        except MoecompressError as error:
            problems.append(str(error))
            continue
        count = len(tokenizer(start, add_special_tokens=False, verbose=False)["input_ids"])
        if count < length:
            found = f"'{ref}' has {count} tokens, fewer than one window of {length}"
            problems.append(message("evaluate.perplexity", found, then="name a longer text or lower evaluate.length"))
    return problems


def _output_problems(recipe: Recipe) -> list[str]:
    out = recipe.out
    if out.exists():
        return [message(f"output.dir '{out}'", "exists", then="choose another --out, or remove it")]
    parent = out.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        return [message(f"output.dir '{out}'", f"'{parent}' is not a directory")]
    return []


def _resource_problems(recipe: Recipe, cost: Estimate, memory: int | None) -> list[str]:
    problems = []
    parent = recipe.out.parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if cost.disk_bytes > free:
        problems.append(
            message(
                f"disk at '{parent}'",
                f"{free / 2**30:.2f} GiB free, the run needs {cost.disk_bytes / 2**30:.2f} GiB",
                then="free some space or choose another --out",
            )
        )
    if memory is not None and cost.peak_bytes > memory:
        problems.append(
            message(
                "memory",
                f"the run needs about {cost.peak_bytes / 2**30:.2f} GiB, --memory allows {memory / 2**30:.2f} GiB",
                then="use fewer or shorter calibration samples, or allow more",
            )
        )
    return problems
