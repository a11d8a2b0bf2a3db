"""How experts turn their inputs (`types.Turn`) in a native checkpoint: tensors beside the records, and their layout.

`<experts>.turn_<projection>_first` and `_second`: float32 [n, b, b] as bytes, uint8 [n, 4 b b], so that no loader
converts them; `_order`: int32 [n, c]. n is 1 where all experts share one turn, else the number of experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moecompress.checkpoint.writer import Entry, tensor_entry
from moecompress.errors import CheckpointError, message
from moecompress.types import PROJECTIONS, ExpertWeights, Projection, Turn

PREFIX = "turn_"
_ORTHOGONAL = 1e-3  # what R R^T may miss the identity by: damage is far more, float32 far less


@dataclass(frozen=True)
class TurnLayout:
    """The turns of one projection. block: b. columns: c. count: n. order, second: whether those parts exist."""

    projection: Projection
    block: int
    columns: int
    count: int
    order: bool = False
    second: bool = False

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Leaf name -> dtype and shape."""
        rotation = (torch.uint8, (self.count, 4 * self.block**2))
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {self._leaf("first"): rotation}
        if self.order:
            found[self._leaf("order")] = (torch.int32, (self.count, self.columns))
        if self.second:
            found[self._leaf("second")] = rotation
        return found

    def turn(self, values: Mapping[str, Tensor], expert: int) -> Turn:
        """The turn of one expert, as views of the stored tensors by leaf name."""
        row = expert if self.count > 1 else 0

        def rotation(part: str) -> Tensor:
            return values[self._leaf(part)][row].view(torch.float32).view(self.block, self.block)

        order = values[self._leaf("order")][row] if self.order else None
        return Turn(rotation("first"), order, rotation("second") if self.second else None)

    def _leaf(self, part: str) -> str:
        return f"{PREFIX}{self.projection}_{part}"


def turn_entries(module: str, experts: Sequence[ExpertWeights]) -> tuple[tuple[TurnLayout, ...], tuple[Entry, ...]]:
    """What the turns of one layer's experts are in a shard. Raises ValueError when only some experts turn alike."""
    layouts: list[TurnLayout] = []
    entries: list[Entry] = []
    for projection in PROJECTIONS:
        turns = [expert.turn(projection) for expert in experts]
        if all(turn is None for turn in turns):
            continue
        kept = turns[:1] if all(turn is turns[0] for turn in turns) else turns
        columns = experts[0].projection(projection).shape[1]
        made = [_described(projection, turn, columns, len(kept)) for turn in kept]
        if len(set(made)) > 1:
            raise ValueError(f"{module} {projection}: experts turn their inputs in {len(set(made))} different ways")
        layouts.append(made[0])
        for leaf in made[0].tensors():
            part = leaf.rpartition("_")[2]
            rows = [_stored(getattr(turn, part)) for turn in kept]
            entries.append(tensor_entry(f"{module}.{leaf}", torch.stack(rows)))
    return tuple(layouts), tuple(entries)


def with_turns(
    experts: Sequence[ExpertWeights], layouts: Sequence[TurnLayout], read: Callable[[str], Tensor]
) -> tuple[ExpertWeights, ...]:
    """Experts with their turns; one object where all share it. read: a tensor by its leaf name."""
    made = list(experts)
    for layout in layouts:
        values = {leaf: read(leaf) for leaf in layout.tensors()}
        turns = [layout.turn(values, row) for row in range(layout.count)]
        for index, expert in enumerate(made):
            made[index] = expert.with_turn(layout.projection, turns[index if layout.count > 1 else 0])
    return tuple(made)


def check_turn(name: str, value: Tensor, block: int) -> None:
    """Raises CheckpointError unless every stored rotation is orthogonal and every order a permutation."""
    if value.dtype == torch.int32:
        if not torch.equal(value.sort(-1).values, torch.arange(value.shape[1], dtype=torch.int32).expand_as(value)):
            raise CheckpointError(message(name, "is no permutation", then="download the checkpoint again"))
        return
    rotations = value.view(torch.float32).view(-1, block, block)
    off = (rotations @ rotations.mT - torch.eye(block)).abs().max()
    if not float(off) < _ORTHOGONAL:
        raise CheckpointError(message(name, "is no rotation", then="download the checkpoint again"))


def _described(projection: Projection, turn: Turn | None, columns: int, count: int) -> TurnLayout:
    if turn is None:
        raise ValueError(f"{projection}: some experts turn their inputs and some do not")
    return TurnLayout(projection, turn.first.shape[0], columns, count, turn.order is not None, turn.second is not None)


def _stored(value: Tensor) -> Tensor:
    if not value.is_floating_point():
        return value.to(torch.int32)
    return value.float().contiguous().view(torch.uint8).reshape(-1)
