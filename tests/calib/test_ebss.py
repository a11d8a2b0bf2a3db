"""EBSS on a toy of known tables (greedy, brute force) and on models (from scratch in float64, batches, resuming)."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine
import families
import pytest
import torch
from torch import Tensor

from moecompress.calib import SourceSpec, build_token_set, load_tokenizer
from moecompress.calib.ebss import describe, first_tokens, forbidden_ids
from moecompress.calib.options import BALANCED, PAPER, Balance, EbssOptions, EbssSettings
from moecompress.calib.search import Corpus, search
from moecompress.calib.workshop import Workshop
from moecompress.errors import CalibrationError
from moecompress.numerics.ebss import sigma
from moecompress.stream.generate import Growing, growing
from moecompress.stream.model import StreamModel, open_model

DEMO = Path(__file__).resolve().parents[1] / "checkpoints" / "bench-a"
EXPERTS = 4


class Toy:
    """A 'model' of tables: log P float64 [V] and the experts of the last token are functions of the prefix."""

    def __init__(self, vocabulary: int = 4, layers: int = 2, top_k: int = 2) -> None:
        self.vocabulary, self.layers, self.top_k = vocabulary, layers, top_k
        self.ids, self.saves = torch.empty(0), False

    def draw(self, prefix: tuple[int, ...], what: str) -> torch.Generator:
        digest = hashlib.sha256(f"{prefix} {what}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:6], "little"))

    def logprobs(self, prefix: tuple[int, ...]) -> Tensor:
        made = torch.randn(self.vocabulary, dtype=torch.float64, generator=self.draw(prefix, "p"))
        return made.log_softmax(-1)

    def routes(self, prefix: tuple[int, ...]) -> Tensor:
        noise = torch.rand(self.layers, EXPERTS, generator=self.draw(prefix, "r"))
        return noise.argsort(-1)[:, : self.top_k]

    def begin(self, ids: Tensor) -> Any:
        self.ids = ids
        prefixes = [tuple(row) for row in ids.tolist()]
        routed = torch.stack([self.routes(prefix) for prefix in prefixes], 1)[:, :, None]
        return SimpleNamespace(logprobs=torch.stack([self.logprobs(p) for p in prefixes]), routed=routed)

    def extend(self, parents: Tensor, tokens: Tensor) -> Any:
        return self.begin(torch.cat([self.ids[parents], tokens[:, None]], 1))

    def save(self, note: str, tensors: dict[str, Tensor]) -> None: ...
    def restore(self, note: str) -> dict[str, Tensor] | None: ...

    def measured(self, text: tuple[int, ...]) -> tuple[float, Tensor]:
        """(log P without the first token, counts [L, E]) of a text, by a loop over its prefixes."""
        counts = torch.zeros(self.layers, EXPERTS, dtype=torch.int64)
        likelihood = sum(float(self.logprobs(text[:i])[text[i]]) for i in range(1, len(text)))
        for i in range(1, len(text) + 1):
            for layer, chosen in enumerate(self.routes(text[:i]).tolist()):
                counts[layer, chosen] += 1
        return likelihood, counts


def run(toy: Toy, settings: EbssSettings, length: int, firsts: list[int], **options: Any) -> Any:
    free = torch.zeros(toy.vocabulary, dtype=torch.bool)
    given = {"experts": EXPERTS, "forbidden": free, "seed": 0, "corpus": Corpus()}
    return search(toy, torch.tensor(firsts), range(len(firsts)), settings, length, **{**given, **options})


def test_width_one_without_balance_is_greedy() -> None:
    toy = Toy(vocabulary=6)
    found = run(toy, dataclasses.replace(PAPER, width=1, tau=1e12), 8, [0, 3, 5])
    for row in found.ids.tolist():
        for t in range(1, 8):
            assert row[t] == int(toy.logprobs(tuple(row[:t])).argmax())


@pytest.mark.parametrize("tau", [1.2, 0.05])
def test_a_wide_beam_finds_the_optimum_of_all_texts(tau: float) -> None:
    toy, length = Toy(), 4
    found = run(toy, dataclasses.replace(PAPER, width=toy.vocabulary ** (length - 1), tau=tau), length, [0, 1, 2, 3])

    def cost(text: tuple[int, ...]) -> float:
        likelihood, counts = toy.measured(text)
        return -likelihood / length + float(sigma(counts, length)) / tau

    for first, row in enumerate(found.ids.tolist()):
        texts = [(first, *rest) for rest in itertools.product(range(toy.vocabulary), repeat=length - 1)]
        assert tuple(row) == min(texts, key=cost)


def test_narrow_beams_follow_the_deferred_rule_step_by_step() -> None:
    toy, width, tau, length = Toy(vocabulary=5), 2, 0.1, 6
    found = run(toy, dataclasses.replace(PAPER, width=width, tau=tau), length, [2])
    beams: list[tuple[int, ...]] = [(2,)]
    for l in range(1, length):  # noqa: E741 - the paper's letter
        scored = []
        for text in beams:
            likelihood, counts = toy.measured(text)
            deferred = float(sigma(counts, l)) / tau  # of the parent, for all its children
            for v in range(toy.vocabulary):
                after = likelihood + float(toy.logprobs(text)[v])
                scored.append((-after / (l + 1) + deferred, (*text, v)))
        beams = [text for _, text in sorted(scored)[:width]]

    def cost(text: tuple[int, ...]) -> float:
        likelihood, counts = toy.measured(text)
        return -likelihood / length + float(sigma(counts, length)) / tau

    assert tuple(found.ids[0].tolist()) == min(beams, key=cost)


def test_sums_of_the_search_are_those_of_the_texts_it_returns() -> None:
    toy = Toy(vocabulary=6)
    for settings in (PAPER, dataclasses.replace(BALANCED, special="allow", no_repeat_ngram=0)):
        found = run(toy, settings, 7, [0, 1, 2])
        for row, likelihood, counts in zip(found.ids.tolist(), found.likelihood.tolist(), found.counts, strict=True):
            want, want_counts = toy.measured(tuple(row))
            assert likelihood == pytest.approx(want, rel=1e-12) and torch.equal(counts, want_counts)


def test_sentences_do_not_depend_on_their_neighbours() -> None:
    toy = Toy(vocabulary=6)
    for settings in (PAPER, BALANCED):
        together = run(toy, settings, 7, [0, 1, 2]).ids
        for number in range(3):
            alone = search(
                toy,
                torch.tensor([number]),
                [number],
                settings,
                7,
                experts=EXPERTS,
                forbidden=torch.zeros(6, dtype=torch.bool),
                seed=0,
                corpus=Corpus(),
            )
            assert torch.equal(alone.ids[0], together[number])


def test_every_option_changes_the_search_as_it_says() -> None:
    toy = Toy(vocabulary=6)
    loose = dataclasses.replace(BALANCED, no_repeat_ngram=0, max_run=0)
    assert torch.equal(  # one likely token, drawn once = greedy
        run(toy, dataclasses.replace(loose, draws=1, top_token_k=1, width=1), 7, [1]).ids,
        run(toy, dataclasses.replace(PAPER, width=1), 7, [1]).ids,
    )
    assert not torch.equal(run(toy, loose, 9, [1]).ids, run(toy, loose, 9, [1], seed=1).ids)
    assert not torch.equal(
        run(toy, dataclasses.replace(loose, temperature=9.0), 9, [1]).ids, run(toy, loose, 9, [1]).ids
    )
    guarded = run(toy, dataclasses.replace(loose, no_repeat_ngram=2), 20, [0, 1, 2]).ids
    for row in guarded.tolist():
        pairs = list(itertools.pairwise(row))
        assert len(set(pairs)) == len(pairs)
    short = run(Toy(vocabulary=2), dataclasses.replace(PAPER, max_run=2), 12, [0, 1]).ids
    assert all(len(set(row[i : i + 3])) > 1 for row in short.tolist() for i in range(10))
    stuck = run(Toy(vocabulary=2), dataclasses.replace(PAPER, no_repeat_ngram=1, max_run=1), 6, [0]).ids
    assert stuck.shape == (1, 6)  # both tokens are banned: the guard gives way
    forbidden = torch.tensor([True, False, False, True, False, False])
    assert not {0, 3} & set(run(toy, loose, 9, [1], forbidden=forbidden).ids.flatten().tolist())
    lacking = Corpus(torch.tensor([[900, 900, 900, 0]] * 2), 1350)
    wide = dataclasses.replace(PAPER, tau=0.01, width=16)
    plain = run(toy, wide, 7, [1, 2], corpus=lacking).counts.sum(0)
    aware = run(toy, dataclasses.replace(wide, scope="corpus"), 7, [1, 2], corpus=lacking).counts.sum(0)
    assert int(aware[:, 3].sum()) > int(plain[:, 3].sum())


def sampled(model: StreamModel, folder: Path, samples: int, length: int, tokenizer: Any = None, **options: Any) -> Any:
    seed = options.pop("seed", 0)
    special = {"special": "allow"} if tokenizer is None else {}
    balance = options.pop("balance", None)
    spec = SourceSpec(
        "ebss",
        samples=samples,
        length=length,
        seed=seed,
        options=EbssOptions(**{**special, **options}),
        balance=balance,
    )
    workshop = Workshop(model, folder / "scratch", folder / "kept")
    size = model.facts.vocab_size
    return build_token_set("e", spec, tokenizer, vocab_size=size, cache_dir=folder / "kept", workshop=workshop)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> StreamModel:
    return open_model(families.save_tiny("qwen3_moe", tmp_path_factory.mktemp("ebss") / "model", dtype=torch.float32))


@pytest.fixture(scope="module")
def demo() -> StreamModel:
    return open_model(DEMO)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "jamba", "minimax"])
def test_scores_equal_a_recomputation_from_scratch_in_float64(family: str, tmp_path: Path) -> None:
    """After many reorderings of the cache: a full forward over the final ids, and the router's choices in it."""
    path = families.save_tiny(family, tmp_path / "model", dtype=torch.float32)
    model = open_model(path)
    site = model.facts.moe_layers[0].site
    assert site is not None
    known: dict[str, Any] = {"experts": site.num_experts, "seed": 0, "corpus": Corpus()}
    known["forbidden"] = torch.zeros(model.facts.vocab_size, dtype=torch.bool)
    with growing(model, "self", tmp_path) as grow:
        found = search(grow, torch.tensor([5, 9]), [0, 1], PAPER, 12, **known)
    own = engine.own_model(path).double()
    own.set_experts_implementation("eager")  # the default kernel has no float64
    chosen: list[Tensor] = []
    for layer in model.facts.moe_layers:
        assert layer.site is not None
        experts = own.get_submodule(f"{layer.name}.{layer.site.experts}")
        experts.register_forward_pre_hook(lambda _m, args: chosen.append(args[1].reshape(-1, args[1].shape[-1])))
    for row, likelihood, counts in zip(found.ids, found.likelihood.tolist(), found.counts, strict=True):
        want, routes = 0.0, torch.zeros_like(counts)
        with torch.no_grad():
            for t in range(1, 13):  # every prefix by itself: a few families' full forward is not causal
                chosen.clear()
                logits = own(input_ids=row[None, :t], use_cache=False).logits[0, -1]
                if t < 12:
                    want += float(logits.log_softmax(-1)[row[t]])
                for layer_index, ids in enumerate(chosen):
                    routes[layer_index, ids[-1]] += 1
        assert likelihood == pytest.approx(want, abs=1e-4)
        assert torch.equal(counts, routes)


