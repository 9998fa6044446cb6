"""A choice that costs less than `inf`, and of little memory: clashes, which are impossible strategies and pairs, are brought down to none.

Forest moves minimise the weights of clashes and, beside them, memory. Where they come to rest, pairs that clash weigh more from then on
(breakout: Morris 1993). Since all begin with the same small weight, memory has a say until clashes have been in the way for long.
"""

from __future__ import annotations

import numpy as np

from autopar.search.solver.arrays import Arrays
from autopar.search.solver.compiled import State
from autopar.search.solver.last_resort import priced_by_room
from autopar.search.solver.moves import improve, new_walk
from autopar.search.solver.problem import Ints

__all__ = ["Possible"]

_MOVES, _RESTS = 100, 5
_MEMORY = 0.5  # what memory that is not the least weighs on average, in clashes that are new
_SHAKE = 0.1
_TRIES = 1
_NEVER = 1e3


class Possible:
    """A walk from `start` `(n,)` to a possible `choice`, which is None until it is found; `nearest` has few clashes."""

    def __init__(self, arrays: Arrays, start: Ints, state: State) -> None:
        none = np.zeros(0, np.int64)
        memory = priced_by_room(arrays)
        memory -= np.repeat(np.minimum.reduceat(memory, arrays.first[:-1]), arrays.sizes)
        unit = float(memory[memory > 0].mean()) if memory.any() else 1.0
        self._arrays = arrays
        self._clashes = arrays._replace(
            cost=np.where(np.isinf(arrays.cost), _NEVER, _MEMORY * memory / unit),
            table=np.isinf(arrays.table).astype(np.float64),
            hold_start=np.zeros_like(arrays.hold_start),
            hold_lo=none,
            hold_hi=none,
            hold_first=none,
            held=np.zeros(0),
            room=np.full(1, np.inf),
        )
        self._source = np.repeat(np.arange(len(arrays.sizes)), np.diff(arrays.start))
        self._state = state
        self.nearest = start
        self.choice: Ints | None = start if not len(self._clashing()) and self._alone() else None

    def walk(self) -> None:
        """Some moves more, to some places of rest."""
        for _ in range(_RESTS):
            if self.choice is not None:
                return
            walk = new_walk(self._clashes, self.nearest)
            improve(self._clashes, walk, self._clashes.cost, 0.0, _SHAKE, 0.0, _MOVES, _TRIES, self._state)
            self.nearest = walk.best
            pairs = self._clashing()
            self._clashes.table[pairs] += 1.0
            if not len(pairs) and self._alone():
                self.choice = self.nearest

    def _clashing(self) -> Ints:
        """Places in the table of the pairs that clash."""
        arrays, choice = self._arrays, self.nearest
        pairs = arrays.rows + choice[self._source] * arrays.sizes[arrays.other] + choice[arrays.other]
        return np.unique(pairs[np.isinf(arrays.table[pairs])])

    def _alone(self) -> bool:
        return bool((self._arrays.cost[self._arrays.first[:-1] + self.nearest] < np.inf).all())
