"""`hurry`: the most of a moment that is left, when nothing that fits is known."""

from __future__ import annotations

from collections.abc import Iterator

from autopar.search.solver.arrays import Arrays
from autopar.search.solver.compiled import State
from autopar.search.solver.moves import improve, new_walk
from autopar.search.solver.possible import Possible
from autopar.search.solver.problem import Ints

__all__ = ["hurry"]

_MOVES = 20  # at a time
_TIMES = 50
_TRIES = 8


def hurry(arrays: Arrays, possible: Possible, best: Ints | None, byte_price: float, state: State) -> Iterator[Ints]:
    """What `possible` comes to, and what forest moves make of that, some at a time; until then, of `best`, the choice over the limit by
    least, if there is one. Not all of them are possible, nor within the limit.
    """
    for _ in range(_TIMES):
        if possible.choice is not None or best is not None:
            break
        possible.walk()
        yield possible.nearest
    start = best if possible.choice is None else possible.choice
    if start is None:
        return
    yield start
    walk = new_walk(arrays, start)
    price = max(byte_price, abs(walk.score[0]) / arrays.unit)
    for _ in range(_TIMES):
        improve(arrays, walk, arrays.cost, price, 0.0, 0.0, _MOVES, _TRIES, state)
        yield walk.best
