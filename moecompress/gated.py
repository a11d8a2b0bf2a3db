"""How gates (prune.top_k, .odp, .otp) fit into a plan: what only the native format can hold, and in which order."""

from __future__ import annotations

from collections.abc import Sequence

from moecompress.errors import message
from moecompress.passes.base import Pass


def gate_of(passes: Sequence[Pass]) -> Pass | None:
    """The pass that leaves out some of a token's experts, when the recipe has one."""
    return next((step for step in passes if step.gates_experts), None)


def gate_problems(passes: Sequence[Pass]) -> list[str]:
    """What is wrong with the order or number of such passes."""
    found = [position for position, step in enumerate(passes) if step.gates_experts]
    if not found:
        return []
    problems = []
    if len(found) > 1:
        problems.append(
            message(passes[found[1]].name, f"a second pass of its kind after {passes[found[0]].name}", "one")
        )
    later = [step.name for step in passes[found[0] + 1 :] if step.removes_experts]
    if later:
        then = "remove experts first, so that it decides about the experts that are there"
        problems.append(message(passes[found[0]].name, f"comes before {', '.join(later)}", then=then))
    return problems


def unheld_gate(passes: Sequence[Pass]) -> str | None:
    """Why formats other than native cannot hold the recipe's gate; None without one."""
    step = gate_of(passes)
    if step is None:
        return None
    return f"{step.name}: tokens use different numbers of experts, which no stock loader does; use format: native"
