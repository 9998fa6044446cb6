"""`search_timed`: choices within the memory of every time step, from the dual's prices and forest moves, until time or gap is up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from autopar.search.arrays import Arrays, lay_out
from autopar.search.compiled import State, generator
from autopar.search.dual import Dual
from autopar.search.evaluate import cost_of, usage_of
from autopar.search.incumbent import Progress
from autopar.search.moves import Walk, improve, new_walk
from autopar.search.problem import Ints, Problem, Solution

__all__ = ["search_timed"]

_DUAL_STEPS = 50  # between two looks at the time
_STALLED = 1e-5  # of the bound: less in that many steps is no more worth it before the search
_ENTRIES = 4_000_000  # table entries that a round of moves may read, about
_TRIES = 8
_IDLE_ROUNDS = 200  # without a better choice: the end where no time limit is given


@dataclass
class _Best:
    """The best choice so far: within the limit and cheapest, or over it by least."""

    arrays: Arrays
    constant: float
    choice: Ints | None = None
    cost: float = np.inf
    excess: float = np.inf

    def offer(self, choice: Ints) -> bool:
        """Take the choice if it is better, by sums made anew. Returns whether it is."""
        cost = float(cost_of(self.arrays, choice)) + self.constant
        if not cost < np.inf:
            return False
        excess = float(np.maximum(usage_of(self.arrays, choice) - self.arrays.room, 0.0).sum())
        if (excess, cost) < (self.excess, self.cost):
            self.choice, self.cost, self.excess = choice.copy(), cost, excess
            return True
        return False


@dataclass
class _Clock:
    """Seconds since the start, and whether they are up."""

    limit_s: float | None
    start: float = field(default_factory=perf_counter)

    @property
    def seconds(self) -> float:
        return perf_counter() - self.start

    @property
    def up(self) -> bool:
        return self.limit_s is not None and self.seconds >= self.limit_s


def search_timed(
    problem: Problem,
    *,
    time_limit_s: float | None = None,
    seed: int = 0,
    gap: float = 0.0,
    progress: Callable[[Progress], None] | None = None,
) -> Solution:
    """Search until `time_limit_s`, until cost and bound differ by at most `gap` of the bound, or until nothing is found for long.

    No edge may hold memory. The same seed gives the same answer where the limit is not what stops it. Ctrl-C ends the search with the
    best choice so far. `feasible` of the solution is False where no choice within the limit was found: then the choice is the one
    that was over it by least.
    """
    clock = _Clock(time_limit_s)
    search = _Search(lay_out(problem), clock, seed, gap, progress)
    try:
        search.run()
    except KeyboardInterrupt:
        if search.best.choice is None:
            raise
    choice = search.best.choice if search.best.choice is not None else search.dual.choice
    picked = tuple(choice.tolist())
    cost, memory = problem.evaluate(picked)
    feasible = cost < np.inf and memory <= problem.memory_limit_bytes
    bound = min(search.dual.bound, cost) if feasible else search.dual.bound
    return Solution(picked, cost, memory, bound, feasible, float(search.dual.best_prices.sum()))


class _Search:
    """The dual, the best choice and the walks of one search."""

    def __init__(self, arrays: Arrays, clock: _Clock, seed: int, gap: float, progress: Callable[[Progress], None] | None) -> None:
        self.arrays, self.clock, self.gap, self.progress = arrays, clock, gap, progress
        self.state: State = generator(seed)
        self.best = _Best(arrays, 0.0)
        self.dual = Dual(arrays)
        entries = int((arrays.sizes[arrays.other] * np.repeat(arrays.sizes, np.diff(arrays.start))).sum())
        self.moves = max(10, min(2000, _ENTRIES // max(entries, 1) * 4))

    @property
    def done(self) -> bool:
        if self.best.excess == 0 and self.best.cost - self.dual.bound <= self.gap * abs(self.dual.bound):
            return True
        return self.clock.up

    def run(self) -> None:
        self._raise_bound()
        self._walk()

    def _raise_bound(self) -> None:
        """Move the prices until the bound hardly grows; roundings of the messages are the first choices."""
        before = -np.inf
        while not self.done:
            for _ in range(_DUAL_STEPS):
                self.best.offer(self.dual.choice)
                self.dual.step()
            self._report("bound")
            if self.dual.bound - before <= _STALLED * abs(self.dual.bound) and self.best.choice is not None:
                return
            before = self.dual.bound

    def _walk(self) -> None:
        """Improve the best choice by moves, and the bound beside it."""
        if self.done or self.best.choice is None:
            return
        idle = 0
        walk: Walk = new_walk(self.arrays, self.best.choice)
        priced = self.dual.priced
        while not self.done and (self.clock.limit_s is not None or idle < _IDLE_ROUNDS):
            paid = float(self.dual.best_prices.max(initial=0.0))
            byte_price = max(paid, 1e-6 * abs(self.best.cost) / abs(self.arrays.limit))
            improve(self.arrays, walk, priced, byte_price, 1e-3 * abs(self.best.cost), 0.0, self.moves, _TRIES, self.state)
            idle = 0 if self.best.offer(walk.best) else idle + 1
            self._report("moves")

    def _report(self, phase: str) -> None:
        if self.progress is not None:
            cost, bound = self.best.cost if self.best.excess == 0 else np.inf, self.dual.bound
            gap = (cost - bound) / abs(bound) if cost > bound and bound != 0 else 0.0
            self.progress(Progress(phase, cost, bound, gap, self.clock.seconds))
