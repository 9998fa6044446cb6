"""How many repeats to recompute: as many as memory asks for, where that is cheaper than sharding more.

A repeat that is recomputed takes its forward pass twice and keeps only what enters it. Whether each repeat is, is chosen with everything
else where the problem is relaxed to prices of memory: of a repeat both tables are made, and the smaller entries taken, so that powers
find the best of all patterns (`Place.switched`). That proves a bound for every pattern, and says how many of each segment's repeats. Plans
are then searched with just so many, and one more or fewer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from autopar.search.solver.minimise import Minimiser, Minimum, Price
from autopar.search.solver.problem import Floats

if TYPE_CHECKING:
    from autopar.search.stages.place import Found, Place, Settings

Counts = tuple[tuple[int, ...], ...]
_PRICES = 24
_CLOSE = 1e-5  # of the priced cost: a corner so little below the line between two others says nothing new
_SOLVES = 4
_ENOUGH = 0.002  # above the bound: not searched further


@dataclass(frozen=True, slots=True)
class Relaxed:
    """`bound_s`: no choice within the limit costs less, whatever is recomputed; infinite where nothing is within it. `counts`: by stage and
    segment, how many repeats the mixture that the bound belongs to recomputes. `price_s_per_byte`: of memory, at the bound. `guessed`: the
    bound is that of any memory, and the counts are a guess."""

    bound_s: float
    counts: tuple[tuple[float, ...], ...]
    price_s_per_byte: float = 0.0
    guessed: bool = False


class _Corner:
    def __init__(self, minimiser: Minimiser, minimum: Minimum) -> None:
        self.minimum = minimum
        self.cost, self.usage = minimiser.usage(minimum.choice, minimum.again)
        self.memory = minimiser.weigh(self.usage)
        self.again: Floats = np.zeros(0) if minimum.again is None else minimum.again.astype(np.float64)


def relaxed(place: Place, limits: Sequence[float], price: float = 0.0, enough_s: float = math.inf) -> Relaxed | None:
    """The bound of every pattern of recomputation; None where elimination cannot prove one.

    `limits`: bytes by step of the problem. `price`: of memory, a guess that is tried first; where it proves `enough_s`, nothing else is."""
    ready = place.switched
    if not ready.minimiser.fits or ready.minimiser.dear:
        return None
    room = np.array([limits[place.starts.index(start)] if start in place.starts else math.inf for start in ready.starts])
    found, over = _walk(ready.minimiser, room, place, price, enough_s)
    if found.bound_s < enough_s and (over > 0).any():
        weights = np.zeros(len(over))
        weights[over.argmax()] = 1.0
        other, _ = _walk(ready.minimiser.weighted(tuple(weights.tolist())), room, place, price, enough_s)
        found = max(found, other, key=lambda one: one.bound_s)
    return found


def _walk(minimiser: Minimiser, limits: Floats, place: Place, price: float, enough_s: float) -> tuple[Relaxed, Floats]:
    """Along the hull of memory and cost, to the price at which the bound is highest; and by how much the mixture is over each limit."""
    limit = minimiser.weigh(limits)
    best_price = 0.0
    low: _Corner | None = None
    high: _Corner | None = None
    bound = -math.inf
    if price > 0:
        guess = _Corner(minimiser, minimiser.minimise(Price(price)))
        bound, best_price = guess.minimum.bound - price * limit, price
        if bound >= enough_s:
            return _relaxed(bound, guess.again, place, price), np.zeros(len(limits))
        low, high = (guess, None) if guess.memory > limit else (None, guess)
    if low is None:
        low = _Corner(minimiser, minimiser.minimise(Price(0.0)))
        if low.memory <= limit:
            return _relaxed(low.minimum.bound, low.again, place), low.usage - limits
        if low.minimum.bound > bound:
            bound, best_price = low.minimum.bound, 0.0
    if high is None:
        high = _Corner(minimiser, minimiser.minimise(Price(math.inf)))
        if high.memory > limit:
            return _relaxed(math.inf if high.minimum.exact else bound, high.again, place), np.zeros(len(limits))
    for _ in range(_PRICES):
        if low.memory <= high.memory or bound >= enough_s:
            break
        price = max(0.0, (high.cost - low.cost) / (low.memory - high.memory))
        corner = _Corner(minimiser, minimiser.minimise(Price(price)))
        if corner.minimum.bound - price * limit > bound:
            bound, best_price = corner.minimum.bound - price * limit, price
        line = low.cost + price * low.memory
        if corner.minimum.bound >= line - _CLOSE * abs(line):
            break
        if corner.memory > limit:
            low = corner
        else:
            high = corner
    share = (limit - high.memory) / (low.memory - high.memory) if low.memory > high.memory else 0.0
    again, usage = (share * a + (1.0 - share) * b for a, b in ((low.again, high.again), (low.usage, high.usage)))
    return _relaxed(bound, again, place, best_price), usage - limits


def _relaxed(bound_s: float, again: Floats, place: Place, price: float = 0.0) -> Relaxed:
    rows, first = [], 0
    for row in place.may():
        counts = []
        for count in row:
            counts.append(float(again[first : first + count].sum()))
            first += count
        rows.append(tuple(counts))
    return Relaxed(bound_s, tuple(rows), price)


def recomputed(settings: Settings, place: Place, target: Relaxed, kept: Found | None) -> Found:
    """The best found with about as many repeats recomputed as `target` says, or `kept`, the best without, where that was looked for."""
    most, best = place.may(), kept
    counts, none = _each(target.counts, lambda count: math.ceil(count - 1e-6)), _each(most, lambda _: 0)
    tried: set[Counts] = {none} if kept is not None else set()
    if kept is not None and not kept.fits and counts == none:
        counts = _more(counts, most)
    for _ in range(_SOLVES):
        counts = _enough(settings, place, counts, most)
        if counts in tried:
            break
        tried.add(counts)
        found = settings.solve_as_is(place.recomputing(counts))
        better = best is None or settings.rank(found) < settings.rank(best)
        best = found if better or best is None else best
        if not found.fits:
            counts = _more(counts, most)
        elif not better or found.cost_s <= (1 + _ENOUGH) * target.bound_s:
            break
        else:
            counts = _fewer(counts)
    assert best is not None
    return replace(best, bound_s=min(target.bound_s, best.cost_s))


def _enough(settings: Settings, place: Place, counts: Counts, most: Counts) -> Counts:
    """Those counts, or more where it is plain that nothing fits with so few."""
    step = 1
    while counts != most and settings.hopeless(place.recomputing(counts)):
        for _ in range(step):
            counts = _more(counts, most)
        step *= 2
    return counts


def _each(counts: Sequence[Sequence[float]], change: Callable[[float], int]) -> Counts:
    return tuple(tuple(change(count) for count in row) for row in counts)


def _more(counts: Counts, most: Counts) -> Counts:
    """One repeat more of the segment of which the smallest share is recomputed."""
    places = [(stage, at) for stage, row in enumerate(most) for at, count in enumerate(row) if counts[stage][at] < count]
    if not places:
        return counts
    return _changed(counts, min(places, key=lambda place: counts[place[0]][place[1]] / most[place[0]][place[1]]), 1)


def _fewer(counts: Counts) -> Counts:
    """One repeat less of the segment of which most are recomputed."""
    places = [(stage, at) for stage, row in enumerate(counts) for at, count in enumerate(row) if count]
    if not places:
        return counts
    return _changed(counts, max(places, key=lambda place: counts[place[0]][place[1]]), -1)


def _changed(counts: Counts, place: tuple[int, int], by: int) -> Counts:
    return tuple(tuple(count + by if (stage, at) == place else count for at, count in enumerate(row)) for stage, row in enumerate(counts))
