"""The same knapsack for general solvers: HiGHS through scipy, and a PuLP model that can be written to a file."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moecompress.numerics.allocation.problem import Problem, Solution

_SCALE = 1e3  # largest cost the solvers see: their tolerances are absolute


def highs(problem: Problem, *, gap: float = 0.0, seconds: float = 60.0) -> Solution:
    """HiGHS branch and bound (scipy.optimize.milp). gap: relative gap that is good enough.

    What it returns is checked with whole numbers: one choice per unit, budget kept. Raises RuntimeError when it found
    nothing in time.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    units, choices = problem.cost.shape
    items = units * choices
    scale, step = _scales(problem)
    rows = np.repeat(np.arange(units), choices)
    one = csr_array((np.ones(items), (rows, np.arange(items))), shape=(units, items))
    sizes = csr_array((problem.size // step).reshape(1, -1).astype(np.float64))
    result = milp(
        (problem.cost * scale).ravel(),
        integrality=np.ones(items),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one, 1, 1), LinearConstraint(sizes, -np.inf, problem.budget // step)],
        options={"mip_rel_gap": gap, "time_limit": seconds},
    )
    if result.x is None:
        raise RuntimeError(f"HiGHS: {result.message}")
    bound = result.mip_dual_bound if result.mip_dual_bound is not None else result.fun
    return _checked(problem, result.x.reshape(units, choices), float(bound) / scale, "HiGHS")


def pulp_model(problem: Problem, name: str = "allocation") -> Any:
    """The problem as a `pulp.LpProblem` with variables x_<unit>_<choice>; `.writeLP(path)`, `.writeMPS(path)` write it.

    Costs are scaled so that the largest is 1000; sizes are divided by their common divisor.
    """
    import pulp

    units, choices = problem.cost.shape
    scale, step = _scales(problem)
    model = pulp.LpProblem(name, pulp.LpMinimize)
    x = [[pulp.LpVariable(f"x_{u}_{c}", cat="Binary") for c in range(choices)] for u in range(units)]
    costs, sizes = problem.cost * scale, problem.size // step
    every = [(u, c) for u in range(units) for c in range(choices)]
    model += pulp.LpAffineExpression((x[u][c], float(costs[u, c])) for u, c in every)
    for unit in range(units):
        model += pulp.lpSum(x[unit]) == 1, f"unit_{unit}"
    used = pulp.LpAffineExpression((x[u][c], int(sizes[u, c])) for u, c in every)
    model += used <= problem.budget // step, "budget"
    return model


def solve_pulp(problem: Problem, *, gap: float = 0.0, seconds: float = 60.0) -> Solution:
    """`pulp_model` solved by CBC, single-threaded. bound: the cost itself when it says optimal at gap 0, else 0.

    Raises RuntimeError when CBC found nothing in time.
    """
    import pulp

    model = pulp_model(problem)
    solver = pulp.PULP_CBC_CMD(msg=False, gapRel=gap, timeLimit=seconds, threads=1)
    model.solve(solver)
    units, choices = problem.cost.shape
    found = {variable.name: variable.value() for variable in model.variables()}
    if any(value is None for value in found.values()):
        raise RuntimeError(f"CBC: {pulp.LpStatus[model.status]}")
    x = np.array([[found[f"x_{u}_{c}"] for c in range(choices)] for u in range(units)])
    proven = model.sol_status == pulp.LpSolutionOptimal and gap == 0
    return _checked(problem, x, np.inf if proven else 0.0, "CBC")


def _scales(problem: Problem) -> tuple[float, int]:
    """Factor for the costs, divisor of all sizes."""
    top = float(problem.cost.max())
    divisor = int(np.gcd.reduce(problem.size, axis=None))
    return (_SCALE / top if top > 0 else 1.0), max(1, divisor)


def _checked(problem: Problem, x: NDArray[np.float64], bound: float, solver: str) -> Solution:
    choice = x.argmax(1)
    if not np.allclose(x.max(1), 1, atol=1e-3) or not np.allclose(x.sum(1), 1, atol=1e-3):
        raise RuntimeError(f"{solver}: the answer does not take one choice per unit")
    if int(problem.pick(problem.size, choice).sum()) > problem.budget:
        raise RuntimeError(f"{solver}: the answer exceeds the budget")
    return problem.solution(choice, bound)
