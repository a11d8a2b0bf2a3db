"""The command line: options in, one call, text out. Exit codes: 0 done, 2 your input, 75 stopped, 1 our bug."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from moecompress.errors import MachineError, MoecompressError, RecipeError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Compress Mixture-of-Experts language models: one recipe in, one loadable checkpoint out.",
)

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file or a catalogue name.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace one value, e.g. passes.0.quantize.rtn.bits=3."),
]
OutOption = Annotated[Path | None, typer.Option("--out", help="Output directory (sets output.dir).")]
MemoryOption = Annotated[
    str | None, typer.Option("--memory", metavar="SIZE", help="Use at most this much memory, e.g. 8GiB.")
]
RoundingOption = Annotated[
    int | None,
    typer.Option(help="8: round inputs of packed matrices to int8 per token, faster and less exact; not saved."),
]
CodeOption = Annotated[
    bool, typer.Option("--allow-code-execution", help="Run the code that the model writes, with limits.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DirArgument = Annotated[Path, typer.Argument(metavar="DIR", help="An output directory.")]


@app.command()
def run(
    recipe: RecipeArgument,
    settings: SetOption = None,
    out: OutOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a stopped run.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Discard a stopped run and begin again.")] = False,
    memory: MemoryOption = None,
) -> None:
    """Compress a model as the recipe says."""
    loaded, limit = _load(recipe, settings, out), _size(memory)
    from moecompress.progress import open_progress
    from moecompress.run import run as execute

    with open_progress(sys.stderr) as progress:
        result = execute(loaded, resume=resume, restart=restart, memory=limit, progress=progress)
    typer.echo(result)


@app.command()
def plan(
    recipe: RecipeArgument,
    settings: SetOption = None,
    out: OutOption = None,
    memory: MemoryOption = None,
    sweep: Annotated[
        str | None,
        typer.Option(metavar="FIRST:LAST:STEP", help="What these budgets would give; measures the model once."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a run would do, need and make; every problem at once. Reads no tensors without --sweep."""
    loaded, limit = _load(recipe, settings, out), _size(memory)
    if sweep is not None:
        from moecompress.budgets import budget_range, predict_budgets, render_budgets
        from moecompress.progress import open_progress

        values = budget_range(sweep)
        with open_progress(sys.stderr) as progress:
            rows = predict_budgets(loaded, values, limit, progress)
        typer.echo(_json(rows) if as_json else render_budgets(rows))
        return
    from moecompress.plan import make_plan

    made = make_plan(loaded, memory=limit)
    typer.echo(_json(made.to_json()) if as_json else made.render())
    if made.problems:
        raise RecipeError("\n".join(made.problems))


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A recipe, and the values to try for some of its keys.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="The directory of all runs (instead of the file's).")
    ] = None,
    memory: MemoryOption = None,
) -> None:
    """Run a recipe with every combination of some values and compare the results. Goes on where it stopped."""
    limit = _size(memory)
    from moecompress.progress import open_progress
    from moecompress.series import run_series

    with open_progress(sys.stderr) as progress:
        written = run_series(file, out, limit, progress)
    for path in written:
        typer.echo(path)