@pytest.mark.parametrize("family", ["gemma4_text", "deepseek_v4", "nemotron_h", "qwen3_vl_moe", "phimoe", "aria_text"])
def test_unusual_families_sample_and_are_balanced(family: str, tmp_path: Path) -> None:
    model = open_model(families.save_tiny(family, tmp_path / "model"))
    made = sampled(model, tmp_path, 4, 5, balance=Balance(pool=2.0, ratio=4.0))
    assert made.ids.shape[1] == 5 and made.origin["balance"]["pool"] == 8
    assert made.origin["balance"]["chosen"]["least_tokens"] >= made.origin["balance"]["drawn"]["least_tokens"]


def test_batches_generators_and_seeds(tiny: StreamModel, tmp_path: Path) -> None:
    whole = sampled(tiny, tmp_path / "a", 6, 10, mode="paper")
    assert torch.equal(sampled(tiny, tmp_path / "b", 6, 10, mode="paper", batch=1).ids, whole.ids)
    assert torch.equal(sampled(tiny, tmp_path / "c", 6, 10, mode="paper", generator="streamed").ids, whole.ids)
    assert torch.equal(sampled(tiny, tmp_path / "d", 3, 10, mode="paper").ids, whole.ids[:3])
    assert not torch.equal(sampled(tiny, tmp_path / "e", 6, 10, mode="paper", generator="rtn4").ids, whole.ids)
    assert not torch.equal(sampled(tiny, tmp_path / "f", 6, 10, mode="paper", seed=1).ids, whole.ids)
    assert whole.ids.shape == (6, 10) and 0 <= int(whole.ids.min()) and int(whole.ids.max()) < 128


