"""`Finish`: a program for CP-SAT, as that of what is left open (`rest`), solved beside the walks until it is done or the search is."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
from ortools.sat.python import cp_model

from autopar.search.solver.arrays import Arrays
from autopar.search.solver.dual import Dual
from autopar.search.solver.problem import Ints
from autopar.search.solver.residual import Residual, residual
from autopar.search.solver.walker import Best

__all__ = ["LEAST_S", "Finish", "rest"]

_SPARE_S = 0.5  # before the end of the search
LEAST_S = 3.0  # what is worth beginning for: building the program takes a while
_MOST_WORK = 60.0  # CP-SAT's deterministic time (about seconds), where there is no time limit


class Program(Protocol):
    def solve(self, solver: cp_model.CpSolver) -> tuple[Ints | None, float]:
        """A choice, if one was found, and a bound, `inf` where there is none."""


class Finish:
    """A program under way on a thread of its own: `poll` says what is known, `stop` ends it.

    CP-SAT runs with one worker, so that the same program has the same answer. `bound` is `inf` where it shows that nothing fits; `cost`
    is that of the best choice when it began, which nothing that it leaves out is below.
    """

    def __init__(self, program: Program | None, cost: float, threads: ThreadPoolExecutor, left_s: float | None, seed: int) -> None:
        self.cost = cost
        self.bound = -np.inf
        self.choice: Ints | None = None
        self._running: Future[tuple[Ints | None, float]] | None = None
        if program is None:
            return
        self._solver = cp_model.CpSolver()
        self._solver.parameters.num_workers = 1
        self._solver.parameters.random_seed = seed % 2**31
        if left_s is None:
            self._solver.parameters.max_deterministic_time = _MOST_WORK
        else:
            self._solver.parameters.max_time_in_seconds = max(0.0, left_s - _SPARE_S)
        self._running = threads.submit(program.solve, self._solver)

    @property
    def running(self) -> bool:
        return self._running is not None

    def poll(self, wait: bool = False) -> bool:
        """Whether it has ended since the last call; then `choice` and `bound` say what it found. `wait`: until it has."""
        if self._running is None or not (wait or self._running.done()):
            return False
        self.choice, bound = self._running.result()
        self.bound = min(bound, self.cost)
        self._running = None
        return True

    def stop(self) -> None:
        if self._running is not None:
            self._solver.stop_search()
            self.poll(wait=True)


def rest(arrays: Arrays, dual: Dual, best: Best) -> Residual | None:
    """The program of what is left open by the bound and the best choice; None where it would be too large."""
    cost = best.cost if best.excess == 0 else np.inf
    return residual(arrays, dual.worth_keeping(cost) & (arrays.cost < np.inf), dual.choice if best.choice is None else best.choice)
