"""EAQuant's clipping of a router in codes: never worse than none, and found where it was planted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moecompress.numerics.grids import dequantize, round_to_nearest
from moecompress.numerics.router_clip import RATIOS, best_clip, clip_rows, kept_share
from moecompress.numerics.routing import set_agreement
from moecompress.types import Scheme

SCHEME = Scheme(8, -1, False, "int")
COARSE = Scheme(2, -1, False, "int")
R, C, N = 6, 32, 200


def made(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(R, C, generator=generator), torch.randn(N, C, generator=generator)


def test_how_many_experts_the_divergence_looks_at() -> None:
    assert [kept_share(64, 8, alpha) for alpha in (0, 0.25, 0.5, 1)] == [8, 22, 36, 64]
    assert kept_share(8, 8, 0.0) == kept_share(8, 8, 1.0) == 8


def test_clipping_nothing_is_rounding() -> None:
    weight, _ = made()
    plain = round_to_nearest(weight, SCHEME, grid="minmax", scale_dtype=torch.float32)
    found = clip_rows(weight, torch.ones(R), SCHEME, torch.float32)
    assert torch.equal(found.codes, plain.codes) and torch.equal(found.scales, plain.scales)


def test_a_clipped_row_stays_inside_its_range() -> None:
    weight, _ = made()
    ratios = torch.linspace(0.35, 1, R)
    values = dequantize(clip_rows(weight, ratios, SCHEME, torch.float32))
    step = (weight.amax(1) - weight.amin(1)) / 255
    for row in range(R):
        assert float(values[row].max()) <= float(ratios[row] * weight[row].max() + step[row])
        assert float(values[row].min()) >= float(ratios[row] * weight[row].min() - step[row])


@pytest.mark.parametrize("leading", [1, 3, R])
@pytest.mark.parametrize("scheme", [SCHEME, COARSE])
def test_the_objective_is_never_above_that_of_no_clipping(leading: int, scheme: Scheme) -> None:
    for seed in range(3):
        weight, x = made(seed)
        bias = torch.randn(R, generator=torch.Generator().manual_seed(seed)) if seed else None
        wanted = x @ weight.t() + (0 if bias is None else bias)
        found = best_clip(weight, bias, x, wanted, leading, scheme, torch.float32)
        assert 0 <= found.objective <= found.unclipped
        assert bool(((found.ratios >= RATIOS[0] - 1e-9) & (found.ratios <= 1)).all())
        assert torch.equal(found.plain.codes, clip_rows(weight, torch.ones(R), scheme, torch.float32).codes)


def test_planted_outliers_that_no_token_uses_are_clipped() -> None:
    """One huge weight per row on a channel that is always 0 ruins a coarse range; clipping it costs nothing."""
    weight, x = made()
    weight[:, 0], x[:, 0] = 8.0, 0.0
    wanted = x @ weight.t()
    found = best_clip(weight, None, x, wanted, 2, COARSE, torch.float32)
    assert float(found.ratios.max()) < 0.7 and found.objective < 0.5 * found.unclipped
    missed = [float((x @ dequantize(q).t() - wanted).square().mean()) for q in (found.codes, found.plain)]
    assert missed[0] < 0.5 * missed[1]
    fresh = made(1)[1]
    fresh[:, 0] = 0.0
    chosen = [(fresh @ w.t()).topk(2).indices for w in (weight, dequantize(found.codes), dequantize(found.plain))]
    assert set_agreement(chosen[0], chosen[1]) > set_agreement(chosen[0], chosen[2]) + 0.1