@app.command("eval")
def evaluate(
    directory: DirArgument,
    perplexity: Annotated[
        list[str] | None, typer.Option(help="Text file or python-stdlib:heldout; may be repeated.")
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(metavar="NAMES", help="Tasks of lm-eval, a,b, or a task's YAML file.")
    ] = None,
    humaneval: Annotated[Path | None, typer.Option(metavar="FILE", help="Problems in HumanEval's format.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="The source model, a directory or hub id: KL, agreement, paired differences.")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="At most this many pieces of every text.")] = 40,
    length: Annotated[int, typer.Option(min=2, help="Tokens in one piece.")] = 512,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of every task, problems of HumanEval.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Instead of the tasks' own.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Of tasks and HumanEval.")] = 8,
    device: Annotated[
        str, typer.Option(help="Of a model in memory (--served, tasks, HumanEval): cpu, cuda...")
    ] = "cpu",
    activation_bits: RoundingOption = None,
    served: Annotated[bool, typer.Option("--served", help="Not streamed: in memory, own dtype, on kernels.")] = False,
    allow_code_execution: CodeOption = False,
    samples_per_task: Annotated[int, typer.Option(min=1, help="Programs for every problem of HumanEval.")] = 1,
    temperature: Annotated[float | None, typer.Option(min=0, help="Of HumanEval; 0 for one sample, else 0.8.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a checkpoint: perplexity on texts, distance from a reference, tasks of lm-eval, written code."""
    from moecompress.progress import open_progress
    from moecompress.report.text import evaluation_text
    from moecompress.stream.locate import locate_model
    from moecompress.tasknames import split_names

    texts, names = tuple(perplexity or ()), split_names(tasks or ())
    source = None if reference is None else locate_model(reference)
    rounding: dict[str, Any] = {"activation_bits": activation_bits, "save": activation_bits is None}
    shared: dict[str, Any] = {"limit": limit, "batch_size": batch_size, "device": device, **rounding}
    result: dict[str, Any] = {}
    with open_progress(sys.stderr) as progress:
        if texts or not (names or humaneval):
            from moecompress.evaluate import evaluate_dir

            sizes: dict[str, Any] = {"windows": windows, "length": length, "served": served, "device": device}
            result = evaluate_dir(directory, texts, source, progress=progress, **sizes, **rounding)
        if names:
            from moecompress.tasks import evaluate_tasks

            found = evaluate_tasks(directory, names, source, num_fewshot=num_fewshot, progress=progress, **shared)
            result = _merged(result, found)
        if humaneval:
            from moecompress.humaneval import evaluate_humaneval

            shared |= {"allow_code_execution": allow_code_execution, "samples_per_task": samples_per_task}
            shared |= {"temperature": temperature, "progress": progress}
            result = _merged(result, evaluate_humaneval(directory, humaneval, source, **shared))
    if activation_bits is not None:
        result["activation_bits"] = activation_bits
    typer.echo(_json(result) if as_json else evaluation_text(result))


@app.command()
def compare(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="The first one is the base.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="A .html, .md or .json file.")],
) -> None:
    """Compare runs: one table, size against quality, significance of differences, recipe differences."""
    from moecompress.report.compare import write_comparison

    typer.echo(write_comparison(directories, out))


@app.command()
def report(directory: DirArgument) -> None:
    """Write report.md and report.html again from report.json and eval.json."""
    from moecompress.report.build import write_report

    for path in write_report(directory):
        typer.echo(path)


@app.command()
def inspect(directory: DirArgument) -> None:
    """Show sizes by component and the quantization of every layer."""
    from moecompress.inspect import inspect_dir

    typer.echo(inspect_dir(directory))


@app.command()
def verify(directory: DirArgument) -> None:
    """Recompute every tensor's sha256 and compare with the manifest."""
    from moecompress.errors import CheckpointError
    from moecompress.inspect import verify_dir

    problems = verify_dir(directory)
    if problems:
        raise CheckpointError("\n".join(f"{directory}: {problem}" for problem in problems))
    typer.echo(f"{directory}: every tensor is as it was written")


@app.command()
def export(
    directory: DirArgument,
    form: Annotated[str, typer.Option("--format", metavar="FORMAT", help="portable, container, dense or gptq.")],
    out: Annotated[Path, typer.Option("--out", help="The directory to write.")],
    allow_lossy: Annotated[
        bool, typer.Option("--allow-lossy", help="Round again what the format cannot hold exactly.")
    ] = False,
) -> None:
    """Write an output directory in another format, exactly or not at all."""
    from moecompress.export import export_dir
    from moecompress.progress import open_progress

    with open_progress(sys.stderr) as progress:
        result = export_dir(directory, form, out, allow_lossy=allow_lossy, progress=progress)  # type: ignore[arg-type]
    typer.echo(result)


@app.command()
def recipes() -> None:
    """List the catalogue."""
    from moecompress.recipe import catalogue

    for name, text in catalogue().items():
        typer.echo(f"{name:<16}{text}")


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Show versions, memory, devices and kernel backends, with reasons."""
    from moecompress import doctor as room

    facts = room.doctor()
    typer.echo(_json(facts) if as_json else room.render(facts))


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from moecompress.recipe import schema as recipe_schema

    typer.echo(_json(recipe_schema()))


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Errors that a user can act on are printed without a traceback and give their exit code."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="moecompress")
    except MoecompressError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception:
        traceback.print_exc()
        print(
            "This is a bug in moecompress. Please report it with the text above and the recipe.",
            file=sys.stderr,
        )
        sys.exit(1)


def _load(recipe: str, settings: list[str] | None, out: Path | None) -> Any:
    from moecompress.recipe import load_recipe

    chosen = [] if out is None else [f"output.dir={json.dumps(str(out))}"]  # JSON text is YAML text, quoted
    return load_recipe(recipe, [*(settings or ()), *chosen])


def _size(text: str | None) -> int | None:
    from moecompress.sizes import parse_size

    try:
        return None if text is None else parse_size(text)
    except ValueError as error:
        raise MachineError(f"--memory: {error}") from None


def _json(data: Any) -> str:
    return json.dumps(data, indent=1, ensure_ascii=False)


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Both results; what both measured by task is put together."""
    inner = {key: first[key] | second[key] for key in first.keys() & second.keys() if isinstance(first[key], dict)}
    return {**first, **second, **inner}