@pytest.mark.parametrize("generator", ["self", "streamed"])
def test_a_stopped_search_resumes_to_the_same_ids(
    generator: str, tiny: StreamModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)  # what survives a power cut is not asked here
    options = {"generator": generator, "batch": 2, "scope": "corpus"}
    whole = sampled(tiny, tmp_path / "whole", 6, 10, **options)
    real, calls = Growing.extend, []

    def stops(self: Growing, parents: Tensor, tokens: Tensor) -> Any:
        calls.append(1)
        if len(calls) == 14:  # in the middle of the second batch
            raise KeyboardInterrupt
        return real(self, parents, tokens)

    monkeypatch.setattr(Growing, "extend", stops)
    with pytest.raises(KeyboardInterrupt):
        sampled(tiny, tmp_path / "parts", 6, 10, **options)
    resumed = sampled(tiny, tmp_path / "parts", 6, 10, **options)
    assert torch.equal(resumed.ids, whole.ids)
    assert len(calls) - 14 == {"self": 18, "streamed": 14}[generator]  # the stopped batch again, or its rest
    again = len(calls)
    assert sampled(tiny, tmp_path / "parts", 6, 10, **options).digest == whole.digest and len(calls) == again
    assert not (tmp_path / "parts" / "scratch").exists() or not any((tmp_path / "parts" / "scratch").iterdir())


