"""`solve_over_time`: problems whose memory differs from step to step: shrink them, search what is left, and come back.

What is left without any memory that matters is eliminated exactly where its tables fit. Everything else is searched (`search_timed`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from time import perf_counter

import numpy as np

from autopar.search.eliminate import hopeless
from autopar.search.incumbent import Progress
from autopar.search.minimise import Minimiser, Price
from autopar.search.problem import Problem, Solution
from autopar.search.reduce import reduce
from autopar.search.shrink import shrink

__all__ = ["solve_over_time"]


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
    shrunk = shrink(problem)
    small = _eliminated(shrunk.problem, patient=time_limit_s is None)
    if small is None:
        from autopar.search.timed import search_timed  # compiled code takes a while to load

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
    elif progress is not None:
        progress(Progress("elimination", small.cost_s, small.lower_bound_s, 0.0, perf_counter() - start))
    choice = shrunk.original(np.array(small.choice, np.int64))
    cost, memory = problem.evaluate(choice)
    feasible = small.feasible and cost < np.inf and memory <= problem.memory_limit_bytes
    bound = min(small.lower_bound_s, cost) if feasible else small.lower_bound_s
    return replace(small, choice=choice, cost_s=cost, memory_bytes=memory, lower_bound_s=bound, feasible=feasible)


def _eliminated(problem: Problem, patient: bool) -> Solution | None:
    """The optimum of a problem in which no memory can matter, by elimination; None for others and where tables do not fit.

    Once begun, an elimination goes on to its end: dear ones are for the `patient`.
    """
    held = {t for t, live in zip(problem.nodes, problem.live or (), strict=True) if live[0] < live[1]}
    held |= {t for node, t, _, _ in problem.also if node < len(problem.nodes) - 1}
    if any(problem.tables[t].memory_bytes.any() for t in held):
        return None
    free = replace(problem, live=None, also=(), memory_limit_bytes=np.inf)
    sizes = {node: len(problem.tables[t].cost_s) for node, t in enumerate(problem.nodes)}
    if hopeless(sizes, [(i, j) for i, j, _ in problem.edges]):
        return None
    reduced = reduce(free)
    minimiser = Minimiser(reduced.problem)
    minimiser.searches = False  # a search is what this one is part of
    if not minimiser.fits or (minimiser.dear and not patient):  # which would be searched, too
        return None
    minimum = minimiser.minimise(Price(0.0))
    choice = reduced.original(minimum.choice)
    cost, memory = problem.evaluate(choice)
    return Solution(choice, cost, memory, min(minimum.bound, cost), True)
