"""The best choice found so far, the best bound proven so far, and who is told about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from autopar.search.minimise import Minimiser

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a search is: what it does, the best cost so far, what no plan can beat, their gap, and seconds since the start."""

    phase: str
    best_cost_s: float
    lower_bound_s: float
    gap: float
    seconds: float


class Incumbent:
    """Holds the cheapest choice within `limit_bytes`; `price` is the price of memory at which the best bound was found."""

    def __init__(self, minimiser: Minimiser, limit_bytes: float, progress: Callable[[Progress], None] | None) -> None:
        self.minimiser, self.limit_bytes, self._progress = minimiser, limit_bytes, progress
        self.choice: Ints | None = None
        self.cost_s = np.inf
        self.memory_bytes = np.inf
        self.bound_s = -np.inf
        self.price = 0.0
        self._start = perf_counter()

    @property
    def gap(self) -> float:
        """How much the best choice may cost more than the cheapest there is, as a fraction of the bound."""
        if self.cost_s <= self.bound_s:
            return 0.0
        return (self.cost_s - self.bound_s) / abs(self.bound_s) if np.isfinite(self.bound_s) and self.bound_s != 0 else np.inf

    def offer(self, choice: Ints) -> tuple[float, float]:
        """Take `choice` if it fits and is the cheapest so far. Returns its cost and memory."""
        cost, memory = self.minimiser.evaluate(choice)
        if memory <= self.limit_bytes and cost < self.cost_s:
            self.choice, self.cost_s, self.memory_bytes = choice.copy(), cost, memory
        return cost, memory

    def raise_bound(self, bound_s: float, price: float) -> None:
        """Note a proof that nothing within the limit costs less than `bound_s`."""
        if bound_s > self.bound_s:
            self.bound_s, self.price = bound_s, price

    def report(self, phase: str) -> None:
        if self._progress is not None:
            self._progress(Progress(phase, float(self.cost_s), float(self.bound_s), float(self.gap), perf_counter() - self._start))
