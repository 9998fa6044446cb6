"""`python -m autopar.search.solver.warm`: compile the loops of the solver ahead, which takes some ten seconds, once.

Whoever does not call this waits for it in the first search. Compiled code is kept beside the sources, or in the user's cache where
those cannot be written to.
"""

from __future__ import annotations

from functools import cache
from threading import Thread

import numpy as np

from autopar.search.solver.arrays import lay_out
from autopar.search.solver.compiled import generator
from autopar.search.solver.dual import Dual
from autopar.search.solver.least_sums import least_sum
from autopar.search.solver.moves import improve, new_walk
from autopar.search.solver.problem import Problem, Segment, Table

__all__ = ["loading", "warm"]


def warm() -> None:
    """Call all loops on a small problem: a grid, and a node that hangs on it; and those of elimination on two tables."""
    side, size = 4, 4
    tables = (Table(np.arange(4.0), np.arange(4.0)[::-1].copy()), Table(np.arange(16.0).reshape(4, 4) % 7, np.zeros((size, size))))
    edges = [(n, n + 1, 1) for n in range(side * side) if (n + 1) % side] + [(n, n + side, 1) for n in range(side * (side - 1))]
    count = side * side + 1
    live = tuple((n, n + 4) for n in range(count))
    problem = Problem((0,) * count, (*edges, (0, count - 1, 1)), tables, (Segment(0, count, 1),), 6.0, live)
    arrays = lay_out(problem)
    dual = Dual(arrays)
    dual.step()
    dual.worth_keeping(np.inf)
    walk = new_walk(arrays, np.zeros(count, np.int64))
    improve(arrays, walk, arrays.cost, 0.0, 0.0, 0.0, 0, 1, generator(0))
    least_sum(0, [((0, 1), np.zeros((2, 2))), ((0, 2), np.zeros((2, 2)))], {0: 2, 1: 2, 2: 2})


@cache
def loading() -> Thread:
    """The thread that makes the loops ready, one in a process: read in a moment where they have been compiled before.

    Whoever waits for it can stop waiting: nothing else stops a compiler.
    """
    thread = Thread(target=warm, daemon=True)
    thread.start()
    return thread


if __name__ == "__main__":
    warm()
