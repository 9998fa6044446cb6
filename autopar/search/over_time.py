"""`solve_over_time`: problems whose memory differs from step to step: shrink them, search what is left, and come back.

What is left without any memory that matters is eliminated exactly where its tables fit. Everything else is searched (`search_timed`),
and what is small is given to HiGHS as well (`improve_core`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from time import perf_counter

import numpy as np

from autopar.search.incumbent import Progress
from autopar.search.minimise import Minimiser, Price
from autopar.search.problem import Problem, Solution
from autopar.search.reduce import reduce
from autopar.search.shrink import shrink

__all__ = ["solve_over_time"]

_SEARCH_SHARE = 0.3  # of the time, before HiGHS; it needs a good choice to start from
_CORE_SHARE = 0.8  # of what is left then
_FEW_ROUNDS, _MANY_ROUNDS = 10, 200  # of search without a better choice, where there is no time limit
_MOST_PAIRS = 100_000  # of strategies at the ends of edges, for HiGHS
_CLOSED = 2e-9  # bounds of HiGHS are lowered by about so much for rounding


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
    small = _eliminated(shrunk.problem)
    if small is None:
        small = _Rounds(shrunk.problem, start, time_limit_s, seed, gap, progress).run()
    elif progress is not None:
        progress(Progress("elimination", small.cost_s, small.lower_bound_s, 0.0, perf_counter() - start))
    choice = shrunk.original(np.array(small.choice, np.int64))
    cost, memory = problem.evaluate(choice)
    feasible = small.feasible and cost < np.inf and memory <= problem.memory_limit_bytes
    bound = min(small.lower_bound_s, cost) if feasible else small.lower_bound_s
    return replace(small, choice=choice, cost_s=cost, memory_bytes=memory, lower_bound_s=bound, feasible=feasible)


class _Rounds:
    """Search; where little is left, HiGHS in between, which closes gaps that search cannot; and search again."""

    def __init__(
        self,
        problem: Problem,
        start: float,
        time_limit_s: float | None,
        seed: int,
        gap: float,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self.problem, self.start, self.time_limit_s = problem, start, time_limit_s
        self.seed, self.gap, self.progress = seed, gap, progress
        self.best: Solution | None = None
        self.stopped = False

    def run(self) -> Solution:
        if _pairs(self.problem) > _MOST_PAIRS:
            return self._search(1.0)
        best = self._search(_SEARCH_SHARE, _FEW_ROUNDS)
        if self._closed(best):
            return best
        from autopar.search.core import improve_core  # HiGHS takes a while to import

        try:
            self._told(Progress("branch and bound", best.cost_s if best.feasible else np.inf, best.lower_bound_s, 0.0, 0.0))
            left = self._left()
            best = self.best = improve_core(self.problem, best, None if left is None else _CORE_SHARE * left)
            self._told(Progress("branch and bound", best.cost_s if best.feasible else np.inf, best.lower_bound_s, 0.0, 0.0))
        except KeyboardInterrupt:
            return best
        return best if self._closed(best) or self.time_limit_s is None else self._search(1.0)

    def _left(self) -> float | None:
        return None if self.time_limit_s is None else max(0.0, self.time_limit_s - (perf_counter() - self.start))

    def _closed(self, best: Solution) -> bool:
        return self.stopped or (best.feasible and best.cost_s - best.lower_bound_s <= max(self.gap, _CLOSED) * abs(best.lower_bound_s))

    def _search(self, share: float, idle_rounds: int = _MANY_ROUNDS) -> Solution:
        """Search for a share of what is left; the better choice and the higher bound of that and what was known."""
        from autopar.search.timed import search_timed  # compiled code takes a while to load

        left = self._left()
        found = search_timed(
            self.problem,
            time_limit_s=None if left is None else share * left,
            seed=self.seed + (self.best is not None),
            gap=self.gap,
            progress=None if self.progress is None else self._told,
            stopped=self._stop,
            idle_rounds=idle_rounds,
        )
        if self.best is not None:
            bound = max(found.lower_bound_s, self.best.lower_bound_s)
            better = self.best if (not self.best.feasible, self.best.cost_s) <= (not found.feasible, found.cost_s) else found
            found = replace(better, lower_bound_s=bound)
        self.best = found
        return found

    def _stop(self) -> None:
        self.stopped = True

    def _told(self, step: Progress) -> None:
        """Pass progress on, with what earlier rounds know and the seconds since the start."""
        if self.progress is None:
            return
        cost, bound = step.best_cost_s, step.lower_bound_s
        if self.best is not None:
            cost = min(cost, self.best.cost_s) if self.best.feasible else cost
            bound = max(bound, self.best.lower_bound_s)
        gap = (cost - bound) / abs(bound) if cost > bound and bound != 0 else 0.0
        self.progress(Progress(step.phase, cost, bound, gap, perf_counter() - self.start))


def _pairs(problem: Problem) -> int:
    sizes = [table.cost_s.size for table in problem.tables]
    return sum(sizes[table] for _, _, table in problem.edges)


def _eliminated(problem: Problem) -> Solution | None:
    """The optimum of a problem in which no memory can matter, by elimination; None for others and where tables do not fit."""
    held = {t for t, live in zip(problem.nodes, problem.live or (), strict=True) if live[0] < live[1]}
    held |= {t for node, t, _, _ in problem.also if node < len(problem.nodes) - 1}
    if any(problem.tables[t].memory_bytes.any() for t in held):
        return None
    free = replace(problem, live=None, also=(), memory_limit_bytes=np.inf)
    reduced = reduce(free)
    minimiser = Minimiser(reduced.problem)
    if not minimiser.fits:  # which would be searched, too
        return None
    minimum = minimiser.minimise(Price(0.0))
    choice = reduced.original(minimum.choice)
    cost, memory = problem.evaluate(choice)
    return Solution(choice, cost, memory, min(minimum.bound, cost), True)
