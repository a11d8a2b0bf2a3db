"""Which activation an experts module computes, told by what it computes rather than by its class."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from moecompress.ops import Activation, activate

_LIMITS = ("limit", "swiglu_limit")
_ALPHAS = ("alpha", "swiglu_alpha")
_TOLERANCE = 1e-5  # relative to the largest value; candidates differ by far more on the probe


def recognise(experts: Any) -> Activation | None:
    """The activation of an experts module (with `activate`, `has_gate`), or None when it is none that is known.

    Every candidate is compared with the module itself on values from -40 to 40, in float32 and all pairs of gate and
    up, so a wrong one cannot pass; numbers (limits, alpha) are taken from the module's attributes.
    """
    probe = _probe(bool(experts.has_gate))
    wanted = _try(experts.activate, probe)
    if wanted is None:
        return None
    for candidate in _candidates(experts):
        found = activate(candidate, probe)
        if found.shape == wanted.shape and bool((found - wanted).abs().max() <= _TOLERANCE * wanted.abs().max()):
            return candidate
    return None


def _probe(gated: bool) -> Tensor:
    """[P, 4] rows of two gates and two ups (four values without a gate)."""
    steps = torch.cat([torch.linspace(-40, 40, 81), torch.linspace(-2, 2, 41)])
    if not gated:
        return steps[: len(steps) // 2 * 2].view(-1, 2).repeat(1, 2)
    pairs = torch.cartesian_prod(steps, steps[::7])
    return torch.cat([pairs, pairs.flip(0)], -1)[:, [0, 2, 1, 3]]


def _try(function: Callable[[Tensor], Tensor], probe: Tensor) -> Tensor | None:
    with torch.no_grad():
        try:
            return function(probe).float()
        except (RuntimeError, TypeError, ValueError, AttributeError):
            return None


def _candidates(experts: Any) -> Iterator[Activation]:
    gated = bool(experts.has_gate)
    limits = [None, *_numbers(experts, _LIMITS)]
    alphas = [1.0, *_numbers(experts, _ALPHAS)]
    orders = (not experts.is_concatenated, bool(experts.is_concatenated)) if gated else (False,)
    for interleaved in orders:
        for limit in limits:
            for function in ("silu", "gelu", "gelu_tanh", "relu", "relu2"):
                for alpha in alphas if function == "silu" else (1.0,):
                    for shift in (0.0, 1.0) if gated else (0.0,):
                        yield Activation(function, gated, interleaved, alpha, limit, shift)  # type: ignore[arg-type]


def _numbers(experts: Any, names: tuple[str, ...]) -> list[float]:
    found = [getattr(experts, name, None) for name in names]
    return [float(value) for value in found if isinstance(value, int | float)]
