"""Tasks of lm-eval on a checkpoint held in memory: values, per-document results, paired differences to a reference.

Offline when the data is local: `dataset_path: json` with `data_files` in a YAML file needs no network. Seeds, few-shot
examples and metrics are lm-eval's own; standard errors come from the documents (`numerics/significance.py`), not from
lm-eval's bootstrap, which starts processes.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moecompress.calib.tokenizer import load_tokenizer
from moecompress.checkpoint.index import open_index
from moecompress.errors import CheckpointError, MachineError, RecipeError, message, suggest
from moecompress.evalstore import SAMPLES, as_json, compare_rows, update_evaluation, write_rows
from moecompress.fingerprint import PACKAGES, versions
from moecompress.memory import available_bytes
from moecompress.packed import backend_name
from moecompress.progress import NoProgress, Progress
from moecompress.tasknames import is_file_name, task_problems
from moecompress.taskresults import TaskResults, collect

SEEDS = (0, 1234)  # of `random`, and of numpy, torch and few-shot sampling: what lm-eval's command line sets


def evaluate_tasks(
    path: Path,
    tasks: Sequence[str],
    reference: Path | None = None,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    device: str = "cpu",
    activation_bits: int | None = None,
    progress: Progress | None = None,
    save: bool = True,
) -> dict[str, Any]:
    """Run tasks on a checkpoint directory, and on the reference when one is given; returns what eval.json gets.

    tasks: built-in names of lm-eval, or YAML files. limit: documents of each task; num_fewshot replaces the tasks'
    own. activation_bits: of `load`, for the checkpoint. save: write eval.json and `eval_samples/<task>.jsonl` into
    `path/moecompress`.
    Raises MachineError (lm-eval missing, data that has to be downloaded, too little memory), RecipeError (tasks).
    """
    problems = task_problems(tasks, "tasks")
    if problems:
        raise (RecipeError if "no file" in problems[0] else MachineError)("\n".join(problems))
    if not tasks:
        raise RecipeError(message("tasks", "none given", "names of lm-eval or YAML files"))
    shown = progress or NoProgress()
    shown.stage("tasks", 1 if reference is None else 2)
    runs = {}
    for key, root in (("model", path), ("reference", reference)):
        if root is not None:
            options = {"limit": limit, "num_fewshot": num_fewshot, "batch_size": batch_size}
            rounding = activation_bits if key == "model" else None
            runs[key] = _run(root, tasks, device, options, rounding)
            shown.step(str(root))
    found = _section(runs["model"], limit)
    if reference is not None:
        found |= {"tasks_paired": _paired(runs["model"], runs["reference"]), "tasks_reference": str(reference)}
    if save:
        for task, rows in runs["model"].rows.items():
            found["task_settings"][task]["samples"] = write_rows(path, f"{SAMPLES}/{task}.jsonl", rows)
        update_evaluation(path, found, SAMPLES)
    return found


def open_in_memory(root: Path, device: str, activation_bits: int | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) of a directory, the model whole on `device`, native weights packed. Options: of `load`.

    Raises MachineError when the weights do not fit into this machine's memory.
    """
    from moecompress.load import load

    if not fits(root):
        found = f"{open_index(root).total_bytes / 2**30:.1f} GiB of weights are more than the free memory"
        raise MachineError(message(str(root), found, then="measure perplexity, which holds one layer at a time"))
    return load(root, activation_bits=activation_bits).to(device), load_tokenizer(root)


def fits(root: Path) -> bool:
    """Whether the weights of a directory fit into the memory that is free now (yes where that is not known)."""
    free = available_bytes()
    return free is None or open_index(root).total_bytes <= free


