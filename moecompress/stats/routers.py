"""What it takes to bring a router's outputs back to the original model's: second moments and missed outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from moecompress.numerics.routing import leading
from moecompress.stats.base import Reduce, RouterObservation, State, Statistic
from moecompress.stats.routing import keep_lowest
from moecompress.types import MoESite

_DEPENDS = frozenset({"activations", "attention", "norms", "router"})


@dataclass(frozen=True)
class RouterMoments(Statistic):
    """Sums over a router's inputs x [C] and what its outputs lack, d = wanted - given [R].

    top: None = every token counts for every output; else row i counts the tokens where i is among the `top` largest
    wanted outputs or among the chosen experts (EAC-MoE, 2508.01625). span: (first, end) of the rows that are summed.
    gram: float32 [C, C] without `top`, [end - first, C, C] with it: sum x x^T. residual: float64 [end - first, C], sum
    d x^T. tokens: int64 [end - first].
    """

    columns: int
    span: tuple[int, int]
    top: int | None = None

    name: ClassVar[str] = "router_moments"
    depends_on: ClassVar[frozenset[str]] = _DEPENDS
    reduce: ClassVar[Mapping[str, Reduce]] = {"gram": "sum", "residual": "sum", "tokens": "sum"}

    def init(self, site: MoESite | None = None) -> State:
        rows = self.span[1] - self.span[0]
        shared = () if self.top is None else (rows,)
        return {
            "gram": torch.zeros(*shared, self.columns, self.columns),
            "residual": torch.zeros(rows, self.columns, dtype=torch.float64),
            "tokens": torch.zeros(rows, dtype=torch.int64),
        }

    def observe_router(self, state: State, seen: RouterObservation) -> None:
        rows = slice(*self.span)
        x, missed = seen.inputs.float(), (seen.wanted - seen.given).double()[:, rows]
        if self.top is None:
            state["gram"].addmm_(x.t(), x)
            state["residual"] += missed.t() @ x.double()
            state["tokens"] += x.shape[0]
            return
        mask = leading(seen.wanted, seen.chosen, self.top)[:, rows]
        state["residual"] += (missed * mask).t() @ x.double()
        state["tokens"] += mask.sum(0)
        for row in range(mask.shape[1]):
            part = x[mask[:, row]]
            state["gram"][row].addmm_(part.t(), part)


@dataclass(frozen=True)
class RouterSample(Statistic):
    """Up to `n` tokens as the router sees them, those with the smallest hashes of their rows.

    inputs: float32 [m, columns]. wanted: float32 [m, outputs]. rows: int64 [m]. m <= n, ascending by row.
    """

    n: int
    columns: int
    outputs: int

    name: ClassVar[str] = "router_sample"
    depends_on: ClassVar[frozenset[str]] = _DEPENDS
    reduce: ClassVar[Mapping[str, Reduce]] = {"inputs": "concat", "rows": "concat", "wanted": "concat"}

    def init(self, site: MoESite | None = None) -> State:
        return {
            "inputs": torch.empty(0, self.columns),
            "rows": torch.empty(0, dtype=torch.int64),
            "wanted": torch.empty(0, self.outputs),
        }

    def state_bytes(self, site: MoESite) -> int:
        return self.n * (4 * (self.columns + self.outputs) + 8)

    def observe_router(self, state: State, seen: RouterObservation) -> None:
        new = {"inputs": seen.inputs.float(), "rows": seen.rows, "wanted": seen.wanted.float()}
        for key, value in new.items():
            state[key] = torch.cat([state[key], value])
        self.settle(state)

    def settle(self, state: State) -> None:
        keep_lowest(state, self.n, 0)
