"""Best first over ways to plan, every mesh with every number of microbatches, until no other promises to be better than the best found.

A way has a bound: at first a cheap one, made without its problem. The way of least bound is taken up. Its bound is raised
(`Settings.promised`), no further than to that of the next way; once it is as high as it gets, and still the least, the way is solved. More
microbatches come in when memory is first seen to have a price.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from autopar.errors import InfeasibleError, PinError, PlanError
from autopar.search.recompute import Relaxed
from autopar.search.solver.minimise import Price
from autopar.search.stages.place import LEAST_LEFT_S, Found, Place, Settings

__all__ = ["Best", "More", "Way", "best_first"]

_WORTH = 0.01  # of a step: once a way is solved, others that recompute are not where they promise no more
_LITTLE = 0.002  # of a step: nor are those that do not
_SOLVED = 3
_LOOKS = 16  # ways of which the problem is made, where one of them has a plan: on many devices there are hundreds
_NEAR = 1.02  # times the least bound
_FURTHER = 1e-3  # of a bound: ways that are so close are not raised in turn, step by step


@dataclass(slots=True)
class Way:
    """One mesh and number of microbatches. `bound_s`: no plan this way takes less. `make` gives its problem, made when it is needed."""

    bound_s: float
    make: Callable[[], Place]
    place: Place | None = None
    cheap: bool = False
    """Whether raising its bound is known to take next to no time: it is looked at before others that are near, for what it says of them."""
    even: bool = True
    """Whether the batch can be divided so by the mesh without a rest. Others are left for last."""
    looked_at: bool = False
    target: Relaxed | None = None
    """What is known of the way, once its bound is as high as it gets."""


More = Callable[[float, float], list[Way]]
"""Further ways, once memory has a say: given the least bound there is, and the price of memory in seconds per byte."""


@dataclass(frozen=True, slots=True)
class Best:
    """`found`: the best, None where nothing can fit, and then `least` is the way to try for the least memory. `bound_s`: what no way takes
    less than."""

    found: Found | None
    bound_s: float
    least: Place | None


def best_first(settings: Settings, ways: list[Way], more: More | None = None) -> Best:
    """The best choice on any of `ways`, and of `more`.

    Raises `InfeasibleError` where none can run at all."""
    return _Search(settings, list(ways), more).run()


class _Search:
    def __init__(self, settings: Settings, ways: list[Way], more: More | None) -> None:
        self.settings, self.open, self.more = settings, ways, more
        self.best: Found | None = None
        self.least: Place | None = None
        self.proven_s = math.inf
        self.solved = 0
        self.looks = 0
        self.price = 0.0  # of memory: what it was on one way is a good guess for the next
        self.dearer = 1.0  # a step within the limit, in times of one with any memory, where both bounds are known

    def run(self) -> Best:
        error: PlanError | None = None
        while self.open:
            way = self._next()
            if way is None:
                break
            try:
                way.place = way.place or way.make()
                if way.target is None:
                    self._raise_bound(way, way.place)
                    if self.price:
                        self._add_more(way.bound_s)
                else:
                    self._solve(way, way.place, way.target)
            except (InfeasibleError, PinError) as raised:
                self.open.remove(way)
                error = raised
            if not self.open and self.best is None and self.least is not None:
                self._add_more(math.inf)
        if self.best is None and self.least is None and error is not None:
            raise error
        return Best(self.best, min([self.proven_s, *[way.bound_s for way in self.open]]), self.least)

    def _next(self) -> Way | None:
        """The way to take up; None where none promises to be better than what was found, or the rest is too many to look at all."""
        known, even = [one for one in self.open if one.looked_at], [one for one in self.open if one.even]
        found = self.best is not None and self.best.fits
        if self.settings.effort == "exact":
            orders = [self.open]
        elif self.looks >= _LOOKS:
            orders = [known] if found else [known, even, self.open]
        else:
            orders = [even, self.open]
        for ways in orders:
            least = min(ways, key=lambda one: one.bound_s, default=None)
            if least is not None and not self._enough(least):
                quick = [one for one in ways if one.cheap and one.target is None and one.bound_s <= _NEAR * least.bound_s]
                return min(quick, key=lambda one: one.bound_s) if quick and least.target is None else least
        return None

    def _enough(self, way: Way) -> bool:
        """Whether no way promises to be faster than the best found, when the first promises `way.bound_s`; or whether time is up."""
        if self.best is None:
            return False
        left_s = self.settings.seconds_left()
        if left_s is not None and left_s <= LEAST_LEFT_S:
            return True
        if not self.best.fits:
            return False
        return self.solved >= _SOLVED or way.bound_s * self._hope(way) >= self.best.cost_s

    def _hope(self, way: Way) -> float:
        """What the bound of a way is taken for, in times of it, when there is a plan already."""
        if self.settings.effort == "exact":
            return 1.0
        if way.target is not None and way.target.guessed:
            return self.dearer
        return 1 + (_WORTH if way.target is not None and any(map(any, way.target.counts)) else _LITTLE)

    def _raise_bound(self, way: Way, place: Place) -> None:
        """As far as that of the next way, or as it goes."""
        enough_s = self.best.cost_s if self.best is not None and self.best.fits else math.inf
        self.settings.look(place, self.price)
        if self.settings.effort == "fast" and not place.cheap:  # bounds of cheap ones say what memory is worth
            others_s = min([other.bound_s for other in self.open if other is not way], default=math.inf)
            # Higher than the bound is, or ways as good as each other would be looked at for ever.
            further_s = max(others_s * (1 + _FURTHER), math.nextafter(way.bound_s, math.inf))
            enough_s = min(enough_s, further_s if way.looked_at else others_s)
        self.looks += not way.looked_at
        way.looked_at = True
        target = self.settings.promised(place, self.price, enough_s)
        way.bound_s = max(way.bound_s, target.bound_s)
        self.price = target.price_s_per_byte or self.price
        if target.price_s_per_byte and not target.guessed and self.dearer == 1.0:
            self.dearer = max(1.0, target.bound_s / place.ready.minimiser.minimise(Price(0.0)).bound)
        if target.bound_s < enough_s or math.isinf(target.bound_s):
            way.target, self.least = target, self.least or place
        if math.isinf(way.bound_s):
            self.open.remove(way)

    def _solve(self, way: Way, place: Place, target: Relaxed) -> None:
        self.open.remove(way)
        found = self.settings.within(place, target)
        self.solved += 1
        self.proven_s = min(self.proven_s, found.bound_s)
        if self.best is None or self.settings.rank(found) < self.settings.rank(self.best):
            self.best = found
        if not found.fits or found.cost_s > (1 + _LITTLE) * way.bound_s:
            self._add_more(way.bound_s)

    def _add_more(self, bound_s: float) -> None:
        more, self.more = self.more, None
        if more is not None:
            self.open += more(bound_s, self.price)