def _run(
    root: Path, tasks: Sequence[str], device: str, options: Mapping[str, Any], activation_bits: int | None
) -> TaskResults:
    """Load tasks and model, evaluate, forget the model."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    with contextlib.redirect_stdout(sys.stderr), _seeded():  # lm-eval prints; stdout is for results
        loaded = _load_tasks(tasks)
        for task in loaded["tasks"].values():
            _set_fewshot(task, options["num_fewshot"])
        model, tokenizer = open_in_memory(root, device, activation_bits)
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options["batch_size"])
        raw: Any = evaluate(lm, loaded, limit=options["limit"], bootstrap_iters=0, log_samples=True)
        used = backend_name(model)
    return replace(collect(raw, options["limit"]), backend=used)


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """lm-eval's seeds inside, the caller's random numbers untouched outside."""
    import numpy

    before = random.getstate(), numpy.random.get_state()
    random.seed(SEEDS[0])
    numpy.random.seed(SEEDS[1])
    with torch.random.fork_rng():
        torch.manual_seed(SEEDS[1])
        yield
    random.setstate(before[0])
    numpy.random.set_state(before[1])


def _load_tasks(tasks: Sequence[str]) -> Any:
    """lm-eval's tasks and groups. The index of built-in names, which takes many seconds, only where one is asked."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    specs, folders, names = [], [], []
    for task in tasks:
        if not is_file_name(task):
            specs.append(task)
            names.append(task)
            continue
        file = Path(task).resolve()
        try:
            config = load_yaml(file, resolve_func=False)
        except Exception as error:  # YAML, includes and their functions: all written by the user
            raise RecipeError(message(task, f"is no task file ({type(error).__name__}: {_line(error)})")) from None
        group = config.get("group")
        specs.append(group if isinstance(group, str) else str(file))
        if isinstance(group, str):  # its members are found by name, beside it or among the built-in tasks
            folders.append(str(file.parent))
            members = config.get("task")
            names += [name for name in (members if isinstance(members, list) else [members]) if isinstance(name, str)]
    manager = TaskManager(include_path=folders, include_defaults=False)
    if any(name not in manager.task_index for name in names):
        manager = TaskManager(include_path=folders, include_defaults=True)
    unknown = [name for name in names if name not in manager.task_index]
    if unknown:
        known = [name for name in manager.task_index if name[:1] == unknown[0][:1]]
        hint = suggest(unknown[0], known).partition(" (allowed")[0]
        raise RecipeError(message("tasks", f"lm-eval has no task '{unknown[0]}'{hint}", then="lm_eval ls tasks"))
    return _loaded(manager, specs)


def _loaded(manager: Any, specs: Sequence[str]) -> Any:
    try:
        loaded = manager.load(list(specs))
    except Exception as error:  # builds prompts from user files and may download: every failure is outside of us
        offline = isinstance(error, ConnectionError) or "Hub" in type(error).__name__
        then = "give a YAML file with `dataset_path: json` and local `data_files`" if offline else ""
        text = f"cannot be loaded ({type(error).__name__}: {_line(error)})"
        kind = MachineError if offline else RecipeError
        raise kind(message(f"tasks {', '.join(specs)}", text, then=then)) from error
    unsafe = [name for name, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]
    if unsafe:
        then = "for HumanEval use --humaneval FILE --allow-code-execution"
        raise RecipeError(message(f"task {unsafe[0]}", "runs generated code without a sandbox", then=then))
    return loaded


def _set_fewshot(task: Any, wanted: int | None) -> None:
    """As lm-eval's command line: a task that says 0 keeps it, one that says nothing gets 0."""
    own = task.get_config("num_fewshot")
    if wanted is not None and own != 0:
        task.set_config(key="num_fewshot", value=wanted)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=SEEDS[1])


def _section(found: TaskResults, limit: int | None) -> dict[str, Any]:
    return {
        "tasks": {task: dict(metrics) for task, metrics in found.tasks.items()},
        "task_settings": {task: dict(settings) for task, settings in found.settings.items()},
        "limit": limit,
        "backend": found.backend,
        "versions": versions((*PACKAGES, "lm_eval")),
    }


def _paired(model: TaskResults, reference: TaskResults) -> dict[str, Any]:
    """Per task and metric, model minus reference on the same documents. Raises CheckpointError when they differ."""
    found = {}
    for task, rows in model.rows.items():
        mine, theirs = ({row["doc_hash"] for row in side} for side in (rows, reference.rows[task]))
        if mine != theirs:
            raise CheckpointError(message(f"task {task}", "gave the two models different documents", "the same"))
        reported = {name: metric["value"] for name, metric in model.tasks[task].items()}
        found[task] = as_json(compare_rows(rows, reference.rows[task], reported))
    return found


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
