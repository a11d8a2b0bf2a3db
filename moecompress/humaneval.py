"""pass@k on problems in HumanEval's format (arXiv 2107.03374): generate code, run it against the problem's tests.

Nothing runs unless the caller allows it; then every candidate runs in the sandbox of `sandbox.py`. Offline.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moecompress.errors import CalibrationError, RecipeError, message
from moecompress.evalstore import SAMPLES, as_json, compare_rows, update_evaluation, write_rows
from moecompress.fingerprint import versions
from moecompress.numerics.significance import estimate, samples
from moecompress.packed import backend_name
from moecompress.progress import NoProgress, Progress
from moecompress.sandbox import Sandbox, open_sandbox, run_program
from moecompress.tasks import open_in_memory

# A function's body ends where the next statement starts at the margin; the first five are the paper's.
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n@", "\nimport", "\nfrom", "\nassert", "\n```")
KEYS = ("task_id", "prompt", "entry_point", "test")
CUTOFFS = (1, 10, 100)  # the k of pass@k, as far as there are samples


@dataclass(frozen=True)
class Sampling:
    """How candidates are drawn. temperature 0: greedy, one candidate. top_p: share of the probability kept."""

    candidates: int = 1
    temperature: float = 0.0
    top_p: float = 0.95
    max_new_tokens: int = 384
    batch_size: int = 8
    seed: int = 0


@dataclass(frozen=True)
class Problem:
    """One line of the file. prompt: a function's head and docstring; test: defines `check(candidate)`."""

    task_id: str
    prompt: str
    entry_point: str
    test: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps([self.prompt, self.entry_point, self.test]).encode()).hexdigest()

    def program(self, completion: str) -> str:
        return f"{self.prompt}{completion}\n\n{self.test}\n\ncheck({self.entry_point})\n"


def evaluate_humaneval(
    path: Path,
    file: Path,
    reference: Path | None = None,
    *,
    allow_code_execution: bool,
    samples_per_task: int = 1,
    temperature: float | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    device: str = "cpu",
    activation_bits: int | None = None,
    progress: Progress | None = None,
    save: bool = True,
) -> dict[str, Any]:
    """pass@1, and pass@10 and @100 where `samples_per_task` is as large, of a checkpoint directory.

    One sample per task is greedy; several are drawn at temperature 0.8 unless another is given. activation_bits: of
    `load`, for the checkpoint. Returns what eval.json gets: the task is named after the file.
    Raises RecipeError when code execution is not allowed.
    """
    if not allow_code_execution:
        text = "runs code that the model writes, on this machine"
        raise RecipeError(message("humaneval", text, then="allow it with --allow-code-execution"))
    warmth = temperature if temperature is not None else 0.0 if samples_per_task == 1 else 0.8
    if samples_per_task > 1 and warmth == 0:
        raise RecipeError(message("humaneval", f"{samples_per_task} equal samples at temperature 0", "above 0"))
    problems, box = read_problems(file)[:limit], open_sandbox()
    sampling = Sampling(samples_per_task, warmth, batch_size=batch_size, seed=seed)
    shown = progress or NoProgress()
    rows, backend = _solve(path, problems, sampling, box, device, shown, activation_bits)
    task = file.stem
    found: dict[str, Any] = {
        "tasks": {task: summary(rows)},
        "task_settings": {
            task: {"limit": limit, "documents": len(rows), **asdict(sampling), "sandbox": box.describe()}
            | {"higher_is_better": {name: True for name in rows[0]["metrics"]}}
        },
        "limit": limit,
        "backend": backend,
        "versions": versions(),
    }
    if reference is not None:
        others, _ = _solve(reference, problems, sampling, box, device, shown)
        values = {name: metric["value"] for name, metric in found["tasks"][task].items()}
        found |= {"tasks_paired": {task: as_json(compare_rows(rows, others, values))}}
        found["tasks_reference"] = str(reference)
    if save:
        found["task_settings"][task]["samples"] = write_rows(path, f"{SAMPLES}/{task}.jsonl", rows)
        update_evaluation(path, found, SAMPLES)
    return found


