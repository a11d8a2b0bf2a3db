"""What reads and writes the residual stream of a layer, and the same layer in another basis of that stream.

Found by running the layer and comparing tensors, so a new family needs no entry: norms whose input is the stream,
matrices that read such a norm, matrices whose output is added to it. Proved by running the rotated layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from moecompress.errors import RecipeError, UnsupportedModel, message
from moecompress.experts import Experts
from moecompress.stream.fold import norm_offset, same_values
from moecompress.stream.layers import call_layer, filled_layer
from moecompress.stream.model import StreamModel
from moecompress.stream.prelude import LayerCall
from moecompress.types import ExpertWeights, LayerWeights, MoESite, Weight

_TOLERANCE = 1e-4  # of the largest value: float32 rounding through one layer, far below any real mistake

Rotate = Callable[[Tensor], Tensor]  # x [..., H] -> x Q, in float32 at least


@dataclass(frozen=True)
class ResidualNorm:
    """A norm of the residual stream. name: of its weight. offset: 1 where it multiplies by 1 + weight, else 0.

    readers: weights [*, H] that read its output. experts: whether the routed experts read it, too.
    """

    name: str
    offset: float
    readers: tuple[str, ...]
    experts: bool


@dataclass(frozen=True)
class Residual:
    """norms: all that read the stream. writers: weights [H, *] whose products are added; experts: theirs, too."""

    norms: tuple[ResidualNorm, ...]
    writers: tuple[str, ...]
    experts: bool


@dataclass
class _Trace:
    """One run: module name -> input and output, in order of calls; the layer's output."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    result: Tensor


def find_residual(
    model: StreamModel, weights: LayerWeights, call: LayerCall, hidden: Tensor, rotate: Rotate
) -> Residual:
    """The residual stream of one layer, proved with `rotate`. hidden: any [B, T, H].

    Raises UnsupportedModel with the reason where the stream cannot be rotated.
    """
    site, where = model.facts.layers[weights.index].site, f"layer {weights.index}"
    if hidden.dim() != 3:
        raise refused(where, f"the residual stream has the shape {list(hidden.shape)}, not [B, T, H]")
    with torch.no_grad():
        with filled_layer(model, weights) as layer:
            found = _Finder(layer, site, call, hidden, where).residual()
            wanted = rotate(call_layer(layer, hidden, call))
        moved = rotated_layer(weights, found, rotate)
        with filled_layer(model, moved) as layer:
            made = call_layer(layer, rotate(hidden).float(), call)
    if float((made - wanted).abs().max()) > _TOLERANCE * float(wanted.abs().max()):
        raise refused(where, "rotating it changes what the layer computes")
    return found


def rotated_layer(weights: LayerWeights, found: Residual, rotate: Rotate) -> LayerWeights:
    """The layer for hidden states x Q instead of x: norms folded into what reads them, readers W Q, writers Q^T W.

    Changed tensors are float32 (float64 stays). Raises RecipeError when one of them has codes.
    """
    changed: dict[str, Weight] = {}
    experts = list(weights.experts)

    def value(name: str) -> Tensor:
        return _wide(changed.get(name, weights.tensors[name]), f"layer {weights.index} {name}")

    def expert(number: int, part: str) -> Tensor:
        return _wide(getattr(experts[number], part), f"layer {weights.index} expert {number}")

    for norm in found.norms:
        scale = value(norm.name) + norm.offset
        for name in norm.readers:
            changed[name] = rotate(value(name) * scale)
        for number in range(len(experts)) if norm.experts else ():
            experts[number] = replace(experts[number], gate_up=rotate(expert(number, "gate_up") * scale))
        changed[norm.name] = torch.full_like(scale, 1 - norm.offset)
    for name in found.writers:
        changed[name] = rotate(value(name).t()).t().contiguous()
        bias = f"{name.removesuffix('weight')}bias"
        if bias in weights.tensors:
            changed[bias] = rotate(value(bias))
    for number in range(len(experts)) if found.experts else ():
        experts[number] = replace(
            experts[number],
            down=rotate(expert(number, "down").t()).t().contiguous(),
            down_bias=None if experts[number].down_bias is None else rotate(expert(number, "down_bias")),
        )
    return weights.with_tensors(changed).with_experts(tuple(experts))


