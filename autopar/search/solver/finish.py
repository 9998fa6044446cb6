"""`Finish`: the integer program of what is left open, solved beside the walks until it is done or the search is."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from ortools.sat.python import cp_model

from autopar.search.solver.arrays import Arrays
from autopar.search.solver.dual import Dual
from autopar.search.solver.problem import Ints
from autopar.search.solver.residual import residual
from autopar.search.solver.walker import Best

__all__ = ["Finish"]

_SPARE_S = 0.5  # before the end of the search
_LEAST_S = 3.0  # what is worth beginning for: building the program takes a while
_MOST_WORK = 60.0  # CP-SAT's deterministic time (about seconds), where there is no time limit


class Finish:
    """A program under way on a thread of its own: `poll` says what is known, `stop` ends it.

    CP-SAT runs with one worker, so that the same program has the same answer. `bound` is `inf` where it shows that nothing fits.
    """

    def __init__(self, arrays: Arrays, dual: Dual, best: Best, threads: ThreadPoolExecutor, left_s: float | None, seed: int) -> None:
        self.cost = best.cost if best.excess == 0 else np.inf
        self.bound = -np.inf
        self.choice: Ints | None = None
        self._running: Future[tuple[Ints | None, float]] | None = None
        if left_s is not None and left_s < _LEAST_S:
            return
        program = residual(
            arrays, dual.worth_keeping(self.cost) & (arrays.cost < np.inf), dual.choice if best.choice is None else best.choice
        )
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
