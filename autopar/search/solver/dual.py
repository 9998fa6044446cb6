"""The Lagrangian dual over the memory of time steps: prices per byte and step, and a lower bound at each of them.

With prices `y >= 0` on the steps, no choice within the limit costs less than the least priced cost less what the whole room costs:
`min (cost(x) + y . usage(x)) - y . room`. The minimum is bounded by message passing, exactly on the trees. Prices go up and down in
proportion to themselves (exponentiated gradient: Kivinen and Warmuth 1997), because between steps without price and the few that
decide lie many orders of magnitude; the choices that messages round to say where memory is missing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autopar.search.solver.arrays import Arrays
from autopar.search.solver.evaluate import add_prices, cost_of, usage_of
from autopar.search.solver.messages import find_core, magnitude, rounding, sweep
from autopar.search.solver.problem import Floats
from autopar.search.solver.reduced_costs import reduced_costs
from autopar.search.solver.trees import choose_down, find_trees, pass_up

__all__ = ["Dual"]

_UNIT_ROUNDOFF = 2.0**-53
_FIRST_PRICE = 1e-4  # all prices together, as a part of the bound without prices
_LEAST_PRICE = 1e-7  # of the mean: what a price without use falls to
_HIGHEST_PRICE = 1e15  # all costs together for that part of the limit: prices of what cannot fit grow without end
_FASTER, _SLOWER = 1.05, 0.8  # the pace after a better bound and after a worse one
_LOST = 0.02  # a bound so much worse than the best sends the prices back


class Dual:
    """Prices `(T,)` in cost per byte that are improved by `step`, the best bound so far, and the last rounding.

    `bound` is proven for floating-point numbers too: what rounding can have done is taken off; where all costs are whole numbers it
    is rounded up to the next.
    """

    def __init__(self, arrays: Arrays, constant: float = 0.0, sweeps: int = 20) -> None:
        self.arrays, self.constant = arrays, constant
        self.trees = find_trees(arrays)
        self.core = find_core(arrays, self.trees)
        widest = int(arrays.sizes.max(initial=1))
        self._sums, self._message = np.zeros(widest), np.zeros(widest)
        self._whole = bool(_whole(arrays.cost) and _whole(arrays.table)) and float(constant).is_integer()
        self.choice = np.zeros(len(arrays.sizes), np.int64)
        self.cost, self.excess = np.inf, np.inf
        self.bound, self.raw, self._last = -np.inf, -np.inf, -np.inf
        self.prices = np.zeros(len(arrays.room))
        self.best_prices = self.prices
        self.priced = self.best_priced = arrays.cost
        self._pace = 0.5
        self._gradient: Floats | None = None
        self._highest = _HIGHEST_PRICE * self._spread() / arrays.unit
        self._room = np.where(np.isfinite(arrays.room), np.maximum(arrays.room, 1e-3 * arrays.unit), 1.0)
        self._set_prices(self.prices)
        for _ in range(sweeps):
            self._sweep()
        self._evaluate()
        self._note()
        if self.excess > 0 and np.isfinite(self.raw):
            first = _FIRST_PRICE * max(abs(self.raw), 1e-9 * self._spread()) / len(self.prices)
            self.prices = first / self._room

    def step(self, sweeps: int = 1) -> None:
        """One step of the prices, `sweeps` sweeps there and back, and a new rounding."""
        self._set_prices(self.prices)
        for _ in range(sweeps):
            self._sweep()
        self._evaluate()
        self._note()
        self._move()

    def worth_keeping(self, cost: float, sweeps: int = 20) -> NDArray[np.bool_]:
        """`(S,)`: strategies that a choice within the limit of at most `cost` can have, as far as the best prices tell."""
        self._set_prices(self.best_prices)
        for _ in range(sweeps):
            self._sweep()
        above = reduced_costs(self.arrays, self.trees, self.core, self._reach)
        bound = self._core_bound + self._roots + self.constant - self._paid
        return np.asarray(bound + above <= cost + 2 * _UNIT_ROUNDOFF * self._doubt(bound))

    # ---- inside

    def _set_prices(self, prices: Floats) -> None:
        self.priced = self.arrays.cost.copy()
        add_prices(self.arrays, prices, self.priced)
        self._reach = self.priced.copy()
        self._roots = pass_up(self.arrays, self.trees, self._reach, self._message)
        held = prices > 0
        self._paid = float((prices[held] * self.arrays.room[held]).sum())

    def _sweep(self) -> None:
        sweep(self.arrays, self.core, self._reach, True, self._sums, self._message)
        self._core_bound = sweep(self.arrays, self.core, self._reach, False, self._sums, self._message)

    def _evaluate(self) -> None:
        """Round the messages to a choice and see what it costs and how far it is over the room."""
        rounding(self.arrays, self.core, self._reach, self.choice, self._sums)
        choose_down(self.arrays, self.trees, self._reach, self.choice)
        self.cost = cost_of(self.arrays, self.choice) + self.constant
        self._over = usage_of(self.arrays, self.choice) - self.arrays.room
        self.excess = float(np.maximum(self._over, 0.0).sum())

    def _note(self) -> None:
        """Keep the bound of the last sweep, if it is the best."""
        self.now = self._core_bound + self._roots + self.constant - self._paid
        if not self.now > self.raw:
            return
        self.raw, self.best_prices, self.best_priced = self.now, self.prices.copy(), self.priced
        proven = self.now - _UNIT_ROUNDOFF * self._doubt(self.now)
        self.bound = max(self.bound, float(np.ceil(proven)) if self._whole else proven)

    def _doubt(self, bound: float) -> float:
        """What rounding can have done to a bound, in units of the last place."""
        doubt = 4 * magnitude(self.arrays, self.core, self._reach) + 64 * len(self.prices) * abs(self._paid)
        return doubt + (len(self.choice) + 8) * (abs(bound) + abs(self._paid) + abs(self.constant))

    def _move(self) -> None:
        """Change the prices by what is missing or left at each step, relative to its room."""
        if self.now < self.raw - _LOST * abs(self.raw):
            self.prices, self._gradient = self.best_prices.copy(), None
            self._pace *= 0.5
        else:
            self._pace = min(1.0, self._pace * _FASTER) if self.now >= self._last else self._pace * _SLOWER
        self._last = self.now
        missing = np.clip(self._over / self._room, -1.0, 1.0)
        self._gradient = missing if self._gradient is None else 0.5 * (self._gradient + missing)
        self.prices = self.prices * np.exp(self._pace * self._gradient)
        self.prices = np.clip(self.prices, _LEAST_PRICE * self.prices.mean(), self._highest)

    def _spread(self) -> float:
        finite = self.arrays.cost[np.isfinite(self.arrays.cost)]
        return float(np.abs(finite).sum()) + float(np.abs(self.arrays.table[np.isfinite(self.arrays.table)]).sum())


def _whole(numbers: Floats) -> bool:
    finite = numbers[np.isfinite(numbers)]
    return bool((finite == np.floor(finite)).all()) and float(np.abs(finite).max(initial=0.0)) < 2.0**53
