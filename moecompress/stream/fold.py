"""Which norm feeds the routed experts, what else reads it, and moving a scale from the norm into its readers exactly.

Found by running the layer on real inputs and comparing tensors, so a new family needs no entry; and proved by folding
a trial scale and comparing the layer's output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moecompress.arch.sites import NormFold
from moecompress.errors import RecipeError, UnsupportedModel, message
from moecompress.experts import Experts
from moecompress.stream.layers import call_layer, filled_layer
from moecompress.stream.model import StreamModel
from moecompress.stream.streams import TokenRun
from moecompress.types import LayerWeights, MoESite, Stream

_TOLERANCE = 1e-4  # of the largest output: float32 rounding through one layer, far below any real mistake


def scaled_inputs(weights: LayerWeights, fold: NormFold, scale: Tensor) -> LayerWeights:
    """The same layer with the norm's output divided by `scale` [H] > 0 and every reader's columns multiplied by it.

    Changed tensors are float32 (float64 stays). Raises RecipeError when a reader already has codes.
    """
    changed: dict[str, Tensor] = {}
    norm = _dense(weights, fold.norm)
    changed[fold.norm] = (norm + fold.offset) / scale.to(norm) - fold.offset
    bias = f"{fold.norm.removesuffix('weight')}bias"
    if bias in weights.tensors:
        changed[bias] = _dense(weights, bias) / scale.to(norm)
    for name in fold.readers:
        value = _dense(weights, name)
        changed[name] = value * scale.to(value)
    experts = []
    for number, expert in enumerate(weights.experts):
        if not isinstance(expert.gate_up, Tensor):
            raise _too_late(weights.index, f"expert {number}")
        value = _wide(expert.gate_up)
        experts.append(replace(expert, gate_up=value * scale.to(value)))
    return weights.with_tensors(changed).with_experts(tuple(experts))


def find_norm_fold(model: StreamModel, weights: LayerWeights, run: TokenRun, stream: Stream) -> NormFold:
    """How a scale can be moved out of the experts' norm in this layer, tried on the first batch of `run`.

    Raises UnsupportedModel, with the reason, where that is not possible: the experts' input is not a norm's output, the
    router reads something else, the norm's weight is used in an unknown way, or the trial changes the output.
    """
    site = model.facts.layers[weights.index].site
    assert site is not None
    hidden = run.store(stream, weights.index).read(run.batches[0].rows[0], run.batches[0].rows[-1] + 1)
    call, where = run.calls[0][weights.index], f"layer {weights.index}"
    with torch.no_grad():
        with filled_layer(model, weights) as layer, watched_norms(layer, site) as (made, read):
            wanted = call_layer(layer, hidden, call)
            fold = fold_of(layer, site, made, read, where, same_values)
        generator = torch.Generator().manual_seed(0)
        trial = 2.0 ** torch.randint(-1, 2, (site.hidden,), generator=generator)
        with filled_layer(model, scaled_inputs(weights, fold, trial)) as layer:
            found = call_layer(layer, hidden, call)
    if float((found - wanted).abs().max()) > _TOLERANCE * float(wanted.abs().max()):
        raise refused(where, f"a scale folded into {fold.norm} changes the layer's output")
    return fold


def fold_of(
    layer: nn.Module,
    site: MoESite,
    made: Mapping[str, Tensor],
    read: Mapping[str, Tensor],
    where: str,
    same: Callable[[Tensor, Tensor], bool],
) -> NormFold:
    """The fold of a layer of which `watched_norms` has seen one run. same: whether two tensors hold the same values."""
    feeding = [name for name, out in made.items() if same(out, read[site.experts])]
    if not feeding:
        raise refused(where, "the experts' input is not the output of a norm")
    norm = layer.get_submodule(feeding[-1])
    readers, source = [], made[feeding[-1]]
    for name, value in read.items():
        if name == site.experts or not same(value, source):
            continue
        weight = layer.get_submodule(name)._parameters.get("weight")
        if weight is None or weight.dim() != 2 or weight.shape[1] != site.hidden:
            raise refused(where, f"{name} reads the experts' norm in a way of its own")
        readers.append(f"{name}.weight")
    if not any(name.startswith(f"{site.router}.") for name in readers):
        raise refused(where, "the router does not read what the experts read")
    return NormFold(f"{feeding[-1]}.weight", norm_offset(norm, source, where, feeding[-1]), tuple(readers))


def norm_offset(norm: nn.Module, output: Tensor, where: str, name: str) -> float:
    """0 when doubling the norm's weight doubles its output, 1 when doubling 1 + weight does."""
    weight, inputs = norm.weight, torch.linspace(-1, 1, output.shape[-1])[None]
    assert isinstance(weight, Tensor)
    before = norm(inputs)
    bias = norm._parameters.get("bias")
    shift = 0.0 if bias is None else bias
    for offset in (0.0, 1.0):
        norm._parameters["weight"] = nn.Parameter(2 * (weight + offset) - offset, requires_grad=False)
        after = norm(inputs)
        norm._parameters["weight"] = weight  # type: ignore[assignment]
        if torch.allclose(after - shift, 2 * (before - shift), rtol=1e-4, atol=1e-6):
            return offset
    raise refused(where, f"{name} uses its weight in an unknown way")


