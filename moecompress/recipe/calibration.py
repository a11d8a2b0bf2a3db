"""What a recipe may write about calibration: the keys of each source, alone or as a part of a mixture."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import Field

from moecompress.calib.options import AnswersOptions, Balance, EbssOptions, Options
from moecompress.recipe.specs import Spec, Text

Files = Annotated[tuple[Text, ...], Field(min_length=1)]


class _Source(Spec):
    """Keys of every source. The subclasses say what a recipe may write; passes see a `CalibrationSpec`."""

    samples: int = Field(128, ge=1)
    length: int = Field(512, ge=2)
    seed: int = Field(0, ge=0)
    heldout: float = Field(0.125, ge=0, lt=1)
    balance: Balance | None = None


class _Part(Spec):
    """Keys of every part of a mixture. share: its weight against the other parts."""

    share: float = Field(gt=0)


class _Text(Spec):
    """Plain text files."""

    source: Literal["text"]
    files: Files


class _Jsonl(Spec):
    """One JSON object per line; `field` names the text, or is a template such as "{question} {answer}"."""

    source: Literal["jsonl"]
    files: Files
    field: Text = "text"


class _Datasets(Spec):
    """For the `datasets` library: a hub id (pin `revision`), a local directory, or a format with `files`."""

    source: Literal["datasets"]
    name: Text
    config: Text | None = None
    split: Text = "train"
    field: Text = "text"
    revision: Text | None = None
    files: Files | None = None


class _Manifest(Spec):
    """A calibration manifest: a shipped name or the path of a file."""

    source: Literal["manifest"]
    manifest: Text


class _Tokens(Spec):
    """Ready tokens: one safetensors file with an integer tensor [N, T]."""

    source: Literal["tokens"]
    files: Annotated[tuple[Text, ...], Field(min_length=1, max_length=1)]


class _Answers(AnswersOptions):
    """Prompts and the model's own replies."""

    source: Literal["answers"]


class _Ebss(EbssOptions):
    """Texts that the model samples from itself."""

    source: Literal["ebss"]


class TextSource(_Source, _Text):
    __doc__ = _Text.__doc__


class TextPart(_Part, _Text):
    __doc__ = _Text.__doc__


class JsonlSource(_Source, _Jsonl):
    __doc__ = _Jsonl.__doc__


class JsonlPart(_Part, _Jsonl):
    __doc__ = _Jsonl.__doc__


class DatasetsSource(_Source, _Datasets):
    __doc__ = _Datasets.__doc__


class DatasetsPart(_Part, _Datasets):
    __doc__ = _Datasets.__doc__


class ManifestSource(_Source, _Manifest):
    __doc__ = _Manifest.__doc__


class ManifestPart(_Part, _Manifest):
    __doc__ = _Manifest.__doc__


class TokensSource(_Source, _Tokens):
    __doc__ = _Tokens.__doc__


class TokensPart(_Part, _Tokens):
    __doc__ = _Tokens.__doc__


class AnswersSource(_Source, _Answers):
    __doc__ = _Answers.__doc__


class AnswersPart(_Part, _Answers):
    __doc__ = _Answers.__doc__


class EbssSource(_Source, _Ebss):
    __doc__ = _Ebss.__doc__


class EbssPart(_Part, _Ebss):
    __doc__ = _Ebss.__doc__


AnyPart = Annotated[
    TextPart | JsonlPart | DatasetsPart | ManifestPart | TokensPart | AnswersPart | EbssPart,
    Field(discriminator="source"),
]


class MixOptions(Options):
    """Several sources, each with a `share` of the rows."""

    source: Literal["mix"]
    parts: Annotated[tuple[AnyPart, ...], Field(min_length=2)]


class MixSource(_Source, MixOptions):
    __doc__ = MixOptions.__doc__


CALIBRATION_SOURCES: Mapping[str, type[Spec | Options]] = MappingProxyType(
    {
        "text": TextSource,
        "jsonl": JsonlSource,
        "datasets": DatasetsSource,
        "manifest": ManifestSource,
        "tokens": TokensSource,
        "answers": AnswersSource,
        "ebss": EbssSource,
        "mix": MixSource,
    }
)