def read_problems(file: Path) -> list[Problem]:
    """The problems of a JSON lines file. Raises CalibrationError naming the line that is wrong."""
    if not file.is_file():
        raise CalibrationError(message(str(file), "no such file", "JSON lines in HumanEval's format"))
    problems = []
    for number, line in enumerate(file.read_text("utf-8").splitlines(), start=1):
        where = f"{file}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise CalibrationError(message(where, f"is not JSON ({error})")) from None
        missing = [key for key in KEYS if not isinstance(row, dict) or not isinstance(row.get(key), str)]
        if missing:
            raise CalibrationError(message(where, f"no text under {', '.join(missing)}", ", ".join(KEYS)))
        problems.append(Problem(*(row[key] for key in KEYS)))
    if not problems:
        raise CalibrationError(message(str(file), "is empty"))
    return problems


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k candidates is right, from n of which `correct` are."""
    if not 0 <= correct <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {correct} right in {n}")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Mean and standard error over problems of every metric."""
    found: dict[str, dict[str, float | None]] = {}
    for name in rows[0]["metrics"]:
        taken = samples([row["metrics"][name] for row in rows])
        assert taken is not None
        value, stderr = estimate("mean", taken)
        found[name] = {"value": value, "stderr": stderr}
    return found


def truncate(text: str, prompt: str = "") -> str:
    """The completion up to the first line that ends the function. Its own first line may be one."""
    lead = prompt[-1:]
    ends = [at for at in map((lead + text).find, STOPS) if at >= 0]
    return (lead + text)[len(lead) : max(min(ends), len(lead)) if ends else None]


def _solve(
    root: Path,
    problems: Sequence[Problem],
    sampling: Sampling,
    box: Sandbox,
    device: str,
    progress: Progress,
    activation_bits: int | None = None,
) -> tuple[list[dict[str, Any]], str]:
    """(a row per problem, who computed)."""
    model, tokenizer = open_in_memory(root, device, activation_bits)
    progress.stage(f"code of {root}", len(problems))
    rows = []
    for number, problem in enumerate(problems):
        written = complete(model, tokenizer, problem, sampling, number)
        outcomes = [run_program(box, problem.program(text)) for text in written]
        right = sum(outcome.passed for outcome in outcomes)
        rows.append(
            {
                "doc_id": problem.task_id,
                "doc_hash": problem.digest,
                "filter": "none",
                "metrics": {f"pass@{k}": pass_at_k(len(written), right, k) for k in CUTOFFS if k <= len(written)},
                "completions": [
                    {"text": text, **asdict(outcome)} for text, outcome in zip(written, outcomes, strict=True)
                ],
            }
        )
        progress.step(f"{problem.task_id}: {right} of {len(written)}")
    return rows, backend_name(model)


def complete(model: Any, tokenizer: Any, problem: Problem, sampling: Sampling, number: int) -> list[str]:
    """Completions of one problem. Equal seeds give equal ones, whatever was drawn before."""
    ids = torch.tensor([tokenizer(problem.prompt)["input_ids"]], device=model.device)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 20
    room = min(sampling.max_new_tokens, longest - ids.shape[1])
    if room < 1:
        raise CalibrationError(message(problem.task_id, f"{ids.shape[1]} tokens of prompt", f"below {longest}"))
    drawn: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    texts: list[str] = []
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(hash((sampling.seed, number)) & 0xFFFFFFFF)
        while len(texts) < sampling.candidates:
            count = min(sampling.batch_size, sampling.candidates - len(texts))
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                num_return_sequences=count,
                max_new_tokens=room,
                stop_strings=list(STOPS),
                tokenizer=tokenizer,
                pad_token_id=pad,
                **drawn,
            )
            texts += [_continuation(tokenizer, ids[0], row) for row in out]
    return texts


def _continuation(tokenizer: Any, prompt: torch.Tensor, whole: torch.Tensor) -> str:
    """The text behind the prompt; decoded together, as some tokenizers drop a leading space."""
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    before = tokenizer.decode(prompt, **options)
    return truncate(tokenizer.decode(whole, **options)[len(before) :], before)
