"""Neurons of removed experts rebuilt into those that stay (DERN, 2509.10377).

A segment is one neuron: its rows of gate and up and its column of down. It moves to the retained expert that holds the
segment most like it, if that is alike enough; there, own and moved segments are compressed to the old number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from moecompress.numerics.neurons import Neurons, joined


@dataclass(frozen=True)
class Rule:
    """threshold: segments whose similarity is above it move. gate, up, down: shares of the similarity (gate is left out
    where there is none). canonical: experts may be rescaled between up and down and flip both signs, so that is undone
    before anything is compared; only right where the activation is linear in up. init: k-means starts from the retained
    expert's own segments (equal segments merge without loss) or from those with the largest gate rows of all (paper).
    """

    threshold: float = 0.6
    gate: float = 0.0
    up: float = 0.5
    down: float = 0.5
    canonical: bool = True
    init: Literal["retained", "gate_max"] = "retained"
    iterations: int = 30
    tolerance: float = 1e-4


def balanced(neurons: Neurons) -> Neurons:
    """The same neurons with |up| = |down| in each, where both are above 0."""
    up, down = _up(neurons).norm(dim=1), neurons.outputs.norm(dim=1)
    usable = (up > 0) & (down > 0)
    return neurons.scaled(torch.where(usable, (down / up.clamp_min(1e-30)).sqrt(), 1.0))


def similarity(first: Neurons, second: Neurons, rule: Rule) -> Tensor:
    """[n, m]: shares of the cosines of gate, up and down; with `canonical` the sign of up is free, down's goes with it.

    A segment with a part of length 0 is like none in that part.
    """
    up = _cosine(_up(first), _up(second))
    sign = torch.where(up < 0, -1.0, 1.0) if rule.canonical else torch.ones(())
    total, shares = rule.up * sign * up + rule.down * sign * _cosine(first.outputs, second.outputs), rule.up + rule.down
    if first.inputs.shape[1] > 1:
        total, shares = total + rule.gate * _cosine(_gate(first), _gate(second)), shares + rule.gate
    return total / shares


def destinations(dropped: Sequence[Neurons], kept: Sequence[Neurons], rule: Rule) -> list[tuple[Tensor, Tensor]]:
    """For every dropped expert: the retained expert (its place) with the most similar segment for each of its segments,
    int64 [I], and that similarity [I]. One pair of experts is compared at a time."""
    found = []
    for neurons in dropped:
        best = torch.stack([similarity(neurons, other, rule).amax(1) for other in kept])
        found.append((best.argmax(0), best.amax(0)))
    return found


def rebuilt(own: Neurons, moved: Neurons, own_weight: float, weights: Tensor, rule: Rule) -> Neurons:
    """Own and moved segments compressed to as many as `own` has: spherical k-means over whole segments, weighted by
    the importance of the expert that each comes from (weights [n] for the moved ones).

    In a cluster lengths are made equal before averaging, and the mean gets the mean length. A cluster that runs empty
    keeps its centre; segments of length 0 take no part.
    """
    every = joined([own, moved])
    count = len(own.outputs)
    mass = torch.cat([torch.full((count,), float(own_weight)), weights.float()])
    points, first = _parts(every)
    centres = points[:count] if rule.init == "retained" else points[_gate(every).norm(dim=1).topk(count).indices]
    alive = points.norm(dim=1) > 0
    for _ in range(rule.iterations):
        labels, signs = _assigned(points, centres, first, rule.canonical)
        new = _centres(points[alive], centres, labels[alive], signs[alive], mass[alive], first)
        moved_by = (new - centres).norm() / centres.norm().clamp_min(1e-30)
        centres = new
        if moved_by < rule.tolerance:
            break
    return _neurons(centres, every)


def _assigned(points: Tensor, centres: Tensor, first: int, canonical: bool) -> tuple[Tensor, Tensor]:
    """Nearest centre of every point by cosine, and the sign in which its later part (up, down) agrees with it."""
    unit, other = normalize(points, dim=1), normalize(centres, dim=1)
    gate, rest = unit[:, :first] @ other[:, :first].T, unit[:, first:] @ other[:, first:].T
    labels = (gate + (rest.abs() if canonical else rest)).argmax(1)
    agree = rest.gather(1, labels[:, None])[:, 0]
    return labels, torch.where((agree < 0) & canonical, -1.0, 1.0)


def _centres(points: Tensor, before: Tensor, labels: Tensor, signs: Tensor, mass: Tensor, first: int) -> Tensor:
    count = len(before)
    length = points.norm(dim=1)
    members = torch.bincount(labels, minlength=count)
    mean_length = torch.zeros(count).index_add_(0, labels, length) / members.clamp_min(1)
    turned = torch.cat([points[:, :first], points[:, first:] * signs[:, None]], 1)
    total = torch.zeros(count).index_add_(0, labels, mass)
    mass = torch.where(total[labels] > 0, mass, 1.0)
    summed = torch.zeros_like(before).index_add_(0, labels, turned * (mass / length)[:, None])
    centre = normalize(summed, dim=1) * mean_length[:, None]
    return torch.where(((members > 0) & (summed.norm(dim=1) > 0))[:, None], centre, before)


def _parts(neurons: Neurons) -> tuple[Tensor, int]:
    """[n, c]: gate, then up and down, biases with their rows; and how many columns are gate's."""
    gate = _gate(neurons) if neurons.inputs.shape[1] > 1 else neurons.outputs[:, :0]
    return torch.cat([gate, _up(neurons), neurons.outputs], 1), gate.shape[1]


def _neurons(points: Tensor, like: Neurons) -> Neurons:
    """Inverse of `_parts`."""
    rows, hidden = like.inputs.shape[1], like.outputs.shape[1]
    read = points[:, :-hidden].unflatten(1, (rows, -1))
    if like.bias is None:
        return Neurons(read.contiguous(), None, points[:, -hidden:].contiguous())
    return Neurons(read[:, :, :-1].contiguous(), read[:, :, -1].contiguous(), points[:, -hidden:].contiguous())


def _gate(neurons: Neurons) -> Tensor:
    return _with_bias(neurons, 0)


def _up(neurons: Neurons) -> Tensor:
    return _with_bias(neurons, -1)


def _with_bias(neurons: Neurons, part: int) -> Tensor:
    rows = neurons.inputs[:, part]
    return rows if neurons.bias is None else torch.cat([rows, neurons.bias[:, part, None]], 1)


def _cosine(first: Tensor, second: Tensor) -> Tensor:
    return normalize(first, dim=1) @ normalize(second, dim=1).T
