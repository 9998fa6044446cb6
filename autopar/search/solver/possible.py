"""A choice that costs less than `inf`: the number of impossible strategies and pairs is what forest moves bring down to none."""

from __future__ import annotations

import numpy as np

from autopar.search.solver.arrays import Arrays
from autopar.search.solver.compiled import State
from autopar.search.solver.evaluate import cost_of
from autopar.search.solver.moves import improve, new_walk
from autopar.search.solver.problem import Ints

__all__ = ["possible_choice"]

_MOVES = 500
_SHAKE = 0.5  # less than one impossible pair: ties are broken at random
_TRIES = 1


def possible_choice(arrays: Arrays, choice: Ints, state: State) -> Ints | None:
    """A possible choice near `choice` `(n,)`, or None where `_MOVES` moves find none. Memory is not looked at."""
    if cost_of(arrays, choice) < np.inf:
        return choice
    none = np.zeros(0, np.int64)
    clashes = arrays._replace(
        cost=np.isinf(arrays.cost).astype(np.float64),
        table=np.isinf(arrays.table).astype(np.float64),
        hold_start=np.zeros_like(arrays.hold_start),
        hold_lo=none,
        hold_hi=none,
        hold_first=none,
        held=np.zeros(0),
        room=np.full(1, np.inf),
    )
    walk = new_walk(clashes, choice)
    improve(clashes, walk, clashes.cost, 0.0, _SHAKE, 0.0, _MOVES, _TRIES, state)
    return walk.best.copy() if walk.score[2] < 1 else None
