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

from autopar.search.solver.incumbent import Incumbent
from autopar.search.solver.local import Local
from autopar.search.solver.minimise import Minimiser, Minimum, Price
from autopar.search.solver.problem import Floats
from autopar.search.solver.reduce import restrict

Ints = NDArray[np.int64]

GOOD_GAP = 1e-4  # below this nothing more is tried
_HULL_SOLVES = 24
_HULL_TOLERANCE = 1e-9
_WIDE_GAP = 2e-3
_SPREADS = (1.03, 1.3)
_SPLICES_IMPROVED = 4
_SHIFTS = 6  # of weight between time steps


class _Corner:
    """A priced minimum: its choice, cost, memory (by weights, and at every step), and the price it was found at."""

    def __init__(self, minimiser: Minimiser, incumbent: Incumbent, choice: Ints, price: float) -> None:
        self.choice, self.price = choice, price
        self.cost, self.usage = incumbent.offer(choice)
        self.memory = minimiser.weigh(self.usage)


def constrained(minimiser: Minimiser, incumbent: Incumbent) -> Minimum | None:
    """Fill `incumbent` with a cheap choice within its limit and a good bound.

    Returns None, or when nothing was found that fits the choice of least memory: a proof that nothing does where it is `exact`.
    """
    free = minimiser.minimise(Price(0.0))
    incumbent.offer(free.choice)
    incumbent.raise_bound(free.bound, 0.0)
    incumbent.report("without a memory limit")
    if incumbent.choice is not None and free.exact:
        return None
    local = Local(minimiser)
    least, corners = _walked(minimiser, incumbent, local, free)
    if least is None and minimiser.steps > 1 and incumbent.gap > GOOD_GAP:
        least = _balance(minimiser, incumbent, local, free, corners)
    if incumbent.choice is not None:
        return None
    return least or Minimum(minimiser.minimise(Price(np.inf)).choice, incumbent.bound_s, False)


def _walked(minimiser: Minimiser, incumbent: Incumbent, local: Local, free: Minimum) -> tuple[Minimum | None, list[_Corner]]:
    """Walk the hull for the weights of `minimiser`, and mix. Returns what has least memory if that is too much, and the corners."""
    incumbent.minimiser = minimiser
    limit = incumbent.limit_bytes
    low = _Corner(minimiser, incumbent, free.choice, 0.0)
    least = minimiser.minimise(Price(np.inf))
    high = _Corner(minimiser, incumbent, least.choice, np.inf)
    incumbent.report("least memory")
    if high.memory > limit:
        if not least.exact:
            incumbent.offer(local.improve(least.choice, incumbent.limits))
        if least.exact or incumbent.choice is None:
            return least, [low, high]
    corners = [low, high]
    if low.memory > limit:
        corners = _hull(minimiser, incumbent, corners)
    _mix(minimiser, incumbent, local, corners)
    return None, corners


def _balance(minimiser: Minimiser, incumbent: Incumbent, local: Local, free: Minimum, corners: list[_Corner]) -> Minimum | None:
    """Shift weight between the steps to where the bound is highest. Returns a proof that nothing fits, where one was met."""
    first = int(_over(minimiser, corners, incumbent.limits).argmax())
    low, high, share = 0.0, 1.0, 1.0
    for _ in range(_SHIFTS):
        weights = np.array(minimiser.weights) * (1.0 - share)
        weights[first] += share
        weighted = minimiser.weighted(tuple(weights.tolist()))
        least, corners = _walked(weighted, incumbent, local, free)
        if least is not None and least.exact:
            return least
        over = _over(weighted, corners, incumbent.limits)
        if incumbent.gap <= GOOD_GAP or (over <= 0).all() or weighted is minimiser:
            break
        if over[first] > over.max() - _HULL_TOLERANCE * float(np.abs(incumbent.limits).max()):
            low = share
        else:
            high = share
        share = (low + high) / 2
    return None


def _over(minimiser: Minimiser, corners: list[_Corner], limits: Floats) -> Floats:
    """By step, what the mixture of the two corners about the limit has beyond it, `(steps,)`."""
    limit = minimiser.weigh(limits)
    above = min([corner for corner in corners if corner.memory > limit], key=lambda corner: corner.memory, default=None)
    below = max([corner for corner in corners if corner.memory <= limit], key=lambda corner: corner.memory, default=None)
    if above is None or below is None:
        only = above or below
        assert only is not None
        return only.usage - limits
    share = (limit - below.memory) / (above.memory - below.memory)
    return share * above.usage + (1.0 - share) * below.usage - limits


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
        corner = _Corner(minimiser, incumbent, minimum.choice, price)
        if proves:
            incumbent.raise_bound(minimum.bound - price * limit, price)
            incumbent.report("pricing memory")
        corners.append(corner)
        line = low.cost + price * low.memory
        if corner.cost + price * corner.memory >= line - _HULL_TOLERANCE * abs(line):
            break
        if corner.memory > limit:
            low = corner
        else:
            high = corner
    return sorted(corners, key=lambda corner: (corner.price, -corner.memory))


def _mix(minimiser: Minimiser, incumbent: Incumbent, local: Local, corners: list[_Corner]) -> None:
    """Look between the corners for what fits and costs less."""
    _splice(incumbent, local, [corner.choice for corner in corners])
    incumbent.report("mixing")
    for spread in _SPREADS:
        if incumbent.gap <= GOOD_GAP or incumbent.price <= 0 or not minimiser.chains:
            return
        mixed = _split(minimiser, incumbent, incumbent.price / spread, incumbent.price * spread)
        for choice in mixed:
            incumbent.offer(local.improve(choice, incumbent.limits))
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
        inside = inside.weighted(minimiser.weights)
        ends = []
        for price in (0.0, np.inf):
            ends.append(_Corner(inside, incumbent, inside.minimise(Price(price)).choice, price))
        if ends[1].memory <= incumbent.limit_bytes < ends[0].memory:
            _splice(incumbent, local, [corner.choice for corner in _hull(inside, incumbent, ends, proves=False)])


def _splice(incumbent: Incumbent, local: Local, choices: list[Ints]) -> None:
    """Offer the best splices of every two of `choices`, and what single changes make of them."""
    found: list[tuple[float, int, int, int]] = []
    for a, first in enumerate(choices):
        for b, second in enumerate(choices):
            if a != b:
                cost, usage = local.splices(first, second)
                cost = np.where((usage <= incumbent.limits[:, None]).all(0), cost, np.inf)
                place = int(cost.argmin())
                if cost[place] < np.inf:
                    found.append((float(cost[place]), a, b, place))
    for _, a, b, place in sorted(found)[:_SPLICES_IMPROVED]:
        choice = np.concatenate([choices[a][:place], choices[b][place:]])
        incumbent.offer(choice)
        incumbent.offer(local.improve(choice, incumbent.limits))
    if incumbent.choice is not None:
        incumbent.offer(local.improve(incumbent.choice, incumbent.limits))


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
            _, usage = incumbent.offer(minimum.choice)
            if minimiser.weigh(usage) <= incumbent.limit_bytes:
                low = middle
            else:
                high = middle
    return found[-3:]
