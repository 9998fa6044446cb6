"""`Walker`: walks in episodes, each from a good choice, with a tolerance that shrinks to nothing.

Threshold accepting: Dueck and Scheuer 1990.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autopar.search.solver.arrays import Arrays
from autopar.search.solver.compiled import State, uniform, whole
from autopar.search.solver.dual import Dual
from autopar.search.solver.evaluate import add_prices, cost_of, usage_of
from autopar.search.solver.moves import Walk, improve, new_walk
from autopar.search.solver.problem import Floats, Ints

__all__ = ["Best", "Walker"]

_ENTRIES = 16_000_000  # table entries that a round of moves may read, about
_MOST_MOVES = 1000
_FEWEST_MOVES, _FEW_MOVES, _MANY_ENTRIES = 5, 20, 100_000_000  # few, but for problems so large that a round would take too long
_TRIES = 8
_NOISE = 1e-3  # of the cost
_ROUNDS = 20  # of the longest episode
_FIRST_ROUNDS = 3  # of the longest while the bound still rises: new roundings are better starts then
_FROM_ROUNDING, _FIRST_FROM_ROUNDING = 0.3, 0.6  # of the episodes
_LOWEST, _HIGHEST = -3.0, 4.0  # logarithms of the price of all that is over the limit, in highest prices, when it must come down
_FALL = 7.0  # the widest tolerance is the gap, the narrowest the gap times exp(-_FALL)


@dataclass
class Best:
    """The best choice so far: within the limit and cheapest, or over it by least; with a `byte_price` the one of least
    cost with what is over the limit at that price."""

    arrays: Arrays
    byte_price: float | None = None
    choice: Ints | None = None
    cost: float = np.inf
    excess: float = np.inf

    def offer(self, choice: Ints) -> bool:
        """Take the choice if it is better, by sums made anew. Returns whether it is."""
        cost = float(cost_of(self.arrays, choice))
        if not cost < np.inf:
            return False
        excess = float(np.maximum(usage_of(self.arrays, choice) - self.arrays.room, 0.0).sum())
        if self._rank(excess, cost) < self._rank(self.excess, self.cost):
            self.choice, self.cost, self.excess = choice.copy(), cost, excess
            return True
        return False

    def _rank(self, excess: float, cost: float) -> tuple[float, float]:
        return (excess, cost) if self.byte_price is None else (cost + self.byte_price * excess, excess)


class Walker:
    """A walk with its own random numbers; `prepare` and `walk` make one round of a fixed number of moves."""

    def __init__(self, arrays: Arrays, state: State) -> None:
        self.arrays, self.state = arrays, state
        self.entries = int((arrays.sizes[arrays.other] * np.repeat(arrays.sizes, np.diff(arrays.start))).sum())
        few = max(_FEWEST_MOVES, min(_FEW_MOVES, _MANY_ENTRIES // max(self.entries, 1)))
        self.moves = max(few, min(_MOST_MOVES, _ENTRIES // max(self.entries, 1)))
        self.current: Walk | None = None
        self.left = self.rounds = 0
        self.tolerance = 0.0

    @property
    def ready(self) -> bool:
        return self.current is not None

    @property
    def found(self) -> Ints:
        """The best choice of the episode."""
        assert self.current is not None
        return self.current.best

    def prepare(self, best: Best, rounded: Best, dual: Dual, rising: bool, pressed: bool = False) -> None:
        """Begin an episode if the last one is over, and read prices, before the others go on. `rising`: the bound still does. `pressed`:
        memory that is over the limit is worth more than cost."""
        if self.left == 0 and best.choice is not None:
            self._begin(best, rounded, dual, rising)
        self.priced = dual.best_priced
        cost = abs(best.cost) if best.choice is not None else 0.0
        self.byte_price = max(float(dual.best_prices.max(initial=0.0)), 1e-6 * cost / self.arrays.unit)
        self.noise = _NOISE * cost
        if pressed and self.current is not None and self.current.score[1] > 0:
            self.priced = self._pressed(dual)

    def _pressed(self, dual: Dual) -> Floats:
        """Priced costs `(S,)` where all steps that are over the limit have a price, some random part of the highest and more."""
        assert self.current is not None
        price = self.byte_price * float(np.exp(_LOWEST + (_HIGHEST - _LOWEST) * uniform(self.state)))
        over = self.current.usage > self.arrays.room
        priced = self.arrays.cost.copy()
        add_prices(self.arrays, np.where(over, np.maximum(dual.best_prices, price), dual.best_prices), priced)
        return priced

    def _begin(self, best: Best, rounded: Best, dual: Dual, rising: bool) -> None:
        """A choice over the limit is no place to begin at while new roundings come: they are repaired at less cost."""
        assert best.choice is not None
        often = (_FIRST_FROM_ROUNDING if best.excess == 0 else 1.0) if rising else _FROM_ROUNDING
        from_rounding = rounded.choice is not None and uniform(self.state) < often
        start = rounded.choice if from_rounding and rounded.choice is not None else best.choice
        self.current = new_walk(self.arrays, start)
        self.left = self.rounds = 1 + whole(self.state, _FIRST_ROUNDS if rising else _ROUNDS)
        gap = max(best.cost - dual.bound, 0.0) if best.excess == 0 else 0.0
        self.tolerance = gap * float(np.exp(-_FALL * uniform(self.state))) if uniform(self.state) < 0.7 else 0.0

    def walk(self, repeats: float = 1.0) -> None:
        """One round, of `repeats` times the usual number of moves."""
        assert self.current is not None
        self.left -= 1
        tolerance = self.tolerance * self.left / self.rounds
        moves = max(1, int(repeats * self.moves))
        improve(self.arrays, self.current, self.priced, self.byte_price, self.noise, tolerance, moves, _TRIES, self.state)
