"""`answers`: replies against the model's own greedy generation, without padding; rows and masks against a loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import engine
import families
import pytest
import torch

from moecompress.calib import SourceSpec, build_token_set
from moecompress.calib.answers import answer
from moecompress.calib.options import AnswersOptions
from moecompress.calib.workshop import Workshop, seeded
from moecompress.errors import CalibrationError, RecipeError
from moecompress.recipe import load_recipe
from moecompress.stream.generate import growing
from moecompress.stream.model import StreamModel, open_model

END = 2  # the tiny models' end of text
VOCABULARY = 320


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers") / "model"
    return families.save_tiny("qwen3_moe", folder, dtype=torch.float32, vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> StreamModel:
    return open_model(checkpoint)


def prompts() -> list[list[int]]:
    return [row[:length].tolist() for row, length in zip(engine.random_ids(5, 9), (9, 3, 1, 5, 5), strict=True)]


@pytest.fixture(scope="module")
def own(checkpoint: Path) -> Any:
    return engine.own_model(checkpoint)


def own_reply(own: Any, prompt: list[int], max_tokens: int) -> list[int]:
    """Greedy, by the model's full forward on the growing text."""
    text = list(prompt)
    with torch.no_grad():
        while len(text) < len(prompt) + max_tokens and (text == prompt or text[-1] != END):
            text.append(int(own(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
    return text[len(prompt) :]


def test_greedy_replies_are_the_models_own_whatever_the_batch(own: Any, model: StreamModel, tmp_path: Path) -> None:
    with growing(model, "self", tmp_path) as grow:
        together = answer(grow, prompts(), max_tokens=6, ends=frozenset({END}))
        alone = [answer(grow, [prompt], max_tokens=6, ends=frozenset({END}))[0] for prompt in prompts()]
    with growing(model, "streamed", tmp_path) as grow:
        streamed = answer(grow, prompts(), max_tokens=6, ends=frozenset({END}))
    assert together == alone == streamed == [own_reply(own, prompt, 6) for prompt in prompts()]


def test_an_end_of_text_ends_a_reply_and_not_its_neighbours(model: StreamModel, tmp_path: Path) -> None:
    with growing(model, "self", tmp_path) as grow:
        free = answer(grow, prompts(), max_tokens=6, ends=frozenset())
        ends = frozenset({free[1][2]})
        cut = answer(grow, prompts(), max_tokens=6, ends=ends)
    for before, after in zip(free, cut, strict=True):
        stop = next((i + 1 for i, token in enumerate(before) if token in ends), len(before))
        assert after == before[:stop]
    assert len(cut[1]) <= 3


def test_sampled_replies_depend_on_the_seed_and_on_no_other_prompt(model: StreamModel, tmp_path: Path) -> None:
    def sampled(grow: Any, seed: int, chosen: list[int]) -> list[list[int]]:
        draws = [seeded(seed, "answers", i) for i in chosen]
        wanted = [prompts()[i] for i in chosen]
        return answer(grow, wanted, max_tokens=6, ends=frozenset(), temperature=1.5, top_p=0.9, generators=draws)

    with growing(model, "self", tmp_path) as grow:
        first, again, other = (sampled(grow, seed, [0, 1, 2, 3, 4]) for seed in (0, 0, 1))
        part = sampled(grow, 0, [3, 1])
    assert first == again != other
    assert part == [first[3], first[1]]


def build(model: StreamModel, tokenizer: Any, folder: Path, prompt_file: Path, **options: Any) -> Any:
    size = {key: options.pop(key) for key in ("samples", "length", "seed") if key in options}
    made = AnswersOptions(files=(str(prompt_file),), max_tokens=8, **options)
    spec = SourceSpec("answers", **{"samples": 8, "length": 12, **size}, options=made)
    workshop = Workshop(model, folder / "scratch", folder / "kept")
    return build_token_set("a", spec, tokenizer, vocab_size=VOCABULARY, cache_dir=folder / "kept", workshop=workshop)


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    words = "the quick brown fox jumps over the lazy dog".split()
    path.write_text("".join(json.dumps({"q": f"{word} {i}?"}) + "\n" for i, word in enumerate(words)))
    return path


def test_rows_hold_conversations_and_masks_tell_replies(
    own: Any, model: StreamModel, tokenizer: Any, tmp_path: Path, prompt_file: Path
) -> None:
    made = {
        select: build(model, tokenizer, tmp_path / select, prompt_file, field="q", select=select)
        for select in ("all", "reply", "prompt")
    }
    ids = made["all"].ids
    assert ids.shape == (8, 12) and made["all"].selected is None
    assert all(torch.equal(one.ids, ids) for one in made.values())
    assert torch.equal(made["reply"].selected, ~made["prompt"].selected)
    stream, marks = ids.flatten().tolist(), made["reply"].selected.flatten().tolist()
    texts = [json.loads(line)["q"] for line in prompt_file.read_text().splitlines()]
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    place, seen = 0, 0
    while place < len(stream):  # walk over prompt, reply, end of text
        prompt = next(p for p in encoded if stream[place : place + len(p)] == p[: len(stream) - place])
        reply = own_reply(own, prompt, 8)
        whole = [*prompt, *reply, *([] if reply[-1] in (0, END) else [0])]
        want = [False] * len(prompt) + [True] * len(reply) + [False]
        take = min(len(whole), len(stream) - place)
        assert stream[place : place + take] == whole[:take] and marks[place : place + take] == want[:take]
        place, seen = place + len(whole), seen + 1
    assert made["all"].origin["conversations"] == seen


def test_statistics_see_the_selected_tokens_only(
    model: StreamModel, tokenizer: Any, tmp_path: Path, prompt_file: Path
) -> None:
    from moecompress.stats.routing import RoutingCounts
    from moecompress.stream.collect import Collector
    from moecompress.stream.streams import run_layer, start_run

    totals = {}
    for select in ("all", "reply", "prompt"):
        tokens = build(model, tokenizer, tmp_path / select, prompt_file, field="q", select=select)
        run = start_run(model, tokens, tmp_path / f"hidden-{select}", batch_tokens=24, streams=("original",))
        collector = Collector(model.facts.layers[0].site, [RoutingCounts()], tokens.heldout)
        run_layer(model, model.read_layer(0), run, "original", collector=collector)
        totals[select] = collector.finished()["routing_counts"]["tokens"]
        if select == "reply":
            kept = [row for row in range(8) if row not in tokens.heldout]
            assert int(totals[select].sum()) == 2 * int(tokens.selected[kept].sum())
    assert torch.equal(totals["all"], totals["reply"] + totals["prompt"])


def test_a_stopped_generation_goes_on_from_its_finished_parts(
    model: StreamModel, tokenizer: Any, tmp_path: Path, prompt_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import moecompress.calib.answers as module

    whole = build(model, tokenizer, tmp_path / "whole", prompt_file, field="q", batch=2)
    calls: list[int] = []
    real = module.answer

    def stops(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "answer", stops)
    with pytest.raises(KeyboardInterrupt):
        build(model, tokenizer, tmp_path / "parts", prompt_file, field="q", batch=2)
    resumed = build(model, tokenizer, tmp_path / "parts", prompt_file, field="q", batch=2)
    assert resumed.digest == whole.digest
    assert len(list((tmp_path / "parts" / "kept").iterdir())) == 2  # the parts are gone
    before = len(calls)
    assert build(model, tokenizer, tmp_path / "parts", prompt_file, field="q", batch=2).digest == whole.digest
    assert len(calls) == before  # cached


def test_the_tokenizers_chat_template_is_used_where_there_is_one(
    model: StreamModel, tokenizer: Any, tmp_path: Path, prompt_file: Path
) -> None:
    plain = build(model, tokenizer, tmp_path / "plain", prompt_file, field="q")
    tokenizer.chat_template = (
        "{% for m in messages %}user: {{ m.content }}{% endfor %}{% if add_generation_prompt %} bot:{% endif %}"
    )
    try:
        chat = build(model, tokenizer, tmp_path / "chat", prompt_file, field="q")
        bare = build(model, tokenizer, tmp_path / "bare", prompt_file, field="q", template="none")
    finally:
        tokenizer.chat_template = None
    assert chat.origin["chat_template"] and tokenizer.decode(chat.ids[0]).startswith("user: ")
    assert bare.digest == plain.digest != chat.digest


def test_what_cannot_be_answered_is_said(model: StreamModel, tokenizer: Any, tmp_path: Path, prompt_file: Path) -> None:
    with pytest.raises(CalibrationError, match=r"9 conversations; needed: 999 x 12.*samples: "):
        build(model, tokenizer, tmp_path, prompt_file, field="q", samples=999)
    with pytest.raises(CalibrationError, match="no field 'text'"):
        build(model, tokenizer, tmp_path, prompt_file)
    with pytest.raises(CalibrationError, match="no tokenizer"):
        build(model, None, tmp_path, prompt_file, field="q")
    long = tmp_path / "long.txt"
    long.write_text("over the lazy dog " * 200)
    with pytest.raises(CalibrationError, match="none of 1 prompts.*at most 248 tokens"):
        build(model, tokenizer, tmp_path, long)


def test_a_recipe_generates_and_reports(
    tokenizer: Any, tmp_path: Path, prompt_file: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    source = tmp_path / "model"
    shutil.copytree(checkpoint, source)
    tokenizer.save_pretrained(source)
    engine.reload_here(monkeypatch)
    calibration = {
        "source": "answers",
        "files": [str(prompt_file)],
        "field": "q",
        "max_tokens": 8,
        "samples": 8,
        "length": 12,
    }
    recipe = engine.write_recipe(tmp_path, source, [{"prune.easy_ep": {"keep": 4}}], calibration=calibration)
    ran = engine.command("run", recipe)
    assert ran.code == 0, ran.err
    report = engine.read_json(tmp_path / "out" / "moecompress" / "report.json")
    assert report["calibration"][0]["origin"]["reply_tokens"] > 0
    resolved = load_recipe(tmp_path / "out" / "moecompress" / "recipe.yaml")
    assert resolved.calibration == load_recipe(recipe).calibration
    with pytest.raises(RecipeError, match="max_tokns.*did you mean 'max_tokens'"):
        load_recipe(engine.write_recipe(tmp_path, source, calibration={**calibration, "max_tokns": 3}))
