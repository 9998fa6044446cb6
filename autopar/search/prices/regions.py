"""What stays in memory of repeats that are computed again: of a region only what it reads from outside, and of what it makes only what
others keep.

A region is one repeat that the backward pass recomputes (`autopar.runtime.recompute`). Each value is counted once: at the first region
that reads it from outside (`checkpoint_bytes`), unless an operation outside of all regions keeps it anyway. What a stage receives is kept
by the region that begins with it. A region that makes a value for others (a long skip) drops it when its last reader is done, or when a
later region keeps it; until then it is only passing (`unkept`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from autopar.search.prices.liveness import Alive, lives
from autopar.search.structure import Structure

if TYPE_CHECKING:
    from autopar.search.prices.segments import Row
    from autopar.search.solver.problem import Floats
    from autopar.search.solver.rows import Bools, Ints

_NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class Regions:
    """`unkept[i]`: bytes that pass while operation i runs, where regions keep nothing, `(operations,)`. `checkpoint_bytes(start)`: what
    the region from there on keeps. `again[i]`: whether operation i is in a region."""

    unkept: Floats
    again: Bools
    _first: Ints
    _size: Floats

    def checkpoint_bytes(self, start: int, stop: int) -> float:
        here = (self._first >= start) & (self._first < stop)
        return float(self._size[here].sum())


def regions(structure: Structure, alive: Alive, rows: Sequence[Row]) -> Regions:
    """Of the recomputed repeats of `rows`; where there are none, as if all were."""
    count = len(structure.graph.ops)
    number = np.full(count, -1, np.int64)
    some = any(row.recompute for row in rows)
    for row in rows:
        for repeat in range(row.recompute if some else row.count):
            start = row.start + repeat * row.length
            number[start : start + row.length] = start
    facts = lives(structure)
    home = number[facts.at]
    # Where it is counted as kept, if that is not in a region; what regions keep of it, they keep from the first that reads it on.
    counted = np.where((facts.counted >= 0) & (facts.correct >= 0), facts.counted, _NEVER)
    counted = np.where(number[np.minimum(counted, count - 1)] >= 0, _NEVER, counted)
    entered = np.full(len(home), _NEVER, np.int64)
    needed = np.full(len(home), _NEVER, np.int64)
    needing = structure.needs_of_training
    for index, (readers, names) in enumerate(zip(facts.readers, facts.names, strict=True)):
        entered[index] = min((at for at in readers if number[at] not in (-1, home[index])), default=_NEVER)
        if home[index] >= 0 and facts.counted[index] == facts.at[index]:
            # Several need it, and it is counted where it is made: in a region, that drops it.
            needed[index] = min((at for name in names for at, _ in needing.get(name, ()) if number[at] < 0), default=_NEVER)
    received = facts.received & (home >= 0)
    first = np.where(received, facts.at, np.where((counted < _NEVER) | (facts.received & ~received), _NEVER, np.minimum(entered, needed)))
    # Needed outside of regions alone: kept by the region that makes it.
    first = np.where((needed < _NEVER) & (first == needed), facts.at, first)
    kept_from = np.where(facts.received, facts.at, np.minimum(np.minimum(counted, entered), np.where(needed < _NEVER, facts.at, _NEVER)))
    until = np.maximum(np.minimum(facts.read, kept_from), facts.at)
    passing = np.zeros(count + 1)
    np.add.at(passing, facts.at, alive.size)
    np.add.at(passing, until, -alive.size)
    return Regions(np.cumsum(passing[:-1]) + alive.beside, number >= 0, first, alive.size)
