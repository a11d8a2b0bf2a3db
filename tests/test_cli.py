from __future__ import annotations

import json
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from moecompress import cli
from moecompress.errors import MoecompressError, Stopped, UnsupportedModel
from moecompress.recipe import Recipe

Fake = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run the command line in this process."""

    def run(*arguments: str) -> Outcome:
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        printed = capsys.readouterr()
        return Outcome(int(ended.value.code or 0), printed.out, printed.err)

    return run


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Put a function in place of one of the package's and give the dict that collects its arguments."""

    def place(module: str, name: str, result: Any) -> dict[str, Any]:
        seen: dict[str, Any] = {}

        def function(*positional: Any, **named: Any) -> Any:
            seen.update(named, positional=positional)
            if isinstance(result, BaseException):
                raise result
            return result

        room = types.ModuleType(module)
        setattr(room, name, function)
        monkeypatch.setitem(sys.modules, module, room)
        return seen

    return place


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: some/model\npasses:\n  - quantize.rtn: {bits: 4}\n")
    return str(path)


def test_run_passes_everything_on_and_prints_the_directory(
    call: Callable[..., Outcome], fake: Fake, recipe: str
) -> None:
    seen = fake("moecompress.run", "run", Path("out/done"))
    options = ("--out", "a: b", "--set", "passes.0.quantize.rtn.bits=3", "--resume", "--memory", "8GiB")
    outcome = call("run", recipe, *options)
    assert (outcome.code, outcome.out) == (0, "out/done\n")
    (loaded,) = seen["positional"]
    assert isinstance(loaded, Recipe) and loaded.out == Path("a: b") and loaded.passes[0].params.bits == 3  # type: ignore[attr-defined]
    assert (seen["resume"], seen["restart"], seen["memory"]) == (True, False, 8 * 2**30)
    assert hasattr(seen["progress"], "step")


def test_run_defaults(call: Callable[..., Outcome], fake: Fake, recipe: str) -> None:
    seen = fake("moecompress.run", "run", Path("x"))
    assert call("run", recipe).code == 0
    assert (seen["resume"], seen["restart"], seen["memory"]) == (False, False, None)


@pytest.mark.parametrize(
    ("error", "code"), [(MoecompressError("wrong"), 2), (UnsupportedModel("odd"), 2), (Stopped("kept: --resume"), 75)]
)
def test_errors_of_the_user_are_one_message_and_a_code(
    call: Callable[..., Outcome], fake: Fake, recipe: str, error: MoecompressError, code: int
) -> None:
    fake("moecompress.run", "run", error)
    outcome = call("run", recipe)
    assert (outcome.code, outcome.out, outcome.err) == (code, "", f"{error}\n")


def test_our_bugs_show_a_traceback_and_ask_for_a_report(call: Callable[..., Outcome], fake: Fake, recipe: str) -> None:
    fake("moecompress.run", "run", KeyError("oops"))
    outcome = call("run", recipe)
    assert outcome.code == 1 and "Traceback" in outcome.err and "KeyError: 'oops'" in outcome.err
    assert outcome.err.endswith("Please report it with the text above and the recipe.\n")


def test_a_wrong_recipe_ends_before_anything_runs(call: Callable[..., Outcome], fake: Fake, recipe: str) -> None:
    seen = fake("moecompress.run", "run", Path("x"))
    outcome = call("run", recipe, "--set", "sede=1")
    assert outcome.code == 2 and "did you mean 'seed'?" in outcome.err and "Traceback" not in outcome.err
    assert not seen


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("run", "rtn-w4", "--memory", "much"), "missing key 'model'"),
        (("run", "rtn-w4", "--set", "model=m", "--memory", "much"), "--memory: 'much' is not a size"),
        (("run", "no-such-recipe"), "neither a file nor a catalogue recipe"),
        (("run",), "Missing argument"),
        (("run", "rtn-w4", "--nope"), "No such option"),
        (("conquer",), "No such command"),
        (("eval", "x", "--windows", "0"), "Invalid value for '--windows'"),
        (("verify", "no/such/dir"), "manifest.json: no such file"),
        (("inspect", "no/such/dir"), "not a directory"),
    ],
)
def test_mistakes_give_2(call: Callable[..., Outcome], arguments: tuple[str, ...], expected: str) -> None:
    outcome = call(*arguments)
    assert outcome.code == 2 and expected in " ".join(outcome.err.split())
    assert "Traceback" not in outcome.err


class FakePlan:
    def __init__(self, *problems: str) -> None:
        self.problems = problems

    def render(self) -> str:
        return "the plan"

    def to_json(self) -> dict[str, Any]:
        return {"peak_bytes": 1, "name": "é"}


