"""A few tokens by which a stored model is compared with the run that made it, one layer at a time.

Every layer gets the inputs that the run gave it, so that a tie in a top-k or in the rounding of inputs, broken the
other way by sums in another order, changes one token of one layer instead of everything after it. Experts are asked
apart from their router, all of them, several tokens each: a wrong weight is wrong for all tokens of its expert, a tie
only for one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moecompress.dispatch import Dispatch
from moecompress.stream.layers import experts_of, filled_layer
from moecompress.stream.model import StreamModel
from moecompress.stream.streams import TokenRun, run_layer
from moecompress.types import LayerFacts, LayerWeights

EACH = 4  # tokens that every expert gets, at least


def balanced_ids(tokens: int, top_k: int, experts: int) -> Tensor:
    """int64 [R, tokens, K], R as small as it may be: every expert at least `EACH` times, a token never twice to one.

    Neighbours in a token change from token to token, so that a wrong expert can be told from those beside it.
    Raises ValueError for top_k > experts.
    """
    if not 0 < top_k <= experts:
        raise ValueError(f"top_k: {top_k} of {experts} experts; allowed: 1 to {experts}")
    stride = max(1, top_k // EACH)
    wanted = -(-experts // stride) * -(-EACH // -(-top_k // stride))
    rounds = -(-wanted // tokens)
    first = torch.arange(rounds * tokens) * stride
    return ((first[:, None] + torch.arange(top_k)) % experts).reshape(rounds, tokens, top_k)


def probe_bytes(tokens: int, layer: LayerFacts, hidden: int) -> int:
    """What `probed` of one layer takes as a file, in bytes."""
    rounds = 0 if layer.site is None else 1 + len(balanced_ids(tokens, layer.site.top_k, layer.site.choices))
    return 4 * tokens * hidden * (1 + rounds)


def probed(model: StreamModel, weights: LayerWeights, run: TokenRun) -> dict[str, Tensor]:
    """Send the compressed stream of a one-sequence run through a layer and keep what it takes to check it alone.

    entered: float32 [1, T, ...], the layer's input. With experts also inputs: [T, H], what reached them; ids: int64
    [R, T, K]; outputs: [R, T, H], what they make of `inputs` under `ids`.
    """
    kept = {"entered": run.store("compressed", weights.index).read(0, 1)}
    site = model.facts_of(weights).site
    with filled_layer(model, weights) as layer:
        if site is None:
            run_layer(model, weights, run, "compressed")
            return kept
        experts, inputs = experts_of(layer, site.experts), []
        handle = experts.register_forward_pre_hook(lambda _module, args: inputs.append(args[0].detach().clone()))
        try:
            run_layer(model, weights, run, "compressed")
        finally:
            handle.remove()
        ids = balanced_ids(inputs[0].shape[0], site.top_k, weights.choices)
        return kept | {"inputs": inputs[0], "ids": ids, "outputs": ask_experts(experts, inputs[0], ids)}


def ask_experts(experts: nn.Module, inputs: Tensor, ids: Tensor) -> Tensor:
    """Outputs float32 [R, T, H] of an experts module, ours or transformers' own, for inputs [T, H] and ids [R, T, K].

    All K weigh the same. A gate that leaves experts out per token is not asked.
    """
    gate: dict[str, Any] = {}
    if isinstance(experts, Dispatch):
        gate = {"gate": experts.gate, "gate_layout": experts.gate_layout}
        experts.gate = experts.gate_layout = None
    gates = torch.full(ids.shape[1:], 1 / ids.shape[-1])
    try:
        with torch.no_grad():
            return torch.stack([experts(inputs, chosen, gates).float() for chosen in ids])
    finally:
        for name, value in gate.items():
            setattr(experts, name, value)


@contextmanager
def fed(layers: Sequence[nn.Module], entered: Sequence[Tensor]) -> Iterator[dict[int, Tensor]]:
    """Within the context every layer gets `entered[i]` in place of its input; what arrived is in the result."""
    arrived: dict[int, Tensor] = {}

    def hook(index: int) -> Any:
        def feed(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                arrived[index] = args[0].detach().float()
                return (entered[index].to(args[0].dtype), *args[1:]), kwargs
            arrived[index] = kwargs["hidden_states"].detach().float()
            return args, kwargs | {"hidden_states": entered[index].to(kwargs["hidden_states"].dtype)}

        return feed

    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.callback(layer.register_forward_pre_hook(hook(index), with_kwargs=True).remove)
        yield arrived


def flow_errors(entered: Sequence[Tensor], arrived: Mapping[int, Tensor]) -> list[Tensor]:
    """Per layer the error [T] of what arrived at it, relative to how far the layer before took each token.

    For the first layer: relative to what arrived, which is the embedding.
    """
    found = []
    for index, wanted in enumerate(entered):
        size = wanted - entered[index - 1] if index else wanted
        found.append(relative(arrived[index], wanted, size))
    return found


def relative(found: Tensor, wanted: Tensor, size: Tensor) -> Tensor:
    """|found - wanted| / |size| per token of tensors [1, T, ...], float64 [T]."""
    difference, unit = ((x[0].double().flatten(1)).norm(dim=-1) for x in (found.float() - wanted.float(), size))
    return difference / unit.clamp_min(1e-12)


def expert_errors(found: Tensor, wanted: Tensor, ids: Tensor) -> Tensor:
    """Each expert's error [E]: the smallest over its tokens of max |found - wanted| / rms(wanted); 0 for the unasked.

    found, wanted: [R, T, H]; ids: int64 [R, T, K]. NaN counts as infinite.
    """
    each = (found - wanted).abs().amax(-1) / wanted.square().mean(-1).sqrt().clamp_min(1e-12)
    each = each.nan_to_num(nan=torch.inf, posinf=torch.inf).double()
    best = torch.full((int(ids.max()) + 1,), torch.inf, dtype=torch.float64)
    best.scatter_reduce_(0, ids.flatten(), each[..., None].expand(ids.shape).flatten(), "amin")
    return best
