"""pass@k: the estimator, what the sandbox allows, how completions are cut, and the whole way with a scripted model."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine import command, read_json

from moecompress import humaneval, sandbox
from moecompress.calib.tokenizer import load_tokenizer
from moecompress.errors import CalibrationError, MachineError, RecipeError
from moecompress.humaneval import Problem, Sampling, complete, evaluate_humaneval, pass_at_k, read_problems, truncate
from moecompress.sandbox import Outcome, Sandbox, open_sandbox, run_program

ADD = Problem("t/0", 'def add(a, b):\n    """ The sum. """\n', "add", "def check(f):\n    assert f(2, 3) == 5\n")
TWICE = Problem("t/1", 'def twice(a):\n    """ Two of it. """\n', "twice", "def check(f):\n    assert f(4) == 8\n")
PLUS, MINUS = "    return a + b\n", "    return a - b\n"


@pytest.mark.parametrize("n", range(1, 7))
def test_pass_at_k_is_the_mean_over_all_choices(n: int) -> None:
    for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
        right = [i < correct for i in range(n)]
        chosen = [any(choice) for choice in itertools.combinations(right, k)]
        assert pass_at_k(n, correct, k) == pytest.approx(sum(chosen) / len(chosen))


@pytest.mark.parametrize(("n", "correct", "k"), [(2, 3, 1), (2, 0, 3), (2, -1, 1), (2, 1, 0)])
def test_pass_at_k_refuses_nonsense(n: int, correct: int, k: int) -> None:
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(n, correct, k)


@pytest.fixture(scope="module")
def box() -> Sandbox:
    return open_sandbox()


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert sorted([2, 1]) == [1, 2]", "passed"),
        ("print('x' * 100)\nimport sys\nsys.stdout.flush()", "passed"),
        ("import os\nassert os.listdir('.') == [] and not os.environ", "passed"),
        ("import sys\nassert __name__ == '__main__' and '\ud800'", "passed"),
        ("assert False", "AssertionError"),
        ("def (", "SyntaxError"),
        ("input()", "EOFError"),
        ("def f(n): return f(n + 1)\nf(0)", "RecursionError"),
        ("x = bytearray(3 << 30)", "MemoryError"),
        ("open('x', 'wb').write(bytes(4 << 20))", "OSError"),
        ("import torch", "ModuleNotFoundError"),
        ("import sys\nsys.exit(0)", "SystemExit"),
        ("import os\nos._exit(0)", "killed"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", ("killed", "passed")),  # process 1 survives it
    ],
)
def test_what_programs_may_do(box: Sandbox, program: str, reason: str | tuple[str, ...]) -> None:
    found = run_program(box, program)
    assert found.reason in ((reason,) if isinstance(reason, str) else reason)
    assert found.passed == (found.reason == "passed")


@pytest.mark.parametrize("program", ["while True: pass", "import os, time\nos.dup(1)\ntime.sleep(60)"])
def test_programs_end_in_time(box: Sandbox, program: str) -> None:
    start = time.monotonic()
    quick = Sandbox(1, box.memory_bytes, box.prefix, box.user)
    assert run_program(quick, program).reason in ("timeout", "killed")
    assert time.monotonic() - start < 10


@pytest.mark.skipif(shutil.which("ps") is None, reason="no ps")
def test_nothing_outlives_its_program(box: Sandbox) -> None:
    memory = box.memory_bytes + os.getpid()  # an argument that only this program has
    program = "import os, time\ntry:\n    os.setsid()\nexcept OSError:\n    pass\ntime.sleep(60)"
    assert run_program(Sandbox(1, memory, box.prefix, box.user), program).reason == "timeout"

    def left() -> bool:
        found = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
        return f" {memory} " in found.stdout

    for _ in range(50):  # a process that was killed may need a moment to go
        if not left():
            return
        time.sleep(0.1)
    raise AssertionError("it is still there")


def test_no_network_where_the_system_can_take_it_away(box: Sandbox) -> None:
    if box.network:
        pytest.skip("this system does not let a user drop the network")
    program = """
import errno, socket
try:
    socket.create_connection(("127.0.0.1", 9), 1)
except OSError as error:
    code = error.errno
