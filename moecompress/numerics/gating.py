"""Leaving out some of the experts that a router chose for a token: orders, rules, relaxations.

Slots are ranked by their routing weight, whatever order the family returns them in, and a rule keeps the first n: so
at least one expert stays by construction, and no expert is dropped before a weaker one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from moecompress.gate import Gate, Relaxation

MASK_ROUTER = ("w_in", "w_out", "start")
_EPS = 1e-6
_SHARP, _STEEP = 20.0, 5.0  # logits of a few units between weights that differ by a tenth of their sum


def slot_order(ids: Tensor, weights: Tensor) -> Tensor:
    """Slots of every token by falling weight, among equal weights by rising expert id: int64 [T, K]."""
    by_id = ids.argsort(dim=-1, stable=True)
    return by_id.gather(-1, weights.gather(-1, by_id).argsort(dim=-1, descending=True, stable=True))


def mask_router(hidden: int, slots: int, width: int, keep_all: float, generator: torch.Generator) -> dict[str, Tensor]:
    """A mask router that keeps all slots with probability `keep_all` whatever the token: its output matrix is zero.

    w_in: [width, hidden + slots], w_out: [slots, width], start: [slots]; float32.
    """
    columns = hidden + slots
    start = torch.zeros(slots)
    start[-1] = math.log(keep_all * (slots - 1) / (1 - keep_all))
    w_in = torch.randn(width, columns, generator=generator) / math.sqrt(columns)
    return {"w_in": w_in, "w_out": torch.zeros(slots, width), "start": start}


def weighing_router(hidden: int, slots: int, width: int, total: float, generator: torch.Generator) -> dict[str, Tensor]:
    """A mask router that begins with the weights alone: z_n = -5 sum over r > n of silu(20 w_r / total).

    total: mean sum of a token's weights. What leaves costs by its weight, whatever the token; the units that read
    nothing else are the first slots - 1, so that width is at least that. Shapes as `mask_router`.
    """
    made = mask_router(hidden, slots, width, 0.5, generator)
    w_in, w_out = made["w_in"], made["w_out"]
    later = torch.arange(1, slots)
    w_in[: slots - 1] = 0
    w_in[later - 1, hidden + later] = _SHARP / total
    w_out[:, : slots - 1] = -_STEEP * (later > torch.arange(slots)[:, None]).float()
    return {"w_in": w_in, "w_out": w_out, "start": torch.zeros(slots)}


def mask_logits(hidden: Tensor, ranked: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """log p of keeping the first 1..K slots, up to a constant: float32 [T, K].

    hidden: [T, H], the experts' input. ranked: [T, K], weights by falling size.
    z = w_out silu(w_in [x / rms(x); ranked]) + start.
    """
    x = hidden.float()
    x = x * (x.square().mean(-1, keepdim=True) + _EPS).rsqrt()
    features = torch.cat([x, ranked.float()], -1)
    return F.linear(F.silu(F.linear(features, tensors["w_in"])), tensors["w_out"], tensors["start"])


def shift_to_share(logits: Sequence[Tensor], share: float) -> float:
    """The s for which the largest z_n - s n keeps `share` of the slots, on average over tokens and then layers.

    logits: of every layer [T, K], n = 0..K-1 for the first n + 1 slots. What is kept falls with s: the s is where it
    has just come down to `share`, and where one slot each is all that is kept when the share is less than that.
    """

    def kept(shift: float) -> float:
        counts = [z.double() - shift * torch.arange(z.shape[-1], device=z.device) for z in logits]
        return sum(float((1 + z.argmax(-1)).double().mean()) / z.shape[-1] for z in counts) / len(counts)

    reach = 1.0 + max(float(z.max() - z.min()) for z in logits)
    low, high = -reach, reach  # where all slots are kept, and where one is
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if kept(middle) > share else (low, middle)
    return high


def rest_ratios(ranked: Tensor) -> Tensor:
    """(w_r + ... + w_{K-1}) / (w_0 + ... + w_{r-1}) for r = 1..K-1, falling: float64 [T, K-1]. ranked: [T, K].

    What leaves beside what stays when the first r slots are kept; with two experts w_1 / w_0.
    """
    values = ranked.double()
    rest = values.flip(-1).cumsum(-1).flip(-1)[:, 1:]
    return rest / values.cumsum(-1)[:, :-1]


def ratio_counts(ranked: Tensor, threshold: float) -> Tensor:
    """How many slots stay: the fewest whose rest weighs less than `threshold` times them, int64 [T], 1..K."""
    return 1 + (rest_ratios(ranked) >= threshold).long().cumprod(-1).sum(-1)


def first_slots(counts: Tensor, slots: int) -> Tensor:
    """bool [T, K]: the first counts [T] of K ranked slots."""
    return torch.arange(slots, device=counts.device) < counts[:, None]


def relaxed_mask(logits: Tensor, relaxation: Relaxation) -> Tensor:
    """How much of every ranked slot is kept, float32 [T, K], falling from 1, differentiable in `logits` [T, K].

    p = softmax((log softmax z + g) / temperature) over the candidates "the first n", Gumbel noise g; slot r is in all
    candidates from r on, so its share is the sum of their p.
    """
    scores = logits.log_softmax(-1)
    if relaxation.seed is not None:
        generator = torch.Generator().manual_seed(relaxation.seed)
        uniform = torch.rand(scores.shape, generator=generator).clamp_(1e-20, 1 - 1e-7)
        scores = scores - uniform.log().neg().log().to(scores.device)
    p = (scores / relaxation.temperature).softmax(-1)
    mask = p.flip(-1).cumsum(-1).flip(-1)
    mask = torch.cat([torch.ones_like(mask[:, :1]), mask[:, 1:]], -1)
    if relaxation.straight_through:
        mask = first_slots(1 + scores.argmax(-1), logits.shape[-1]).float() + (mask - mask.detach())
    return mask


def kept_counts(hidden: Tensor, ranked: Tensor, gate: Gate) -> Tensor:
    """How many of the ranked slots [T, K] a gate keeps of every token, protection apart: int64 [T]."""
    if gate.kind == "count":
        return torch.full(ranked.shape[:1], min(gate.count, ranked.shape[1]), device=ranked.device)
    if gate.kind == "ratio":
        return ratio_counts(ranked, gate.threshold)
    return 1 + mask_logits(hidden, ranked, _on(gate, ranked.device)).argmax(-1)


def gated(
    hidden: Tensor, ids: Tensor, weights: Tensor, gate: Gate, skip: int, protected: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, weights, kept) of one call of the experts after the gate.

    hidden: [T, H]; ids: int64 [T, K]; weights: [T, K]; protected: bool [T], tokens that keep all. Slots left out get
    the id `skip` and weight 0; with `renormalise` the others are scaled to the token's sum, which holds whatever factor
    the family multiplies its normalised weights by. kept: float32 [T, K], 1 where a slot stays, in the slots' order.
    With a relaxation all ids stay and the weights are multiplied by the soft mask.
    """
    order = slot_order(ids, weights.detach())
    ranked = weights.gather(-1, order)
    if gate.relaxation is not None:
        mask = relaxed_mask(mask_logits(hidden, ranked, _on(gate, ranked.device)), gate.relaxation)
        kept = torch.zeros_like(mask).scatter(-1, order, mask)
    else:
        counts = kept_counts(hidden, ranked, gate)
        if protected is not None:
            counts = counts.masked_fill(protected, ids.shape[1])
        kept = torch.zeros_like(ids, dtype=torch.bool).scatter(-1, order, first_slots(counts, ids.shape[1])).float()
        ids = ids.masked_fill(kept == 0, skip)
    left = weights * kept.to(weights.dtype)
    if gate.renormalise:
        left = left * (weights.sum(-1, keepdim=True) / left.sum(-1, keepdim=True))
    return ids, left, kept


