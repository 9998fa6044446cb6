"""`solve_over_time`: problems whose memory differs from step to step: shrink them, search what is left, and come back.

Where reductions leave nothing, that is the answer. Everything else is searched (`search_timed`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from time import perf_counter

import numpy as np

from autopar.search.solver.incumbent import Progress
from autopar.search.solver.problem import Problem, Solution
from autopar.search.solver.shrink import shrink

__all__ = ["solve_over_time"]

_SHRINKING = 0.5  # of the time, at most about


def solve_over_time(
    problem: Problem,
    *,
    time_limit_s: float | None = None,
    seed: int = 0,
    gap: float = 0.0,
    progress: Callable[[Progress], None] | None = None,
) -> Solution:
    """A cheap choice within the limit of every time step, and a bound; see `solve`.

    Raises `InfeasibleError` when it is plain that nothing fits.
    """
    start = perf_counter()
    shrunk = shrink(problem, time_limit_s is None, np.inf if time_limit_s is None else _SHRINKING * time_limit_s)
    if len(shrunk.problem.nodes) > 1:
        from autopar.search.solver.timed import search_timed  # compiled code takes a while to load

        before = perf_counter() - start

        def told(step: Progress) -> None:
            assert progress is not None
            progress(replace(step, seconds=step.seconds + before))

        small = search_timed(
            shrunk.problem,
            time_limit_s=None if time_limit_s is None else max(0.0, time_limit_s - before),
            seed=seed,
            gap=gap,
            progress=None if progress is None else told,
        )
    else:
        cost, memory = shrunk.problem.evaluate((0,))
        small = Solution((0,), cost, memory, cost, True)
        if progress is not None:
            progress(Progress("elimination", cost, cost, 0.0, perf_counter() - start))
    choice = shrunk.original(np.array(small.choice, np.int64))
    cost, memory = problem.evaluate(choice)
    feasible = small.feasible and cost < np.inf and memory <= problem.memory_limit_bytes
    bound = min(small.lower_bound_s, cost) if feasible else small.lower_bound_s
    return replace(small, choice=choice, cost_s=cost, memory_bytes=memory, lower_bound_s=bound, feasible=feasible)