assert code == errno.ENETUNREACH
"""
    assert run_program(box, program).reason == "passed"


def test_no_further_processes_for_an_ordinary_user(box: Sandbox) -> None:
    if os.geteuid() == 0 and not box.user:
        pytest.skip("root, and the interpreter cannot be read by another user: no limit on processes")
    assert run_program(box, "import os\nos.fork()").reason == "BlockingIOError"


def test_a_sandbox_that_runs_nothing_is_no_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "run_program", lambda box, program: Outcome(False, "killed"))
    with pytest.raises(MachineError, match="runs nothing here"):
        open_sandbox()


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (PLUS, PLUS),
        (PLUS + "\ndef other():\n    pass", PLUS),
        (PLUS + "print(add(1, 2))", PLUS[:-1]),
        ("    if a:\n        return b\n    return a + b\nif True:\n", "    if a:\n        return b\n    return a + b"),
        ("def other(): pass", ""),
        ("# a comment at the margin", ""),
        ("", ""),
    ],
)
def test_completions_end_with_the_function(text: str, kept: str) -> None:
    assert truncate(text, ADD.prompt) == kept


def test_a_prompt_without_a_newline_may_go_on_with_any_word() -> None:
    assert truncate("import_me()\n", "    x = ") == "import_me()\n"


def write_problems(path: Path, problems: list[Problem]) -> Path:
    path.write_text("".join(json.dumps(vars(problem)) + "\n" for problem in problems))
    return path


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("{", ":1: is not JSON"),
        ('{"task_id": "a", "prompt": "b", "entry_point": "c"}', ":1: no text under test"),
        ("[]", "no text under task_id, prompt, entry_point, test"),
    ],
)
def test_bad_files_are_told(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "problems.jsonl"
    file.write_text(text)
    with pytest.raises(CalibrationError, match=said):
        read_problems(file)
    with pytest.raises(CalibrationError, match="no such file"):
        read_problems(tmp_path / "absent.jsonl")


class Scripted:
    """A model that writes what it is told, one text per call and sequence; eight calls hold every prompt."""

    device = torch.device("cpu")
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=4096))

    def __init__(self, tokenizer: Any, texts: list[str]) -> None:
        self.tokenizer, self.texts = tokenizer, iter(texts)
        self.options: list[dict[str, Any]] = []

    def modules(self) -> tuple[()]:
        return ()

    def generate(self, ids: torch.Tensor, num_return_sequences: int, **options: Any) -> torch.Tensor:
        self.options.append(options)
        written = [self.tokenizer(next(self.texts), add_special_tokens=False) for _ in range(num_return_sequences)]
        longest = max(len(row["input_ids"]) for row in written)
        pad = [self.tokenizer.eos_token_id]
        rows = [row["input_ids"] + pad * (longest - len(row["input_ids"])) for row in written]
        return torch.cat([ids.expand(num_return_sequences, -1), torch.tensor(rows)], dim=1)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch, bench_a: Path) -> Any:
    """Put a scripted model in the place of every directory's."""
    tokenizer: Any = load_tokenizer(bench_a)
    made: dict[str, Scripted] = {}

    def place(**texts: list[str]) -> dict[str, Scripted]:
        made.update({name: Scripted(tokenizer, written) for name, written in texts.items()})
        monkeypatch.setattr(humaneval, "open_in_memory", lambda root, *_: (made[root.name], tokenizer))
        return made

    return place


def test_greedy_and_reference(scripted: Any, tmp_path: Path) -> None:
    double = "    return 2 * a\n\n\nprint(twice(1))\n"
    made = scripted(mine=[PLUS, double], base=[MINUS, double])
    file, out = write_problems(tmp_path / "toy.jsonl", [ADD, TWICE]), tmp_path / "mine"
    out.mkdir()
    found = evaluate_humaneval(out, file, tmp_path / "base", allow_code_execution=True)
    assert found["tasks"] == {"toy": {"pass@1": {"value": 1.0, "stderr": 0.0}}}
    change = found["tasks_paired"]["toy"]["pass@1"]
    assert (change["value"], change["higher"], change["lower"], change["test"]) == (0.5, 1, 0, "sign")
    assert all(options["do_sample"] is False for options in made["mine"].options)
    written = read_json(out / "moecompress" / "eval.json")
    assert written["tasks"] == found["tasks"] and written["samples"] == "eval_samples"
    settings = written["task_settings"]["toy"]
    assert settings["documents"] == 2 and settings["sandbox"]["seconds"] == 5
    rows = [json.loads(line) for line in (out / "moecompress" / settings["samples"]).read_text().splitlines()]
    assert [row["completions"][0]["passed"] for row in rows] == [True, True]
    assert rows[1]["completions"][0]["text"] == "    return 2 * a\n\n"


def test_several_samples(scripted: Any, tmp_path: Path) -> None:
    made = scripted(mine=[PLUS] * 3 + [MINUS] * 9)
    file = write_problems(tmp_path / "toy.jsonl", [ADD, TWICE])
    options: Any = {"allow_code_execution": True, "save": False}
    found = evaluate_humaneval(tmp_path / "mine", file, samples_per_task=12, limit=1, **options)
    values = {name: metric["value"] for name, metric in found["tasks"]["toy"].items()}
    assert values == {"pass@1": pytest.approx(3 / 12), "pass@10": 1.0}  # ten of twelve hold one of the three
    assert [options["temperature"] for options in made["mine"].options] == [0.8, 0.8]  # batches of 8 and 4


def test_off_unless_allowed(tmp_path: Path) -> None:
    file = write_problems(tmp_path / "toy.jsonl", [ADD])
    with pytest.raises(RecipeError, match="--allow-code-execution"):
        evaluate_humaneval(tmp_path, file, allow_code_execution=False)
    ended = command("eval", tmp_path, "--humaneval", file)
    assert ended.code == 2 and "--allow-code-execution" in ended.err and "Traceback" not in ended.err
    with pytest.raises(RecipeError, match="temperature 0"):
        evaluate_humaneval(tmp_path, file, allow_code_execution=True, samples_per_task=2, temperature=0.0)


def test_a_real_model_writes_the_same_for_the_same_seed(bench_a: Path) -> None:
    from moecompress.tasks import open_in_memory

    model, tokenizer = open_in_memory(bench_a, "cpu")
    sampling = Sampling(3, 0.8, max_new_tokens=6, batch_size=2)
    first = complete(model, tokenizer, ADD, sampling, 0)
    torch.rand(5)
    assert complete(model, tokenizer, ADD, sampling, 0) == first and len(first) == 3
    greedy = complete(model, tokenizer, ADD, Sampling(max_new_tokens=6), 0)
    ids = torch.tensor([tokenizer(ADD.prompt)["input_ids"]])
    for _ in range(6):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert greedy == [truncate(tokenizer.decode(ids[0])[len(tokenizer.decode(ids[0, :-6])) :], ADD.prompt)]
    long = Problem("t/2", "x = 1\n" * 5000, "x", "")
    with pytest.raises(CalibrationError, match="t/2: .* tokens of prompt"):
        complete(model, tokenizer, long, sampling, 0)
