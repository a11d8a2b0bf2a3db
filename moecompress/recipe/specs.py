"""The sections of a recipe as frozen pydantic models; `recipe.py` reads them from YAML."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, field_validator

from moecompress.calib.options import Balance, Options
from moecompress.sizes import parse_size

Text = Annotated[str, Field(min_length=1)]


class Spec(BaseModel):
    """Frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class CalibrationSpec(Spec):
    """One token set: where its text comes from, how many sequences, how long, how they are drawn.

    heldout: fraction of the sequences that no pass trains on (errors are measured there). The keys behind it
    belong to single sources (`recipe.calibration`) and are None, or their default, for the others; `options` holds
    those of sources that run the model, and a mixture's parts. balance: how rows are chosen for their routing.
    """

    source: str
    samples: int = 128
    length: int = 512
    seed: int = 0
    heldout: float = 0.125
    files: tuple[str, ...] | None = None
    field: str = "text"
    name: str | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    manifest: str | None = None
    options: SerializeAsAny[Options] | None = None
    balance: Balance | None = None


class OutputSpec(Spec):
    """Where the result goes and how it is stored. `dir` left out: `out/` and the end of the model's name."""

    dir: Text | None = None
    format: Literal["auto", "portable", "native", "dense"] = "auto"
    shard_size: str = "4GiB"

    @field_validator("shard_size")
    @classmethod
    def _is_size(cls, value: str) -> str:
        parse_size(value)
        return value

    @property
    def shard_bytes(self) -> int:
        """Largest size of one shard, in bytes."""
        return parse_size(self.shard_size)


class EvaluateSpec(Spec):
    """What is measured on the result. perplexity: text files, up to `windows` pieces of `length` tokens each.

    tasks: built-in names of lm-eval or YAML files, `limit` documents of each (all when it is left out).
    """

    perplexity: tuple[Text, ...] = ()
    tasks: tuple[Text, ...] = ()
    limit: int | None = Field(None, ge=1)
    length: int = Field(512, ge=2)
    windows: int = Field(40, ge=1)


class RecipeHead(Spec):
    """The plain keys at the top of a recipe. model: a directory, or a hub id with an optional `revision`."""

    model: Text = Field(description="a directory or a hub id, also as --set model=...")
    revision: Text | None = None
    trust_remote_code: bool = False
    seed: int = Field(0, ge=0)


SECTIONS = ("calibration", "passes", "output", "evaluate")  # the other keys at the top