def constant_sum(weights: Tensor, tolerance: float = 1e-3) -> bool:
    """Whether the weights [T, K] of every token have the same sum: the family normalises over the chosen experts."""
    sums = weights.double().sum(-1)
    return bool(sums.numel()) and float(sums.max() - sums.min()) <= tolerance * float(sums.abs().max())


def received_attention(probabilities: Tensor) -> Tensor:
    """Mean attention that each of the last Q keys gets from the queries that can see it: float32 [B, Q].

    probabilities: [B, heads, Q, S], S >= Q, rows are queries. Key j (of the last Q) is seen by queries j..Q-1, so the
    sum over queries, not over keys as in the released code of 2410.06270, is divided by Q - j.
    """
    queries = probabilities.shape[-2]
    mean = probabilities.float().mean(1)[..., -queries:]
    return mean.sum(-2) / torch.arange(queries, 0, -1, device=mean.device)


def most_important(hidden: Tensor, attention: Tensor, share: float) -> Tensor:
    """The ceil(share * T) tokens of every sequence with the largest |x|_1 * attention received: bool [B, T].

    hidden: [B, T, H]; attention: [B, T]. At least one token when share > 0; none in sequences of a single token, where
    there is nothing to compare (decoding).
    """
    length = hidden.shape[1]
    chosen = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    if share <= 0 or length == 1:
        return chosen
    importance = hidden.float().abs().sum(-1) * attention
    top = importance.topk(math.ceil(share * length), dim=-1).indices
    return chosen.scatter(-1, top, True)


def _on(gate: Gate, device: torch.device) -> dict[str, Tensor]:
    return {name: gate.tensors[name].to(device) for name in MASK_ROUTER}
