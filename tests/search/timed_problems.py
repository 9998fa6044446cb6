"""Small random problems with time steps, and their optimum by trying everything."""

from __future__ import annotations

from itertools import product

import numpy as np
from hypothesis import strategies as st

from autopar.search.solver.problem import Problem, Table


def timed_problem(seed: int, nodes: int, steps: int, tightness: float, impossible: float = 0.1) -> Problem:
    """A random problem with whole costs and bytes, some pairs impossible, parallel edges, and holdings beside those of the nodes.

    `tightness` places the limit between the least (1.0) and the greatest (0.0) that any choice can need.
    """
    random = np.random.default_rng(seed)
    sizes = random.integers(1, 4, nodes)
    tables: list[Table] = []

    def table(shape: tuple[int, ...], memory: bool) -> int:
        cost = random.integers(0, 20, shape).astype(np.float64)
        if len(shape) == 2:
            cost[random.random(shape) < impossible] = np.inf
        held = random.integers(0, 10, shape).astype(np.float64) if memory else np.zeros(shape)
        tables.append(Table(cost, held))
        return len(tables) - 1

    def interval() -> tuple[int, int]:
        lo, hi = sorted(random.integers(0, steps + 1, 2).tolist())
        return lo, hi

    own = tuple(table((int(size),), True) for size in sizes)
    edges = []
    for _ in range(int(random.integers(0, 2 * nodes))):
        i, j = sorted(random.integers(0, nodes, 2).tolist())
        if i < j:
            edges.append((i, j, table((int(sizes[i]), int(sizes[j])), False)))
    also = tuple((int(i), own[i], *interval()) for i in random.integers(0, nodes, 2))
    live = tuple(interval() for _ in range(nodes))

    free = Problem(own, tuple(edges), tuple(tables), (), float("inf"), live, None, also)
    peaks = [free.evaluate(choice)[1] for choice in choices(free)]
    limit = float(np.floor(max(peaks) + tightness * (min(peaks) - max(peaks))))
    return Problem(own, tuple(edges), tuple(tables), (), limit, live, None, also)


def choices(problem: Problem) -> list[tuple[int, ...]]:
    return list(product(*(range(len(problem.tables[t].cost_s)) for t in problem.nodes)))


def optimum(problem: Problem) -> float:
    """The least cost within the limit, `inf` where there is none."""
    scores = (problem.evaluate(choice) for choice in choices(problem))
    return min((cost for cost, memory in scores if memory <= problem.memory_limit_bytes), default=float("inf"))


problems = st.builds(
    timed_problem,
    seed=st.integers(0, 10**6),
    nodes=st.integers(1, 6),
    steps=st.integers(1, 6),
    tightness=st.floats(0.0, 1.0),
    impossible=st.sampled_from([0.0, 0.1, 0.4]),
)
