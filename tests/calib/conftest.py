"""A tiny byte-level BPE tokenizer in a directory, made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

EOS = "<|endoftext|>"
WORDS = "the quick brown fox jumps over the lazy dog while seven experts route tokens to a shared gate".split()


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    root = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS).save_pretrained(root)
    return root


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Path) -> Any:
    from moecompress.calib import load_tokenizer

    return load_tokenizer(tokenizer_dir)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Forty documents in one text file, document i naming its number."""
    path = tmp_path / "corpus.txt"
    documents = [f"document {i}: " + " ".join(WORDS[i % 7 :] * 3) + "\n" for i in range(40)]
    path.write_text(f"{EOS}\n".join(documents), encoding="utf-8")
    return path
