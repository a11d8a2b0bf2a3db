"""The model's own tokenizer, loaded from its directory, and its identity."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moecompress.errors import CheckpointError, message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# One of these must be there: without any, transformers 5 returns an empty tokenizer and no error.
VOCABULARY = tuple(
    "tokenizer.json tokenizer.model tiktoken.model sentencepiece.bpe.model spiece.model tekken.json vocab.json "
    "vocab.txt *.tiktoken".split()
)


def load_tokenizer(model_dir: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in a local model directory; nothing is downloaded.

    Raises CheckpointError when the directory has no vocabulary file or transformers cannot read it.
    """
    where = f"tokenizer of {model_dir}"
    if not any(next(model_dir.glob(pattern), None) for pattern in VOCABULARY):
        then = "copy the original model's tokenizer files there, or calibrate with `source: tokens`"
        raise CheckpointError(message(where, "no vocabulary file", f"one of {', '.join(VOCABULARY)}", then))
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(model_dir), local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # damaged files surface as almost any type, down to the Rust side's bare Exception
        text = " ".join(str(error).split())[:400]
        raise CheckpointError(message(where, f"cannot be loaded ({type(error).__name__}: {text})")) from error
    if len(tokenizer) <= len(tokenizer.get_added_vocab()):
        raise CheckpointError(message(where, "the vocabulary is empty", then="check tokenizer_config.json"))
    return tokenizer


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of what decides the ids: the fast tokenizer's own state, or class and vocabulary; and eos."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        state.pop("truncation", None)  # set by calls, not part of the tokenizer's identity
        state.pop("padding", None)
    else:
        state = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    text = json.dumps([state, tokenizer.eos_token_id], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
