"""Least cost within a memory limit: Lagrange multipliers for a bound, mixtures of priced minima for a choice.

For every price `p >= 0` of memory (seconds per byte)

    min over x of (cost(x) + p * memory(x))  -  p * limit     <=     min over x with memory(x) <= limit of cost(x)

so each exact priced minimum proves a lower bound; the best price is found by going along the convex hull of (memory, cost), one
hull corner a solve (Everett 1963; the secant of two corners is the price that tells whether another lies between them). At that price
one corner is too large and one fits. What lies between is made by splicing: the one up to some node, the other behind ("k of the 32
layers shard their state"), with both orders, every place, and then every single change that still fits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autopar.search.incumbent import Incumbent
from autopar.search.local import Local
from autopar.search.minimise import Minimiser, Minimum, Price
from autopar.search.reduce import restrict

Ints = NDArray[np.int64]

GOOD_GAP = 1e-4  # below this nothing more is tried
_HULL_SOLVES = 24
_HULL_TOLERANCE = 1e-9
_WIDE_GAP = 2e-3
_SPREADS = (1.03, 1.3)
_SPLICES_IMPROVED = 4


class _Corner:
    """A priced minimum: its choice, cost, memory, and the price it was found at."""

    def __init__(self, choice: Ints, cost: float, memory: float, price: float) -> None:
        self.choice, self.cost, self.memory, self.price = choice, cost, memory, price


def constrained(minimiser: Minimiser, incumbent: Incumbent) -> Minimum | None:
    """Fill `incumbent` with a cheap choice within its limit and a good bound.

    Returns None, or when nothing was found that fits the choice of least memory: a proof that nothing does where it is `exact`.
    """
    limit = incumbent.limit_bytes
    free = minimiser.minimise(Price(0.0))
    cost, memory = incumbent.offer(free.choice)
    incumbent.raise_bound(free.bound, 0.0)
    incumbent.report("without a memory limit")
    if memory <= limit and free.exact:
        return None
    low = _Corner(free.choice, cost, memory, 0.0)
    least = minimiser.minimise(Price(np.inf))
    cost, memory = incumbent.offer(least.choice)
    incumbent.report("least memory")
    local = Local(minimiser)
    if memory > limit and not least.exact:
        incumbent.offer(local.improve(least.choice, limit))
    if incumbent.choice is None:
        return least
    corners = [low, _Corner(least.choice, cost, memory, np.inf)]
    if low.memory > limit:
        corners = _hull(minimiser, incumbent, corners)
    _mix(minimiser, incumbent, local, corners)
    return None


def _hull(minimiser: Minimiser, incumbent: Incumbent, corners: list[_Corner], proves: bool = True) -> list[_Corner]:
    """Walk the hull to the two corners about the limit. Returns all corners met, by price.

    `proves=False`: `minimiser` is for a part of the choices only, and its bounds are none for all.
    """
    low, high = corners
    limit = incumbent.limit_bytes
    for _ in range(_HULL_SOLVES):
        if low.memory <= high.memory or incumbent.gap <= GOOD_GAP:
            break
        price = max(0.0, (high.cost - low.cost) / (low.memory - high.memory))
        minimum = minimiser.minimise(Price(price))
        cost, memory = incumbent.offer(minimum.choice)
        if proves:
            incumbent.raise_bound(minimum.bound - price * limit, price)
            incumbent.report("pricing memory")
        corner = _Corner(minimum.choice, cost, memory, price)
        corners.append(corner)
        line = low.cost + price * low.memory
        if cost + price * memory >= line - _HULL_TOLERANCE * abs(line):
            break
        if memory > limit:
            low = corner
        else:
            high = corner
    return sorted(corners, key=lambda corner: (corner.price, -corner.memory))


def _mix(minimiser: Minimiser, incumbent: Incumbent, local: Local, corners: list[_Corner]) -> None:
    """Look between the corners for what fits and costs less."""
    limit = incumbent.limit_bytes
    _splice(incumbent, local, [corner.choice for corner in corners])
    incumbent.report("mixing")
    for spread in _SPREADS:
        if incumbent.gap <= GOOD_GAP or incumbent.price <= 0 or not minimiser.chains:
            return
        mixed = _split(minimiser, incumbent, incumbent.price / spread, incumbent.price * spread)
        for choice in mixed:
            incumbent.offer(local.improve(choice, limit))
        incumbent.report("mixing")
    if incumbent.gap > _WIDE_GAP:
        _mix_worlds(minimiser, incumbent, local, corners)
        incumbent.report("mixing")


def _mix_worlds(minimiser: Minimiser, incumbent: Incumbent, local: Local, corners: list[_Corner]) -> None:
    """Corners that disagree on nodes that every repeat reads do not mix; so agree with one corner after the other on these first."""
    shared = sorted({node for chain, _ in minimiser.chains for node in chain.invariants})
    worlds = dict.fromkeys(tuple(int(corner.choice[node]) for node in shared) for corner in corners)
    if len(worlds) < 2:
        return
    for world in worlds:
        inside = Minimiser(restrict(minimiser.problem, {node: (s,) for node, s in zip(shared, world, strict=True)}))
        ends = []
        for price in (0.0, np.inf):
            choice = inside.minimise(Price(price)).choice
            ends.append(_Corner(choice, *incumbent.offer(choice), price))
        if ends[1].memory <= incumbent.limit_bytes < ends[0].memory:
            _splice(incumbent, local, [corner.choice for corner in _hull(inside, incumbent, ends, proves=False)])


def _splice(incumbent: Incumbent, local: Local, choices: list[Ints]) -> None:
    """Offer the best splices of every two of `choices`, and what single changes make of them."""
    limit = incumbent.limit_bytes
    found: list[tuple[float, int, int, int]] = []
    for a, first in enumerate(choices):
        for b, second in enumerate(choices):
            if a != b:
                cost, memory = local.splices(first, second)
                cost = np.where(memory <= limit, cost, np.inf)
                place = int(cost.argmin())
                if cost[place] < np.inf:
                    found.append((float(cost[place]), a, b, place))
    for _, a, b, place in sorted(found)[:_SPLICES_IMPROVED]:
        choice = np.concatenate([choices[a][:place], choices[b][place:]])
        incumbent.offer(choice)
        incumbent.offer(local.improve(choice, limit))
    if incumbent.choice is not None:
        incumbent.offer(local.improve(incumbent.choice, limit))


def _split(minimiser: Minimiser, incumbent: Incumbent, cheap: float, dear: float) -> list[Ints]:
    """Minima with memory `cheap` in the repeats before a place and `dear` behind it; the place by bisection, so that it just fits."""
    found: list[Ints] = []
    for chain, _ in minimiser.chains:
        low, high = 0, chain.count
        starts = [*chain.rows.min(1).tolist(), int(chain.rows.max()) + 1]
        while high - low > 1:
            middle = (low + high) // 2
            minimum = minimiser.minimise(Price(dear, cheap, int(starts[middle])))
            found.append(minimum.choice)
            _, memory = incumbent.offer(minimum.choice)
            if memory <= incumbent.limit_bytes:
                low = middle
            else:
                high = middle
    return found[-3:]
