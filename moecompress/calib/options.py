"""The keys of calibration sources that run the model, and of `balance`, as frozen pydantic models."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from moecompress.types import Generator

Text = Annotated[str, Field(min_length=1)]


class Options(BaseModel):
    """Frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Generation(Options):
    """Where the generating model is, and how it works.

    generator: `self` = all layers in memory as they are stored; `rtn4` = their experts as 4-bit codes; `streamed` = one
    layer at a time, for models larger than memory. batch: sequences that advance together. cache: a folder in which
    token ids are kept between runs. force: go on even where the estimate is above 12 hours.
    """

    generator: Generator = "self"
    batch: int | None = Field(None, ge=1)
    cache: Text | None = None
    force: bool = False

    def rows_at_once(self, samples: int) -> int:
        """Sequences that advance together: `batch`, or 32, or all of them where every step reads the model anew."""
        return self.batch or (samples if self.generator == "streamed" else 32)


class AnswersOptions(Generation):
    """Prompts from `files` (text: documents; jsonl: `field`), each followed by the model's own reply.

    template: `auto` = the tokenizer's chat template where there is one; `none` = the bare text. max_tokens: of a reply.
    temperature: 0 = greedy. top_p: smallest set of tokens with this probability. select: which tokens passes see.
    """

    files: Annotated[tuple[Text, ...], Field(min_length=1)]
    field: Text = "text"
    template: Literal["auto", "none"] = "auto"
    max_tokens: int = Field(256, ge=1)
    temperature: float = Field(0.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    select: Literal["all", "prompt", "reply"] = "all"
