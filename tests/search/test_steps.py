"""Few time steps in the tables, regions that may be computed again: bounds are bounds, what fits is found, `exact` is brute force."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from autopar.search.solver.minimise import Minimiser, Price
from autopar.search.solver.problem import Problem, Table
from autopar.search.solver.reduce import reduce
from autopar.search.solver.solve import solve
from autopar.search.solver.steps import in_steps
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


def switched(problem: Problem, seed: int) -> Problem:
    """With every repeat a region that may be computed again: that costs more, and mostly holds less."""
    rng = np.random.default_rng(seed)
    tables = []
    for table in problem.tables:
        more = rng.integers(0, 9, table.cost_s.shape).astype(float)
        less = np.minimum(table.memory_bytes, rng.integers(0, 12, table.cost_s.shape)).astype(float)
        tables.append(replace(table, again=Table(table.cost_s + more, less)) if rng.random() < 0.8 else table)
    regions, number = [], 0
    for segment in problem.segments:
        for _ in range(segment.count):
            inside = segment.count > 1 or rng.random() < 0.3
            regions += [number if inside else -1] * segment.length
            number += inside
    return replace(problem, tables=tuple(tables), regions=tuple(regions))


@pytest.mark.parametrize("block", range(4))
def test_the_best_pattern_of_what_is_computed_again_is_brute_force(block: int) -> None:
    tried = met = 0
    for seed in range(15 * block, 15 * block + 15):
        problem = switched(repeated_problem(seed, 1 + seed % 2, 3 + seed % 2, most=2, infinite=0.1), seed)
        assert problem.regions is not None
        plain = Minimiser(problem)
        choices = [choice for _, _, choice in brute_force(replace(problem, regions=None))]
        patterns = [np.array(pattern) for pattern in product((0, 1), repeat=max(problem.regions) + 1)]
        every = [plain.usage(np.array(choice), pattern) for choice in choices for pattern in patterns]
        if not every:
            continue
        reduced = reduce(problem)
        minimiser = Minimiser(reduced.problem)
        for price in (0.0, 0.3, 2.0, 50.0):
            best = min(cost + price * usage[0] for cost, usage in every)
            found = minimiser.minimise(Price(price))
            cost, usage = minimiser.usage(found.choice, found.again)
            assert found.bound <= best * (1 + 1e-12) <= (cost + price * usage[0]) * (1 + 1e-11), seed
            tried, met = tried + 1, met + (found.bound >= best * (1 - 1e-12))
            assert plain.usage(np.array(reduced.original(found.choice)), found.again)[0] == pytest.approx(cost)
    # What goes from a repeat to a region behind all of them counts at its best.
    assert tried > 40 and met > 0.9 * tried
