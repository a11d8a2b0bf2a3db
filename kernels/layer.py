"""What a backend is told about the weights it is to run: plain frozen data, made of integers and words.

A layer is a set of experts, or one Linear, in records of the native format: one row of bytes per expert, described
by a `Record`. The description travels through operators as text (`Layer.text`), so that graphs can hold it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Literal

Values = Literal["raw", "symmetric", "binary", "int", "float"]
Function = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]


@dataclass(frozen=True)
class Matrix:
    """One matrix [rows, columns] inside a record; offsets are bytes from the row's start, -1 = not there.

    bits: 1, 2, 3, 4, 8, or 16 for a matrix without codes. group: columns that share a scale (all of them when per
    channel). dtype: "bfloat16", "float16" or "float32", of the scales, or of the matrix itself when raw.
    codes: a little-endian bit stream per row, padded with zeros to whole 32-bit words. scales: [rows, groups].
    values: what code u means: symmetric (u - 2^(bits-1)) * s; binary (2u - 1) * s; int (u - z) * s with z uint8
    [rows, groups] at `zeros`; float the same with z in `dtype`; raw: no codes. Scales may be negative.
    rounding: 0, or the bits (4, 8) to which each token's input of this matrix is rounded, in float32: with
    m = 2^(rounding-1) - 1 and step = max|x| * (clip / m), or 1 for a token of zeros, x becomes
    step * clamp(round_half_even(x / step), -m - 1, m).
    """

    rows: int
    columns: int
    bits: int
    group: int
    values: Values
    dtype: str
    codes: int
    scales: int = -1
    zeros: int = -1
    rounding: int = 0
    clip: float = 1.0

    @property
    def groups(self) -> int:
        return self.columns // self.group


@dataclass(frozen=True)
class Record:
    """matrices: (gate_up, down) of an expert, or the one matrix of a Linear. row_bytes: R."""

    matrices: tuple[Matrix, ...]
    row_bytes: int


@dataclass(frozen=True)
class Activation:
    """From gate_up's output to down's input, computed in float32: f(min(gate, limit)) * (clamp(up, +-limit) + shift).

    f: silu is x * sigmoid(alpha * x); gelu is exact, gelu_tanh the approximation; relu2 is relu squared.
    gated: False = f of everything and no `up`. interleaved: rows alternate gate, up instead of all gates first.
    limit: None = no clamp.
    """

    function: Function
    gated: bool = True
    interleaved: bool = False
    alpha: float = 1.0
    limit: float | None = None
    shift: float = 0.0


@dataclass(frozen=True)
class Layer:
    """experts: E. records: the layouts k; which of them an expert has is in its slot map. bias: experts have biases.

    activation: None for a Linear, which is a layer of one expert with one matrix.
    """

    experts: int
    records: tuple[Record, ...]
    activation: Activation | None = None
    bias: bool = False

    @cached_property
    def text(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @cached_property
    def digest(self) -> int:
        """Of the text, 40 bits."""
        return int.from_bytes(hashlib.sha256(self.text.encode()).digest()[:5])

    def uneven(self) -> str | None:
        """Why its experts cannot be one stack of matrices, or None."""
        shapes = [[(m.rows, m.columns) for m in record.matrices] for record in self.records]
        if any(shape != shapes[0] for shape in shapes):
            return "experts have different sizes"
        if self.activation is not None:
            (up_rows, _), (_, width) = shapes[0]
            if up_rows != width * (2 if self.activation.gated else 1):
                return f"gate_up gives {up_rows} values and down reads {width}"
        return None

    @property
    def columns(self) -> int:
        """Inputs of the layer (H)."""
        return self.records[0].matrices[0].columns

    @property
    def rows(self) -> int:
        """Outputs of the layer."""
        return self.records[0].matrices[-1].rows


@lru_cache(maxsize=1024)
def parse(text: str) -> Layer:
    """The layer of `Layer.text`. Raises ValueError for any other text."""
    try:
        data = json.loads(text)
        records = tuple(
            Record(tuple(Matrix(**matrix) for matrix in record["matrices"]), record["row_bytes"])
            for record in data["records"]
        )
        activation = Activation(**data["activation"]) if data["activation"] else None
        return Layer(data["experts"], records, activation, data["bias"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the text of a layer: {text[:60]!r}; expected: what Layer.text gives") from error
