"""The demo trainer: stopped and continued equals uninterrupted, bit for bit; the result loads in transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
SIZES = {
    "vocab-size": 300, "hidden-size": 32, "num-hidden-layers": 2, "num-attention-heads": 2, "num-key-value-heads": 1,
    "num-experts": 4, "num-experts-per-tok": 2, "moe-intermediate-size": 24, "head-dim": 16,
    "shared-expert-intermediate-size": 40, "window": 16, "batch": 4, "steps": 6, "warmup": 2,
}  # fmt: skip


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import train_demo_moe

    return train_demo_moe


@pytest.fixture
def run(trainer: Any, tmp_path: Path) -> Callable[..., int]:
    """The command line with the tiny sizes; keyword arguments override or add options."""
    for domain, words in (("code", "def f(x): return x + 1\n"), ("prose", "it was a dark and stormy night; ")):
        (tmp_path / "data" / domain / "deep").mkdir(parents=True)
        text = "<|endoftext|>\n".join(f"{words * 9} {i}\n" for i in range(12))
        (tmp_path / "data" / domain / "deep" / "a.txt").write_text(text, encoding="utf-8")

    def call(out: str, **options: Any) -> int:
        given = {**SIZES, **{key.replace("_", "-"): value for key, value in options.items()}}
        flags = [part for key, value in given.items() for part in (f"--{key}", str(value))]
        return int(trainer.main(["--data", str(tmp_path / "data"), "--out", str(tmp_path / out), *flags]))

    return call


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe"])
def test_stopped_and_continued_is_bit_equal(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert run("whole", family=family) == 0
    assert run("parts", family=family, max_steps=3) == 0
    assert not (tmp_path / "parts").exists()
    assert run("parts", family=family, max_steps=4) == 0
    capsys.readouterr()
    assert run("parts", family=family) == 0
    printed = capsys.readouterr().out
    assert "continuing after step 4" in printed and "held-out prose" in printed and "held-out code" in printed

    states = [(tmp_path / f"{name}.run" / "state.safetensors").read_bytes() for name in ("whole", "parts")]
    assert states[0] == states[1]  # float32 weights and both moments
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    assert all(tensor.dtype == torch.bfloat16 for tensor in whole.values())
    assert whole["model.layers.1.mlp.experts.3.up_proj.weight"].shape == (24, 32)
    assert ("model.layers.0.mlp.shared_expert.up_proj.weight" in whole) == (family == "qwen2_moe")

    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "parts", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and model.config.model_type == family
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "parts")
    ids = tokenizer("def f(x): return", return_tensors="pt").input_ids
    assert torch.isfinite(model(ids).logits).all()
    facts = json.loads((tmp_path / "parts" / "training.json").read_text(encoding="utf-8"))
    assert facts["settings"]["steps"] == 6 and set(facts["heldout_nats_per_token"]) == {"code", "prose"}


def test_training_learns(run: Callable[..., int], tmp_path: Path) -> None:
    def heldout(name: str) -> float:
        facts = json.loads((tmp_path / name / "training.json").read_text(encoding="utf-8"))
        return float(sum(facts["heldout_nats_per_token"].values()))

    assert run("short", steps=1) == 0
    assert run("long", steps=60) == 0
    assert heldout("long") < 0.7 * heldout("short")


def test_a_run_killed_before_its_first_checkpoint_starts_again(run: Callable[..., int], trainer: Any) -> None:
    def killed(*_: Any) -> bytes:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "_state", killed)
        run("parts", max_steps=3)
    assert run("parts") == 0


def test_the_mix_decides_which_domains_are_drawn(trainer: Any, run: Callable[..., int], tmp_path: Path) -> None:
    import demo_tokens
    import numpy as np

    corpus = {
        name: demo_tokens.Domain(np.full(50, value, dtype=np.uint32), np.zeros(20, dtype=np.uint32))
        for name, value in (("a", 1), ("b", 2))
    }
    mix = demo_tokens.parse_mix("a=1,b=3", ("a", "b"))
    assert mix == {"a": 0.25, "b": 0.75}
    drawn = demo_tokens.batch_of(corpus, mix, size=400, window=8, seed=0, step=5)
    assert drawn.shape == (400, 9)
    share = float((drawn == 2).double().mean())
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / 400) ** 0.5
    again = demo_tokens.batch_of(corpus, mix, size=400, window=8, seed=0, step=5)
    other = demo_tokens.batch_of(corpus, mix, size=400, window=8, seed=0, step=6)
    assert torch.equal(drawn, again) and not torch.equal(drawn, other)


def test_the_end_of_a_domain_is_not_trained_on(trainer: Any, run: Callable[..., int], tmp_path: Path) -> None:
    import demo_tokens
    import numpy as np

    assert run("parts", max_steps=1, heldout=0.2) == 0
    settings = {**json.loads((tmp_path / "parts.run" / "settings.json").read_text(encoding="utf-8"))}
    settings.pop("data")
    domain = demo_tokens.open_corpus(tmp_path / "parts.run", tmp_path / "data", settings)["code"]
    stream = np.fromfile(tmp_path / "parts.run" / "code.tokens", dtype=np.uint32)
    assert np.array_equal(np.concatenate([domain.train, domain.heldout]), stream)
    assert len(domain.heldout) == int(0.2 * len(stream))


def test_mistakes_are_told(run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("parts", max_steps=1) == 0
    assert run("parts", max_steps=1, lr=0.1) == 2
    assert "lr was 0.003, is 0.1" in capsys.readouterr().err
    (tmp_path / "data" / "code" / "more.txt").write_text("more", encoding="utf-8")
    assert run("parts", max_steps=1) == 2
    assert "data was" in capsys.readouterr().err
    assert run("other", mix="code=1,poems=2") == 2
    assert "weights of 0 or more for code, prose" in capsys.readouterr().err
    assert run("other2", window=5000) == 2
    assert "domain 'code'" in capsys.readouterr().err
    (tmp_path / "done").mkdir()
    assert run("done") == 2
    assert "it exists" in capsys.readouterr().err
