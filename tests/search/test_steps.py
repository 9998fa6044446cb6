"""Few time steps in the tables, and regions that may be computed again: bounds are bounds, what fits is found, and `exact` is brute force."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from autopar.search.memory import constrained
from autopar.search.incumbent import Incumbent
from autopar.search.minimise import Minimiser, Price
from autopar.search.problem import Problem, Table
from autopar.search.reduce import reduce
from autopar.search.solve import solve
from autopar.search.steps import in_steps
from tests.search.test_solver import brute_force, random_problem, repeated_problem


def timed(problem: Problem, seed: int) -> Problem:
    """With memory at two steps: some nodes and edges at the first, some at the second, some at both; equal for equal repeats."""
    rng = np.random.default_rng(seed)
    spans = [(0, 1), (1, 2), (0, 2)]
    of_table = {table: spans[int(rng.integers(3))] for table in range(len(problem.tables))}
    also = []
    further = {table: rng.integers(0, 9, len(problem.tables[table].cost_s)).astype(float) for table in set(problem.nodes)}
    tables = list(problem.tables)
    number = {}
    for table, held in further.items():
        number[table] = len(tables)
        tables.append(Table(np.zeros_like(held), held))
    for node, table in enumerate(problem.nodes):
        if of_table[table] != (0, 2):
            also.append((node, number[table], 1 - of_table[table][0], 2 - of_table[table][0]))
    return replace(
        problem, tables=tuple(tables), live=tuple(of_table[t] for t in problem.nodes),
        edges_live=tuple(of_table[t] for *_, t in problem.edges), also=tuple(also),
    )  # fmt: skip


@pytest.mark.parametrize("block", range(4))
def test_two_steps_are_brute_force(block: int) -> None:
    for seed in range(25 * block, 25 * block + 25):
        problem = repeated_problem(seed, 2, 3, most=2, infinite=0.1) if seed % 3 == 0 else random_problem(seed, 6)
        problem = timed(problem, seed)
        assert in_steps(problem) is not None
        choices = [(problem.evaluate(choice), choice) for _, _, choice in brute_force(problem)]
        if not choices:
            continue
        rng = np.random.default_rng(seed)
        for limit in rng.choice(sorted({memory for (_, memory), _ in choices}), 2):
            limited = replace(problem, memory_limit_bytes=float(limit))
            best = min(cost for (cost, memory), _ in choices if memory <= limit)
            for effort in ("fast", "exact"):
                solution = solve(limited, effort=effort)
                assert solution.lower_bound_s <= best * (1 + 1e-9), seed
                assert solution.feasible and solution.memory_bytes <= limit, seed
                assert limited.evaluate(solution.choice) == pytest.approx((solution.cost_s, solution.memory_bytes))
            assert solution.cost_s == pytest.approx(best) and solution.lower_bound_s == pytest.approx(best, rel=1e-8), seed
