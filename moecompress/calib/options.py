"""The keys of calibration sources that run the model, and of `balance`, as frozen pydantic models."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
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


@dataclass(frozen=True)
class EbssSettings:
    """Every choice of an EBSS search; see `EbssOptions`."""

    tau: float = 1.2
    width: int = 4
    scope: Literal["sequence", "corpus"] = "sequence"
    search: Literal["beam", "stochastic"] = "beam"
    draws: int = 2
    top_token_k: int = 64
    temperature: float = 1.0
    no_repeat_ngram: int = 0
    max_run: int = 0
    special: Literal["allow", "ban"] = "allow"


PAPER = EbssSettings()
BALANCED = EbssSettings(tau=0.05, scope="corpus", search="stochastic", no_repeat_ngram=4, max_run=3, special="ban")


class EbssOptions(Generation):
    """Texts that the model samples from itself, balanced over its experts (MoEQuant, 2505.03804).

    mode: `paper` = the published search; `balanced` = ours. Every other key, where given, replaces the mode's value.
    tau: divides the imbalance; smaller = more balance, less likelihood. width: beams kept per sentence. scope:
    imbalance of the sentence alone, or together with the batches finished before. search: the likeliest children of a
    beam, or `draws` of them drawn at `temperature` among the `top_token_k` likeliest. no_repeat_ngram: no n tokens come
    twice in a sentence (0 = off). max_run: equal tokens in a row (0 = off). special: whether special tokens may come.
    """

    mode: Literal["balanced", "paper"] = "balanced"
    tau: float | None = Field(None, gt=0)
    width: int | None = Field(None, ge=1)
    scope: Literal["sequence", "corpus"] | None = None
    search: Literal["beam", "stochastic"] | None = None
    draws: int | None = Field(None, ge=1)
    top_token_k: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, gt=0)
    no_repeat_ngram: int | None = Field(None, ge=0)
    max_run: int | None = Field(None, ge=0)
    special: Literal["allow", "ban"] | None = None

    def settings(self) -> EbssSettings:
        """The mode's values with the given ones in their place."""
        given = {item.name: getattr(self, item.name) for item in fields(EbssSettings)}
        chosen = {name: value for name, value in given.items() if value is not None}
        return replace(PAPER if self.mode == "paper" else BALANCED, **chosen)

    def rows_at_once(self, samples: int) -> int:
        """Sentences that advance together. A corpus needs finished batches, so it always has several."""
        if self.settings().scope == "corpus":
            return self.batch or 32
        return super().rows_at_once(samples)


class Balance(Options):
    """Rows chosen for their routing from a pool of `pool` times `samples` rows.

    Every expert gets min(available, ratio * k * length / experts) tokens of the rows that passes train on (EAQuant's
    rule), with more rows than `samples` where that takes them and `grow` is on. fill: the other rows, as `drawn`, or
    those that make the experts' use `even`. coverage: share of all experts that must get the rule's tokens; what
    happens otherwise is `short`: a line in the report, or an error.
    """

    ratio: float = Field(2.0, gt=0)
    pool: float = Field(4.0, ge=1)
    grow: bool = True
    fill: Literal["drawn", "even"] = "drawn"
    coverage: float = Field(1.0, ge=0, le=1)
    short: Literal["report", "error"] = "report"