class _Finder:
    """Runs one filled layer a few times to see what belongs to the residual stream."""

    def __init__(self, layer: nn.Module, site: MoESite | None, call: LayerCall, hidden: Tensor, where: str) -> None:
        self.layer, self.site, self.call, self.hidden, self.where = layer, site, call, hidden, where
        self.size = hidden.shape[-1]
        self.plain = self.run()

    def residual(self) -> Residual:
        """Norms that read the layer's input, then those that what was found to be added leads to."""
        norms = {name for name, x in self.plain.inputs.items() if self._is_norm(name) and same_values(x, self.hidden)}
        readers = {name for norm in norms for name in self._readers(norm)}
        writers: list[str] = []
        for name in self.plain.outputs:
            if (name in readers and not self._is_experts(name)) or not self._may_write(name):
                continue
            reached = self._reached(name)
            if reached is None:
                continue
            writers.append(name)
            if reached and reached not in norms:
                norms.add(reached)
                readers |= set(self._readers(reached))
        if not norms or not writers:
            raise refused(self.where, "nothing is seen to read or to write it")
        made = [self._norm(name) for name in self.plain.inputs if name in norms]
        matrices = [f"{name}.weight" for name in writers if not self._is_experts(name)]
        return Residual(tuple(made), tuple(matrices), any(map(self._is_experts, writers)))

    def _norm(self, name: str) -> ResidualNorm:
        norm, readers = self.layer.get_submodule(name), self._readers(name)
        if not readers:
            raise refused(self.where, f"{name} is applied to what is added to it, or no matrix reads it alone")
        for reader in readers:
            weight = self.layer.get_submodule(reader)._parameters.get("weight")
            if not self._is_experts(reader) and (weight is None or weight.shape[1:] != (self.size,)):
                raise refused(self.where, f"{reader} reads it in a way of its own")
        if norm._parameters.get("bias") is not None:
            raise refused(self.where, f"{name} subtracts a mean or adds a bias, which no rotation keeps")
        offset = norm_offset(norm, self.plain.outputs[name], self.where, name)
        matrices = tuple(f"{reader}.weight" for reader in readers if not self._is_experts(reader))
        return ResidualNorm(f"{name}.weight", offset, matrices, len(matrices) < len(readers))

    def _readers(self, norm: str) -> list[str]:
        """Modules with weights whose input is the norm's output."""
        source = self.plain.outputs[norm]
        return [name for name, x in self.plain.inputs.items() if name != norm and same_values(x, source)]

    def _may_write(self, name: str) -> bool:
        weight = self.layer.get_submodule(name)._parameters.get("weight")
        matrix = weight is not None and weight.dim() == 2 and weight.shape[0] == self.size
        return (matrix or self._is_experts(name)) and self.plain.outputs[name].shape[-1] == self.size

    def _reached(self, name: str) -> str | None:
        """The first norm ("": the layer's output) that changes by c_t d_t when d is added to this module's output.

        None where the first change is another one: then the output is no part of the residual stream.
        """
        output = self.plain.outputs[name]
        added = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)) * output.abs().mean()
        handle = self.layer.get_submodule(name).register_forward_hook(lambda _m, _a, out: out + added)
        try:
            trace = self.run()
        finally:
            handle.remove()
        later = list(self.plain.outputs)[list(self.plain.outputs).index(name) + 1 :]
        places = [(n, trace.inputs[n] - self.plain.inputs[n]) for n in later if self._is_norm(n) and n in trace.inputs]
        places = [(n, change) for n, change in places if change.shape[-1] == self.size]
        for place, change in [*places, ("", trace.result - self.plain.result)]:
            if float(change.abs().max()) > 0:
                return place if _proportional(change.reshape(-1, self.size), added.reshape(-1, self.size)) else None
        return None

    def _is_norm(self, name: str) -> bool:
        weight = self.layer.get_submodule(name)._parameters.get("weight")
        return weight is not None and weight.shape == (self.size,)

    def _is_experts(self, name: str) -> bool:
        return self.site is not None and name == self.site.experts

    def run(self) -> _Trace:
        with _recorded(self.layer) as (inputs, outputs):
            result = call_layer(self.layer, self.hidden, self.call)
        return _Trace(inputs, outputs, result)


@contextmanager
def _recorded(layer: nn.Module) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Inputs and outputs of the experts and of all modules with weights of their own, in order of calls."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    handles = []

    def before(name: str) -> Any:
        return lambda _m, args: inputs.__setitem__(name, args[0]) if args and isinstance(args[0], Tensor) else None

    def after(name: str) -> Any:
        def keep(_module: nn.Module, _args: Any, out: Any) -> None:
            first = out[0] if isinstance(out, tuple) and out else out
            if isinstance(first, Tensor):
                outputs[name] = first

        return keep

    for name, module in layer.named_modules():
        own = any(True for _ in module.parameters(recurse=False))
        around = "weight" not in module._parameters and any(True for _ in module.children())  # its children tell more
        if isinstance(module, Experts) or (own and not around):
            handles += [module.register_forward_pre_hook(before(name)), module.register_forward_hook(after(name))]
    try:
        yield inputs, outputs
    finally:
        for handle in handles:
            handle.remove()


def _proportional(change: Tensor, added: Tensor) -> bool:
    """Whether change [T, H] is c_t added_t with a number c_t for every token."""
    if change.shape != added.shape:
        return False
    factor = (change * added).sum(-1, keepdim=True) / added.square().sum(-1, keepdim=True)
    return float((change - factor * added).abs().max()) < 1e-3 * float(change.abs().max())


def _wide(value: Weight | None, where: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise RecipeError(message(where, "is quantized already", then="rotate before quantizing"))
    return value if value.dtype == torch.float64 else value.float()


def refused(where: str, reason: str) -> UnsupportedModel:
    """The error for a residual stream that keeps its basis."""
    return UnsupportedModel(
        message(f"{where}: rotation of the residual stream", reason, then="use rotate.duquant, or leave the pass out")
    )


def thin_weights(model: StreamModel, index: int) -> LayerWeights:
    """Random weights for one layer with narrow experts: enough to see how a layer is wired, without its checkpoint."""
    facts, generator = model.facts.layers[index], torch.Generator().manual_seed(0)

    def drawn(shape: tuple[int, ...]) -> Tensor:
        scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.1
        return torch.randn(shape, generator=generator) * scale + (len(shape) < 2)

    state: Mapping[str, Tensor] = model.layers[index].state_dict()
    tensors: dict[str, Weight] = {
        name: drawn(shape) if state[name].is_floating_point() else torch.zeros(shape, dtype=state[name].dtype)
        for name, shape in facts.shapes.items()
    }
    if facts.site is None:
        return LayerWeights(index, tensors)
    site, width = facts.site, min(8, facts.site.width)
    rows = 2 * width if site.gated else width
    biases = (drawn((rows,)), drawn((site.hidden,))) if site.has_bias else (None, None)
    experts = [ExpertWeights(drawn((rows, site.hidden)), drawn((site.hidden, width)), *biases)] * site.num_experts
    return LayerWeights(index, tensors, tuple(experts))
