"""Which unit gets how many bits: the published per-layer rule, and solvers for one budget over everything."""

from moecompress.numerics.allocation.exact import highs, pulp_model, solve_pulp
from moecompress.numerics.allocation.pmq import pmq, pmq_cost, pmq_least
from moecompress.numerics.allocation.problem import Infeasible, Problem, Solution
from moecompress.numerics.allocation.solve import solve

__all__ = [
    "Infeasible",
    "Problem",
    "Solution",
    "highs",
    "pmq",
    "pmq_cost",
    "pmq_least",
    "pulp_model",
    "solve",
    "solve_pulp",
]