@contextmanager
def watched_norms(
    layer: nn.Module, site: MoESite, inside: Callable[[int], None] | None = None
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Outputs of modules with a weight [H] (norms) and inputs of all modules that have weights of their own.

    inside: told +1 when such a module begins to run and -1 when it ends.
    """
    made: dict[str, Tensor] = {}
    read: dict[str, Tensor] = {}
    handles = []

    def keep_output(name: str) -> Any:
        return lambda _module, _args, out: made.__setitem__(name, out) if isinstance(out, Tensor) else None

    def keep_input(name: str) -> Any:
        return lambda _module, args: read.__setitem__(name, args[0]) if args and isinstance(args[0], Tensor) else None

    for name, module in layer.named_modules():
        weight = module._parameters.get("weight")
        norm = weight is not None and weight.shape == (site.hidden,)
        if norm:
            handles.append(module.register_forward_hook(keep_output(name)))
        elif isinstance(module, Experts) or any(True for _ in module.parameters(recurse=False)):
            handles.append(module.register_forward_pre_hook(keep_input(name)))
        else:
            continue
        if inside is not None:
            handles.append(module.register_forward_pre_hook(lambda *_: inside(1)))
            handles.append(module.register_forward_hook(lambda *_: inside(-1)))
    try:
        yield made, read
    finally:
        for handle in handles:
            handle.remove()


def linear_in_up(activate: Callable[[Tensor], Tensor], site: MoESite) -> bool:
    """Whether scaling the up rows of gate_up scales the intermediate by as much. activate: [n, 2I] -> [n, I]."""
    values = torch.randn(16, site.gate_up_rows, generator=torch.Generator().manual_seed(0)).double() * 4
    factors = 2.0 ** torch.arange(-2, site.width - 2).remainder(5).double()
    scaled = values.clone()
    scaled[:, up_rows(site)] *= factors
    return torch.allclose(activate(scaled), activate(values) * factors, rtol=1e-5, atol=1e-6)


def up_rows(site: MoESite) -> slice:
    """Rows of gate_up that multiply the gate: the second half, every other row, or all where there is no gate."""
    if not site.gated:
        return slice(None)
    return slice(site.width, None) if site.concatenated else slice(1, None, 2)


def same_values(one: Tensor, other: Tensor) -> bool:
    return one.numel() == other.numel() and torch.equal(one.reshape(-1), other.reshape(-1))


def _dense(weights: LayerWeights, name: str) -> Tensor:
    value = weights.tensors[name]
    if not isinstance(value, Tensor):
        raise _too_late(weights.index, name)
    return _wide(value)


def _wide(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()


def _too_late(layer: int, name: str) -> RecipeError:
    return RecipeError(message(f"layer {layer} {name}", "is quantized already", then="smooth before quantizing"))


def refused(where: str, reason: str) -> UnsupportedModel:
    """The error for a layer whose norm takes no scale."""
    return UnsupportedModel(
        message(f"{where}: smoothing of the experts' inputs", reason, then="set shared: false, or leave the pass out")
    )
