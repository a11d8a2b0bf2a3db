"""The parts around the layers in another basis of the residual stream: embedding, final norm, head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moecompress.stream.fold import norm_offset, same_values
from moecompress.stream.model import StreamModel
from moecompress.stream.outer import outer_weights
from moecompress.stream.prelude import logits, record
from moecompress.stream.residual import Rotate, refused

_ROWS = 4096  # rows of a vocabulary matrix in float32 at a time
_TOLERANCE = 2e-2  # of the largest value: the stored dtype's rounding of embedding and head
_WHERE = "outside the layers"


@dataclass(frozen=True)
class Outer:
    """Module names of the weights that read and write the residual stream outside the layers.

    offset: 1 where the final norm multiplies by 1 + weight, else 0.
    """

    embedding: str
    norm: str
    head: str
    offset: float


def find_outer(model: StreamModel) -> Outer:
    """The parts, as far as names and one run through the final norm tell; errors as in `vocabulary`."""
    skeleton = model.skeleton
    embedding, head = vocabulary(model)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    size = model.facts.hidden_size
    hidden = torch.randn(1, 4, size, generator=torch.Generator().manual_seed(0))
    read: dict[str, Tensor] = {}
    handles = [skeleton.get_submodule(head).register_forward_pre_hook(lambda _m, args: read.update(head=args[0]))]
    with torch.no_grad(), outer_weights(skeleton, model.layers_name, model.read_outer):
        for name, module in skeleton.named_modules():
            weight = module._parameters.get("weight")
            if weight is not None and weight.shape == (size,) and not name.startswith(model.layers_name + "."):
                handles.append(module.register_forward_hook(partial(_keep, seen, name)))
        try:
            logits(skeleton, model.layers, torch.zeros(1, 4, dtype=torch.int64), hidden)
        finally:
            for handle in handles:
                handle.remove()
    norm = next((n for n, (x, y) in seen.items() if same_values(x, hidden) and same_values(y, read["head"])), None)
    if norm is None:
        raise refused(_WHERE, "the head does not read a norm of the last layer's output")
    offset = _offset(model, norm)
    return Outer(f"{embedding}.weight", f"{norm}.weight", f"{head}.weight", offset)


def vocabulary(model: StreamModel) -> tuple[str, str]:
    """Module names of embedding and head.

    Raises UnsupportedModel where more than these and one norm stands around the layers (a vision tower, position
    embeddings, a projection).
    """
    skeleton = model.skeleton
    names = {module: name for name, module in skeleton.named_modules()}
    embedding, head = (names.get(part()) for part in (skeleton.get_input_embeddings, skeleton.get_output_embeddings))
    if embedding is None or head is None:
        raise refused(_WHERE, "the model has no embedding or no head")
    outside = [name for name in model.key_map.assemblies if not name.startswith(model.layers_name + ".")]
    others = [name for name in outside if name.rpartition(".")[0] not in (embedding, head)]
    if len(others) != 1:
        raise refused(_WHERE, f"more than a norm takes part: {', '.join(others[:3])}")
    return embedding, head


def _offset(model: StreamModel, norm: str) -> float:
    module = model.skeleton.get_submodule(norm)
    if module._parameters.get("bias") is not None:
        raise refused(_WHERE, f"{norm} subtracts a mean or adds a bias, which no rotation keeps")
    empty = module._parameters["weight"]
    module._parameters["weight"] = nn.Parameter(model.read_outer(f"{norm}.weight").float(), requires_grad=False)
    try:
        with torch.no_grad():
            return norm_offset(module, torch.zeros(1, model.facts.hidden_size), _WHERE, norm)
    finally:
        module._parameters["weight"] = empty


def _keep(seen: dict[str, tuple[Tensor, Tensor]], name: str, _module: nn.Module, args: Any, out: Any) -> None:
    if args and isinstance(args[0], Tensor) and isinstance(out, Tensor):
        seen[name] = (args[0], out)


def rotated_outer(model: StreamModel, rotate: Rotate) -> Mapping[str, Callable[[], Tensor]]:
    """Module name -> reads its weight for hidden states x Q instead of x, rounded once to the stored dtype.

    Embedding rows are rotated; the final norm's weight moves into the head, whose columns are rotated: so a head that
    shares the embedding's weights does so no longer. Proved on a few tokens; raises UnsupportedModel.
    """
    outer = find_outer(model)
    norm = model.read_outer(outer.norm)
    scale = norm.float() + outer.offset
    made: dict[str, Callable[[], Tensor]] = {
        outer.embedding: lambda: _by_rows(model.read_outer(outer.embedding), rotate),
        outer.norm: lambda: torch.full_like(norm, 1 - outer.offset),
        outer.head: lambda: _by_rows(model.read_outer(outer.head), lambda rows: rotate(rows * scale)),
    }
    _prove(model, made, rotate)
    return made


def _by_rows(value: Tensor, change: Rotate) -> Tensor:
    made = torch.empty_like(value)
    for at in range(0, value.shape[0], _ROWS):
        made[at : at + _ROWS] = change(value[at : at + _ROWS].float()).to(value.dtype)
    return made


def _prove(model: StreamModel, made: Mapping[str, Callable[[], Tensor]], rotate: Rotate) -> None:
    def read(name: str) -> Tensor:
        return made[name]() if name in made else model.read_outer(name)

    ids = torch.arange(3, 11)[None] % model.facts.vocab_size
    found = []
    for source, basis in ((model.read_outer, lambda x: x), (read, rotate)):
        with torch.no_grad(), outer_weights(model.skeleton, model.layers_name, source):
            hidden = record(model.skeleton, model.layers, ids)[0]
            generator = torch.Generator().manual_seed(0)
            last = basis(torch.randn(hidden.shape, generator=generator)).float()
            found.append((hidden, logits(model.skeleton, model.layers, ids, last)))
    (hidden, said), (moved, again) = found
    for wanted, value, what in ((rotate(hidden), moved, "the embedding's output"), (said, again, "the logits")):
        if float((value - wanted).abs().max()) > _TOLERANCE * float(wanted.abs().max()):
            raise refused(_WHERE, f"rotating it changes {what}")
