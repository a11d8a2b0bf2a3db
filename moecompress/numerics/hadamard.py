"""Hadamard rotations: orders 2^p m from Paley's constructions, fast application, blocks where no order is known."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def default_block(size: int) -> int:
    """The block that rotates `size` channels best: all of them when that order is known, else the largest power of
    two that divides them."""
    return size if _factors(size) is not None else size & -size


def is_known(order: int) -> bool:
    """Whether a Hadamard matrix of this order can be made here: 2^p m, m = 1 or a Paley order."""
    return order >= 1 and _factors(order) is not None


def hadamard_matrix(order: int) -> Tensor:
    """float64 [n, n] of +1 and -1 with H H^T = n I. Raises ValueError for an order that is not known."""
    found = _factors(order)
    if found is None:
        raise ValueError(f"no Hadamard matrix of order {order} is known here; allowed: 2^p m with m from Paley")
    base, power = found
    made = _base(base)
    for _ in range(power.bit_length() - 1):
        made = torch.kron(made, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    return made


def rotated(x: Tensor, block: int, signs: Tensor | None = None) -> Tensor:
    """x Q for x [..., c] in blocks of `block`: Q = diag(signs) H / sqrt(block), orthogonal. signs: +-1 [c], None = 1.

    In float32 at least (float64 stays), by additions for the power of two. Raises ValueError for an unknown order.
    """
    found = _factors(block)
    if found is None or x.shape[-1] % block:
        raise ValueError(f"blocks of {block} in {x.shape[-1]} columns; allowed: known orders that divide them")
    base, power = found
    wide = x if x.dtype == torch.float64 else x.float()
    if signs is not None:
        wide = wide * signs.to(wide)
    parts = wide.unflatten(-1, (-1, base, power))
    if base > 1:
        parts = torch.einsum("...ij,ik->...kj", parts, _base(base).to(parts))
    step = 1
    while step < power:
        pairs = parts.unflatten(-1, (-1, 2, step))
        a, b = pairs.unbind(-2)
        parts = torch.stack([a + b, a - b], -2).flatten(-3)
        step *= 2
    return parts.flatten(-3) * block**-0.5


def random_signs(size: int, generator: torch.Generator) -> Tensor:
    """float64 [size] of +1 and -1."""
    return torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1


@lru_cache(maxsize=64)
def _factors(order: int) -> tuple[int, int] | None:
    """(m, 2^p) with m 2^p = order and m = 1 or a Paley order, m as small as possible; None when there is none."""
    power = order & -order
    odd = order // power
    if odd == 1:
        return 1, power
    base = odd
    while power > 0:
        if _prime_for(base) is not None:
            return base, power
        base, power = base * 2, power // 2
    return None


def _prime_for(order: int) -> tuple[int, int] | None:
    """(kind, q) of Paley's construction of this order: I: q + 1, q = 3 mod 4; II: 2 (q + 1), q = 1 mod 4."""
    if order % 4:
        return None
    if _is_prime(order - 1):
        return 1, order - 1
    if _is_prime(order // 2 - 1) and (order // 2 - 1) % 4 == 1:
        return 2, order // 2 - 1
    return None


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, int(number**0.5) + 1))


@lru_cache(maxsize=16)
def _base(order: int) -> Tensor:
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    found = _prime_for(order)
    assert found is not None
    kind, q = found
    residues = {i * i % q for i in range(1, q)}
    character = torch.tensor([0.0] + [1.0 if i in residues else -1.0 for i in range(1, q)], dtype=torch.float64)
    index = torch.arange(q)
    core = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    core[1:, 1:] = character[(index[:, None] - index[None, :]) % q]
    core[0, 1:] = 1
    core[1:, 0] = -1 if kind == 1 else 1
    if kind == 1:
        return core + torch.eye(q + 1, dtype=torch.float64)
    plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(core, plus) + torch.kron(torch.eye(q + 1, dtype=torch.float64), minus)
