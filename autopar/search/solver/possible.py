"""A choice that costs less than `inf`: the number of impossible strategies and pairs is what forest moves bring down to none."""

from __future__ import annotations

import numpy as np

from autopar.search.solver.arrays import Arrays
from autopar.search.solver.compiled import State
from autopar.search.solver.moves import improve, new_walk
from autopar.search.solver.problem import Ints

__all__ = ["Possible"]

_MOVES = 500
_SHAKE = 0.5  # less than one impossible pair: ties are broken at random
_TRIES = 1


class Possible:
    """A walk from `start` `(n,)` to a possible choice. Memory is not looked at: what is near a choice of little memory needs little."""

    def __init__(self, arrays: Arrays, start: Ints, state: State) -> None:
        none = np.zeros(0, np.int64)
        self._clashes = arrays._replace(
            cost=np.isinf(arrays.cost).astype(np.float64),
            table=np.isinf(arrays.table).astype(np.float64),
            hold_start=np.zeros_like(arrays.hold_start),
            hold_lo=none,
            hold_hi=none,
            hold_first=none,
            held=np.zeros(0),
            room=np.full(1, np.inf),
        )
        self._walk, self._state = new_walk(self._clashes, start), state

    @property
    def choice(self) -> Ints | None:
        """A possible choice; None where none is found yet."""
        return self._walk.best.copy() if self._walk.score[2] < 1 else None

    def walk(self) -> None:
        """Some moves more."""
        if not self._walk.score[2] < 1:
            improve(self._clashes, self._walk, self._clashes.cost, 0.0, _SHAKE, 0.0, _MOVES, _TRIES, self._state)
