"""One matrix whose rounding is being learned: offsets before rounding, factors on the scales, straight-through."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moecompress.types import QuantizedTensor

_INSIDE = 0.45  # how far from its code a start's position may be: just inside the cell, so a small step can leave it
_FACTORS = (0.5, 1.5)
_BETAS = (0.9, 0.95)


class LearnedMatrix:
    """Codes of `weight` [out, in] as a function of two learned tensors (SignRound, 2309.05516).

    position = weight / s + z + offset, code = clamp(round(position)), value = (code - z) * s, with s = start scale *
    factor rounded to the dtype in which it is stored: what is evaluated while learning is what is stored.
    offset: float32 [out, G, size], within +-reach codes, at first the smallest that gives the start's codes.
    factor: float32 [out, G, 1], within [0.5, 1.5], at first 1. Zero points stay as they are.
    rate: this matrix's share of every step; 0 keeps the start (exactly, when `reach` lets its codes be reached).
    Raises ValueError for shapes that do not fit.
    """

    def __init__(self, weight: Tensor, start: QuantizedTensor, *, reach: float = 0.5, rate: float = 1.0) -> None:
        if weight.shape != start.shape:
            raise ValueError(f"weight: shape {tuple(weight.shape)}; allowed: {tuple(start.shape)}")
        self._start = start
        self.reach, self.rate = reach, rate
        self._weight = weight.float().reshape(*start.scales.shape, -1)
        # binary codes mean -s and +s: two codes that are 2 s apart, with 0 in the middle
        self._step = 2.0 if start.scheme.binary else 1.0
        self._zero: Tensor | float = 0.5 if start.scheme.binary else float(1 << (start.scheme.bits - 1))
        if start.zeros is not None:
            self._zero = start.zeros.float().unsqueeze(-1)
        self._top = (1 << start.scheme.bits) - 1
        self._base = start.scales.float().unsqueeze(-1) * self._step
        self._scale = self._base
        self.factor = torch.ones_like(self._base)
        self.offset = torch.zeros_like(self._weight)
        position, code = self._position(), start.codes.float().view_as(self._weight)
        low = torch.where(code <= 0, -torch.inf, code - _INSIDE)
        high = torch.where(code >= self._top, torch.inf, code + _INSIDE)
        self.offset = position.clamp(low, high).sub_(position).clamp_(-reach, reach)

    def values(self, softness: float = 0.0) -> Tensor:
        """float32 [out, in]: the matrix as it would be stored now, or on its way there.

        softness: width of the ramp between two codes, 0 = a step (rounding), 1 = no rounding. Positions further than
        half of it from the middle between two codes are at their code.
        """
        return self._codes(self._position(), softness).sub_(self._zero).mul_(self._scale).flatten(1)

    def quantized(self) -> QuantizedTensor:
        """The present codes and scales."""
        codes = self._codes(self._position()).to(torch.uint8).flatten(1)
        scales = self._scale.div(self._step).squeeze(-1).to(self._start.scales.dtype)
        return QuantizedTensor(codes, scales, self._start.zeros, self._start.scheme)

    def gradients(self, gradient: Tensor, softness: float = 0.0) -> tuple[Tensor, Tensor]:
        """(offset's [out, G, size], factor's [out, G, 1]) gradients from that of `values(softness)` [out, in].

        Straight through the rounding: a position inside the range moves its value by s per code, one outside does not.
        """
        g = gradient.reshape(self._weight.shape)
        position = self._position()
        slope = self._codes(position, softness).sub_(self._zero)
        inside = (position >= -0.5) & (position <= self._top + 0.5)
        # value = s * (code - z), and inside the range a larger s also moves the position: slope - weight / s
        slope.sub_(self._weight.div(self._scale).mul_(inside))
        factor = slope.mul_(g).sum(-1, keepdim=True).mul_(self._base)
        return position.copy_(g).mul_(self._scale).mul_(inside), factor

    def move(self, offset: Tensor, factor: Tensor) -> None:
        """Subtract a step from each of the two, times this matrix's rate, within their limits."""
        self.offset.sub_(offset, alpha=self.rate).clamp_(-self.reach, self.reach)
        self.factor.sub_(factor, alpha=self.rate).clamp_(*_FACTORS)
        self._scale = (self._base * self.factor).to(self._start.scales.dtype).float()

    def _position(self) -> Tensor:
        return self._weight.div(self._scale).add_(self._zero).add_(self.offset)

    def _codes(self, position: Tensor, softness: float = 0.0) -> Tensor:
        if softness == 0:
            return position.round().clamp_(0, self._top)
        below = position.floor()
        ramp = (position - below).sub_(0.5).div_(softness).add_(0.5).clamp_(0, 1)
        return ramp.add_(below).clamp_(0, self._top)


@dataclass
class Adam:
    """Running moments of one tensor's gradient (1412.6980), betas 0.9 and 0.95: runs are a few hundred steps."""

    first: Tensor
    second: Tensor
    taken: int = 0

    @classmethod
    def zeros(cls, like: Tensor) -> Adam:
        return cls(torch.zeros_like(like), torch.zeros_like(like))

    def direction(self, gradient: Tensor) -> Tensor:
        """The step of size about 1 to subtract; a gradient that was always 0 gives 0."""
        self.taken += 1
        a, b = _BETAS
        self.first.lerp_(gradient, 1 - a)
        self.second.mul_(b).addcmul_(gradient, gradient, value=1 - b)
        size = self.second.div(1 - b**self.taken).sqrt_().add_(1e-20)
        return self.first.div(1 - a**self.taken).div_(size)
