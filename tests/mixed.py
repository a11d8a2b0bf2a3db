"""A quantizer for the tests of formats: every expert has its own bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from engine import write_recipe

from moecompress.numerics.grids import round_to_nearest
from moecompress.passes.base import Decision, LayerContext
from moecompress.passes.quantize_rtn import QuantizeRTN
from moecompress.recipe import Recipe, load_recipe
from moecompress.types import PROJECTIONS, LayerWeights, Scheme


class MixedRTN(QuantizeRTN):
    """Expert e has `cycle[e % len]` bits (1 = binary, below 0 = with zero points), and its down projection the next."""

    cycle: tuple[int, ...] = (1, 2, 3, 4)

    def apply(self, context: LayerContext, decision: Decision) -> LayerWeights:
        made = []
        for number, expert in enumerate(context.weights.experts):
            for place, name in enumerate(PROJECTIONS):
                bits = self.cycle[(number + place) % len(self.cycle)]
                zero: Literal["none", "int"] = "int" if bits < 0 else "none"
                scheme = Scheme(abs(bits), self.group_size, bits > 0, zero, binary=bits == 1)
                weight = expert.projection(name)
                rounded = round_to_nearest(weight.float(), scheme, grid="mse", scale_dtype=context.scale_dtype)
                expert = expert.with_projection(name, rounded)
            made.append(replace(expert))
        return context.weights.with_experts(tuple(made))


def mixed_recipe(folder: Path, model: Path, cycle: tuple[int, ...] = (1, 2, 3, 4), **sections: Any) -> Recipe:
    """A recipe that gives every expert its own bits, in groups of 16."""
    recipe = load_recipe(write_recipe(folder, model, [{"quantize.rtn": {"bits": 4, "group_size": 16}}], **sections))
    step = recipe.passes[0].model_copy(update={"params": MixedRTN(bits=4, group_size=16, cycle=cycle)})
    return recipe.model_copy(update={"passes": (step,)})