def test_plan_prints_and_takes_the_memory(call: Callable[..., Outcome], fake: Fake, recipe: str) -> None:
    seen = fake("moecompress.plan", "make_plan", FakePlan())
    assert call("plan", recipe, "--memory", "1KiB") == Outcome(0, "the plan\n", "")
    assert seen["memory"] == 1024
    assert json.loads(call("plan", recipe, "--json").out) == {"peak_bytes": 1, "name": "é"}


def test_a_plan_with_problems_prints_all_of_them_and_gives_2(
    call: Callable[..., Outcome], fake: Fake, recipe: str
) -> None:
    fake("moecompress.plan", "make_plan", FakePlan("first", "second"))
    assert call("plan", recipe) == Outcome(2, "the plan\n", "first\nsecond\n")


def test_eval_passes_everything_on(call: Callable[..., Outcome], fake: Fake) -> None:
    located = fake("moecompress.stream.locate", "locate_model", Path("cache/ref"))
    result = {"perplexity": {"a": {"value": 7.25, "stderr": 0.5}}, "kl": {"a": 0.125}, "top1_agreement": {"a": 0.9}}
    seen = fake("moecompress.evaluate", "evaluate_dir", result)
    texts = ("--perplexity", "a.txt", "--perplexity", "python-stdlib:heldout")
    outcome = call("eval", "out", *texts, "--reference", "org/ref", "--windows", "3", "--length", "64")
    lines = outcome.out.splitlines()
    assert (outcome.code, outcome.err, len(lines)) == (0, "", 3)
    assert lines[0].startswith("perplexity  a: 7.25") and " ± 0.5" in lines[0]
    assert lines[1].startswith("kl          a: 0.125") and lines[1].endswith(" nats per token")
    assert lines[2] == "agreement   a: 90.0 % of the most likely tokens"
    assert seen["positional"] == (Path("out"), ("a.txt", "python-stdlib:heldout"), Path("cache/ref"))
    assert located["positional"] == ("org/ref",)
    assert (seen["windows"], seen["length"]) == (3, 64) and hasattr(seen["progress"], "step")
    assert json.loads(call("eval", "out", "--json").out) == result
    assert (seen["activation_bits"], seen["save"]) == (None, True)


def test_rounded_inputs_are_said_and_not_saved(call: Callable[..., Outcome], fake: Fake) -> None:
    seen = fake("moecompress.evaluate", "evaluate_dir", {"perplexity": {"a": {"value": 7.25, "stderr": None}}})
    lines = call("eval", "out", "--activation-bits", "8").out.splitlines()
    assert lines[0] == "inputs      rounded to int8 on request; nothing is saved" and lines[1].startswith("perplexity")
    assert (seen["activation_bits"], seen["save"]) == (8, False)
    assert json.loads(call("eval", "out", "--activation-bits", "8", "--json").out)["activation_bits"] == 8


def test_report_prints_the_files(call: Callable[..., Outcome], fake: Fake) -> None:
    seen = fake("moecompress.report.build", "write_report", [Path("a/report.md"), Path("a/report.html")])
    assert call("report", "a") == Outcome(0, "a/report.md\na/report.html\n", "")
    assert seen["positional"] == (Path("a"),)


def test_verify_says_what_is_wrong(call: Callable[..., Outcome], fake: Fake) -> None:
    fake("moecompress.inspect", "verify_dir", ["w: missing", "v: other bytes"])
    assert call("verify", "a") == Outcome(2, "", "a: w: missing\na: v: other bytes\n")
    fake("moecompress.inspect", "verify_dir", [])
    assert call("verify", "a").code == 0


def test_recipes_lists_the_catalogue(call: Callable[..., Outcome]) -> None:
    names = [line.split()[0] for line in call("recipes").out.splitlines()]
    assert "quickstart" in names and names == sorted(names)


def test_schema_and_doctor_print_json(call: Callable[..., Outcome]) -> None:
    assert json.loads(call("schema").out)["title"] == "moecompress recipe"
    assert json.loads(call("doctor", "--json").out)["kernels"]
    assert "torch: available" in call("doctor").out


def test_help_is_quick_and_needs_no_torch() -> None:
    code = (
        "import sys, time; start = time.process_time()\n"
        "from moecompress.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'transformers', 'datasets', 'matplotlib', 'torch'} & set(sys.modules)\n"
        "print('HEAVY', sorted(heavy), time.process_time() - start)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = done.stdout.splitlines()[-1]
    assert heavy.startswith("HEAVY []"), heavy
    assert float(heavy.split()[-1]) < 1.5
    assert "doctor" in done.stdout


def test_the_package_is_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "moecompress", "recipes"], capture_output=True, text=True, check=False, cwd="/"
    )
    assert done.returncode == 0 and "quickstart" in done.stdout


def test_a_closed_pipe_is_no_bug() -> None:
    done = subprocess.run(
        f"{sys.executable} -m moecompress schema | head -c 1", shell=True, capture_output=True, text=True, check=False
    )
    assert "bug" not in done.stderr
