"""Tasks: the same values as lm-eval's own run of the directory, paired differences, what eval.json keeps, mistakes."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from engine import command, read_json, reload_here, write_recipe

from moecompress import tasks as room
from moecompress.errors import CheckpointError, MachineError, RecipeError
from moecompress.plan import make_plan
from moecompress.recipe import load_recipe
from moecompress.tasknames import split_names, task_problems
from moecompress.tasks import evaluate_tasks

pytestmark = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")

DOCUMENTS = [
    ("A cat is", "animal", "colour"),
    ("Green is", "colour", "number"),
    ("Seven is", "number", "animal"),
    ("A horse is", "animal", "number"),
    ("Seven is", "number", "animal"),  # a second time: documents are told apart by their place
    ("Blue is", "colour", "animal"),
]
CHOICE = {
    "task": "toy_choice",
    "output_type": "multiple_choice",
    "doc_to_text": "{{text}} a kind of",
    "doc_to_choice": "{{options}}",
    "doc_to_target": 0,
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}
ROLLING = {
    "task": "toy_rolling",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}} {{options[0]}}",
    "metric_list": [{"metric": name, "aggregation": name, "higher_is_better": False} for name in ("bits_per_byte",)]
    + [{"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}],
}
WRITTEN = {
    "task": "toy_written",
    "output_type": "generate_until",
    "doc_to_text": "{{text}}",
    "doc_to_target": "{{options[0]}}",
    "num_fewshot": 1,
    "fewshot_split": "test",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
GROUP = {
    "group": "toy",
    "task": ["toy_choice", "toy_written"],
    "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
}


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """datasets keeps what it has read; here it forgets it with the test."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Task files on local data, by the name of the task."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"text": text, "options": [right, wrong]} for text, right, wrong in DOCUMENTS]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}}}
    found = {}
    for task in (CHOICE, ROLLING, WRITTEN, GROUP):
        name = str(task.get("task") if "group" not in task else task["group"])
        found[name] = str(folder / f"{name}.yaml")
        own = task if "group" in task else task | data | {"test_split": "test"}
        Path(found[name]).write_text(yaml.safe_dump(own))
    return found


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, bench_a: Path) -> Path:
    """A directory of our own to write results into: the demo model with weights that are a little off."""
    import torch
    from safetensors.torch import load_file, save_file

    out = tmp_path_factory.mktemp("dense") / "model"
    shutil.copytree(bench_a, out)
    tensors = load_file(out / "model.safetensors")
    noise = torch.Generator().manual_seed(0)
    noisy = {n: t + 0.2 * t.std() * torch.randn(t.shape, generator=noise).to(t) for n, t in tensors.items()}
    save_file(noisy, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.fixture(scope="module")
def measured(files: dict[str, str], dense: Path, bench_a: Path) -> dict[str, Any]:
    names = [files[name] for name in ("toy_choice", "toy_rolling", "toy_written")]
    return evaluate_tasks(dense, names, bench_a, batch_size=2)


def own_run(path: Path, files: list[str], **options: Any) -> dict[str, Any]:
    """Plain lm-eval on a directory, as its command line runs it: {task: {metric,filter: value}}."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    arguments = {"pretrained": str(path)}
    manager = TaskManager(include_defaults=False)
    found = simple_evaluate(
        "hf", model_args=arguments, tasks=files, task_manager=manager, batch_size=2, device="cpu", bootstrap_iters=10,
        **options,
    )  # fmt: skip
    assert found is not None
    return dict(found["results"])


def test_the_same_values_as_plain_lm_eval(measured: dict[str, Any], files: dict[str, str], dense: Path) -> None:
    own = own_run(dense, [files[name] for name in ("toy_choice", "toy_rolling", "toy_written")])
    for task, metrics in measured["tasks"].items():
        for name, metric in metrics.items():
            assert metric["value"] == pytest.approx(own[task][f"{name},none"], rel=1e-6), (task, name)
            stderr = own[task][f"{name}_stderr,none"]
            assert stderr == "N/A" or metric["stderr"] == pytest.approx(stderr)
    assert set(measured["tasks"]) == {"toy_choice", "toy_rolling", "toy_written"}
    assert measured["task_settings"]["toy_written"]["num_fewshot"] == 1
    assert measured["tasks"]["toy_rolling"]["word_perplexity"]["stderr"] > 0


def test_rows_and_paired_differences(
    measured: dict[str, Any], files: dict[str, str], dense: Path, bench_a: Path
) -> None:
    other = evaluate_tasks(bench_a, [files["toy_choice"], files["toy_rolling"]], batch_size=2, save=False)
    for task in ("toy_choice", "toy_rolling"):
        for name, change in measured["tasks_paired"][task].items():
            expected = measured["tasks"][task][name]["value"] - other["tasks"][task][name]["value"]
            assert change["value"] == pytest.approx(expected, abs=1e-9) and change["count"] == len(DOCUMENTS)
    rows = [json.loads(line) for line in (dense / "moecompress/eval_samples/toy_choice.jsonl").read_text().splitlines()]
    mean = np.mean([row["metrics"]["acc"] for row in rows])
    assert len(rows) == len(DOCUMENTS) and mean == measured["tasks"]["toy_choice"]["acc"]["value"]
    assert len({row["doc_hash"] for row in rows}) == len(DOCUMENTS) - 1
    assert measured["tasks_reference"] == str(bench_a)
    assert measured["tasks_paired"]["toy_rolling"]["word_perplexity"]["higher"] > 0


def test_a_model_against_itself_is_no_different(files: dict[str, str], bench_a: Path) -> None:
    found = evaluate_tasks(bench_a, [files["toy_choice"]], bench_a, limit=3, save=False)
    assert {(c["value"], c["p"]) for c in found["tasks_paired"]["toy_choice"].values()} == {(0.0, None)}
    assert found["limit"] == 3 and found["task_settings"]["toy_choice"]["documents"] == 3


def test_groups_by_file_have_values_and_errors(files: dict[str, str], bench_a: Path) -> None:
    found = evaluate_tasks(bench_a, [files["toy"]], save=False)["tasks"]
    assert found["toy"]["acc"] == pytest.approx(found["toy_choice"]["acc"])  # the other member has no acc


def test_eval_json_keeps_what_was_measured_before(files: dict[str, str], dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    shutil.copytree(dense, out, ignore=shutil.ignore_patterns("moecompress"))
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 30)
    options = ("--windows", 2, "--length", 32)
    assert command("eval", out, "--tasks", f"{files['toy_choice']},{files['toy_rolling']}", "--limit", 2).code == 0
    assert command("eval", out, "--perplexity", text, *options).code == 0
    ended = command("eval", out, "--tasks", files["toy_choice"], "--num-fewshot", 0)
    assert ended.code == 0 and ended.out.startswith("task        toy_choice: acc 0.")
    found = read_json(out / "moecompress" / "eval.json")
    assert set(found["tasks"]) == {"toy_choice", "toy_rolling"} and found["perplexity"]["text"]["value"] > 1
    assert found["task_settings"]["toy_choice"]["limit"] is None and found["task_settings"]["toy_rolling"]["limit"] == 2
    assert (found["samples"], found["windows"]) == ("eval_samples", "eval_windows.jsonl")


@pytest.mark.slow
def test_recipes_with_tasks_and_plain_lm_eval_on_the_result(
    files: dict[str, str], bench_a: Path, tmp_path: Path
) -> None:
    passes = [{"quantize.rtn": {"bits": 4, "group_size": 32}}]
    for form in ("portable", "native"):
        (tmp_path / form).mkdir()
        wanted = {"tasks": [files["toy_choice"]], "limit": 4}
        recipe = write_recipe(tmp_path / form, bench_a, passes, output={"format": form}, evaluate=wanted)
        with pytest.MonkeyPatch.context() as patch:
            reload_here(patch)
            ended = command("run", recipe)
        assert ended.code == 0, ended.err
        found = read_json(tmp_path / form / "out" / "moecompress" / "eval.json")
        assert set(found["tasks_paired"]["toy_choice"]) == {"acc", "acc_norm"} and found["limit"] == 4
    portable, native = tmp_path / "portable" / "out", tmp_path / "native" / "out"
    assert "toy_choice" in (portable / "moecompress" / "report.md").read_text()
    own = own_run(portable, [files["toy_choice"]], limit=4)["toy_choice"]
    values = read_json(portable / "moecompress" / "eval.json")["tasks"]["toy_choice"]
    assert {name: own[f"{name},none"] for name in values} == {name: m["value"] for name, m in values.items()}
    # the native format: the line that the README gives
    line = "import moecompress; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    arguments = ["--model", "hf", "--model_args", f"pretrained={native}", "--device", "cpu", "--limit", "4"]
    arguments += ["--tasks", files["toy_choice"], "--output_path", str(tmp_path / "own")]
    done = subprocess.run([sys.executable, "-P", "-c", line, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = (tmp_path / "own").rglob("results*.json")
    values = read_json(native / "moecompress" / "eval.json")["tasks"]["toy_choice"]
    own = read_json(written)["results"]["toy_choice"]
    assert {name: own[f"{name},none"] for name in values} == {name: m["value"] for name, m in values.items()}


@pytest.mark.slow
def test_unknown_names_are_told_with_a_near_one(bench_a: Path) -> None:
    with pytest.raises(RecipeError, match="no task 'arc_esy'; did you mean 'arc_easy'"):
        evaluate_tasks(bench_a, ["arc_esy"])


def test_mistakes_are_told(bench_a: Path, tmp_path: Path, files: dict[str, str]) -> None:
    def refused(*names: str) -> str:
        with pytest.raises(RecipeError) as error:
            evaluate_tasks(bench_a, names, save=False)
        return str(error.value)

    assert "tasks: no file 'absent.yaml'" in refused("absent.yaml")
    assert "none given" in refused()
    (tmp_path / "broken.yaml").write_text("task: [unclosed")
    assert "broken.yaml: is no task file" in refused(str(tmp_path / "broken.yaml"))
    task = yaml.safe_load(Path(files["toy_choice"]).read_text())
    task["dataset_kwargs"] = {"data_files": {"test": str(tmp_path / "absent.jsonl")}}
    (tmp_path / "nodata.yaml").write_text(yaml.safe_dump(task))
    assert "absent.jsonl" in refused(str(tmp_path / "nodata.yaml"))
    unsafe = yaml.safe_load(Path(files["toy_choice"]).read_text()) | {"unsafe_code": True}
    (tmp_path / "unsafe.yaml").write_text(yaml.safe_dump(unsafe))
    assert "--humaneval FILE --allow-code-execution" in refused(str(tmp_path / "unsafe.yaml"))
    ended = command("eval", bench_a, "--tasks", "absent.yaml")
    assert ended.code == 2 and "no file 'absent.yaml'" in ended.err and "Traceback" not in ended.err


def test_data_that_must_be_downloaded_is_told(bench_a: Path, tmp_path: Path) -> None:
    file = tmp_path / "remote.yaml"
    file.write_text(yaml.safe_dump(CHOICE | {"dataset_path": "nobody/nothing-at-all", "test_split": "test"}))
    with pytest.raises((MachineError, RecipeError), match="nothing-at-all"):
        evaluate_tasks(bench_a, [str(file)], save=False)


def test_without_lm_eval_plan_and_eval_say_what_to_install(
    bench_a: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moecompress.tasknames.find_spec", lambda name: None)
    with pytest.raises(MachineError, match=r"pip install 'moecompress\[eval\]'"):
        evaluate_tasks(bench_a, ["piqa"])
    recipe = load_recipe(str(write_recipe(tmp_path, bench_a, evaluate={"tasks": ["piqa", "absent.yaml"]})))
    problems = make_plan(recipe).problems
    assert [problem.partition(". ")[0] for problem in problems] == [
        "evaluate.tasks: needs lm-eval, which is not installed",
        "evaluate.tasks: no file 'absent.yaml'",
    ]


def test_models_beyond_memory_are_refused(
    bench_a: Path, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "fits", lambda root: False)
    with pytest.raises(MachineError, match="one layer at a time"):
        evaluate_tasks(bench_a, [files["toy_choice"]], save=False)
    monkeypatch.setattr("moecompress.tasknames.os.sysconf", lambda name: 1000)
    recipe = load_recipe(str(write_recipe(tmp_path, bench_a, evaluate={"tasks": [files["toy_choice"]]})))
    assert ["do not fit into" in problem for problem in make_plan(recipe).problems] == [True]


def test_different_documents_are_no_pair() -> None:
    from moecompress.taskresults import TaskResults

    def side(digest: str) -> TaskResults:
        row = {"doc_id": 0, "doc_hash": digest, "filter": "none", "metrics": {"acc": 1.0}}
        return TaskResults({"t": {"acc": {"value": 1.0, "stderr": None}}}, {}, {"t": [row]})

    assert room._paired(side("a"), side("a"))["t"]["acc"]["count"] == 1
    with pytest.raises(CheckpointError, match="different documents"):
        room._paired(side("a"), side("b"))


def test_names_are_split_and_the_random_numbers_of_the_caller_are_left_alone(
    bench_a: Path, files: dict[str, str]
) -> None:
    import random

    import torch

    assert split_names(["a, b", "c.yaml,"]) == ("a", "b", "c.yaml")
    assert task_problems((), "x") == []
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]
    evaluate_tasks(bench_a, [files["toy_written"]], limit=1, save=False)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]
    assert before == after
    assert math.isfinite(before[2][0])
