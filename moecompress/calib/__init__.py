"""Token sets: text from files, datasets or the standard library -> [N, T] ids, hashed and cached.

`build_token_set` is the entry; `resolve_text`, `windows` serve evaluation; `load_tokenizer` serves both.
"""

from moecompress.calib.sources import resolve_text
from moecompress.calib.spec import CalibrationSource, SourceSpec
from moecompress.calib.tokenizer import load_tokenizer
from moecompress.calib.tokens import build_token_set, make_token_set, windows

__all__ = [
    "CalibrationSource",
    "SourceSpec",
    "build_token_set",
    "load_tokenizer",
    "make_token_set",
    "resolve_text",
    "windows",
]