def test_first_tokens_are_uniform_and_special_ids_can_be_banned(demo: StreamModel) -> None:
    tokenizer = load_tokenizer(DEMO)
    banned = forbidden_ids(5000, tokenizer, True, "x")
    assert bool(banned[tokenizer.eos_token_id]) and bool(banned[len(tokenizer) :].all())
    assert int(banned.sum()) == len(tokenizer.all_special_ids) + 5000 - len(tokenizer)
    assert int(forbidden_ids(4096, tokenizer, False, "x").sum()) == 4096 - len(tokenizer)
    four = torch.tensor([False, True, False, False, False])
    counts = first_tokens(range(4000), four, 3).bincount(minlength=5)
    assert counts[1] == 0 and bool(((counts[[0, 2, 3, 4]] - 1000).abs() < 120).all())
    with pytest.raises(CalibrationError, match="special: allow"):
        forbidden_ids(10, None, True, "x")


def test_smaller_tau_buys_balance_with_likelihood_and_beats_text(demo: StreamModel, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(DEMO)
    made = {
        tau: sampled(demo, tmp_path / str(tau), 12, 40, tokenizer, search="beam", scope="sequence", tau=tau).origin
        for tau in (1.2, 0.1, 0.02)
    }
    sigmas, losses = ([made[tau][key] for tau in (1.2, 0.1, 0.02)] for key in ("sigma_sentence", "nll"))
    assert sigmas == sorted(sigmas, reverse=True) and losses == sorted(losses)
    text = "\n".join(path.read_text() for path in sorted(DEMO.parents[1].glob("test_*.py")))
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"][: 12 * 40]).view(12, 40)
    with growing(demo, "self", tmp_path) as grow:
        routed = grow.begin(ids).routed
    counts = torch.nn.functional.one_hot(routed, 16).sum((2, 3)).transpose(0, 1)
    real = describe(ids, counts, torch.zeros(12))
    assert made[0.02]["sigma_sentence"] < real["sigma_sentence"] and made[0.02]["sigma_set"] < real["sigma_set"]


def test_the_guard_keeps_texts_varied_and_the_report_says_so(demo: StreamModel, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(DEMO)
    ours = sampled(demo, tmp_path / "ours", 6, 96, tokenizer)
    paper = sampled(demo, tmp_path / "paper", 6, 96, tokenizer, mode="paper")
    assert ours.origin["distinct_4"] == 1.0 and ours.origin["repetitive_rows"] == 0
    assert paper.origin["distinct_4"] < 0.6 and paper.origin["repetitive_rows"] > 0
    assert tokenizer.eos_token_id not in set(ours.ids.flatten().tolist())
    assert ours.origin["settings"] == dataclasses.asdict(BALANCED)
    assert paper.origin["settings"] == dataclasses.asdict(PAPER)
    assert ours.origin["tokens_per_second"] > 0 and ours.origin["peak_rss_bytes"] > 0


def test_what_is_described() -> None:
    counts = torch.tensor([[[2, 2, 0]], [[1, 2, 1]]])  # two sentences of two tokens, two experts each
    told = describe(torch.tensor([[1, 2], [1, 1]]), counts, torch.tensor([-3.0, -1.0]))
    assert told["nll"] == 2.0 and told["experts_without_tokens"] == 0
    assert told["tokens_per_expert"] == {"least": 1, "most": 4}
    assert told["sigma_set"] == pytest.approx(float(torch.tensor([3 / 4, 4 / 4, 1 / 4]).std()))


def test_a_recipe_samples_reports_and_can_be_repeated(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = families.save_tiny("qwen3_moe", tmp_path / "model", vocab_size=320)
    tokenizer.save_pretrained(source)
    engine.reload_here(monkeypatch)
    calibration = {"source": "ebss", "samples": 8, "length": 16, "cache": str(tmp_path / "kept")}
    recipe = engine.write_recipe(tmp_path, source, calibration=calibration)
    ran = engine.command("run", recipe)
    assert ran.code == 0, ran.err
    origin = engine.read_json(tmp_path / "out" / "moecompress" / "report.json")["calibration"][0]["origin"]
    assert origin["sigma_set"] > 0 and origin["tokens_per_expert"]["most"] > 0 and origin["mode"] == "balanced"
    monkeypatch.setattr(Growing, "begin", lambda *_: pytest.fail("generated again"))
    again = engine.command("run", recipe, "--out", tmp_path / "again")
    assert again.code == 0, again.err


def test_a_run_stopped_while_sampling_keeps_what_it_has(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = families.save_tiny("qwen3_moe", tmp_path / "model", vocab_size=320)
    tokenizer.save_pretrained(source)
    engine.reload_here(monkeypatch)
    calibration = {"source": "ebss", "samples": 8, "length": 16, "batch": 2}
    recipe = engine.write_recipe(tmp_path, source, calibration=calibration)
    real, calls = Growing.begin, []

    def interrupts(self: Growing, ids: Tensor) -> Any:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, ids)

    monkeypatch.setattr(Growing, "begin", interrupts)
    stopped = engine.command("run", recipe)
    assert stopped.code == 75 and "calibration: stopped after" in stopped.err and len(calls) == 3
    assert engine.command("run", recipe, "--resume").code == 0
    assert len(calls) == 5  # the batch that was stopped, and the last
