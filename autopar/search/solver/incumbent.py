"""The best choice found so far, the best bound proven so far, and who is told about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from autopar.search.solver.minimise import Minimiser

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a search is: what it does, the best cost so far, what no plan can beat, their gap, and seconds since the start."""

    phase: str
    best_cost_s: float
    lower_bound_s: float
    gap: float
    seconds: float


class Incumbent:
    """Holds the cheapest choice within `limits`, `(steps,)`: what the limit leaves beside what is held whatever is chosen. `price` is the
    price of memory at which the best bound was found, and `weights` those of the steps; `minimiser` says how steps are weighted now."""

    def __init__(
        self, minimiser: Minimiser, limit_bytes: float, progress: Callable[[Progress], None] | None, beside_bytes: tuple[float, ...] = ()
    ) -> None:
        self.minimiser, self._progress = minimiser, progress
        self.beside: Floats = np.array(beside_bytes or (0.0,) * minimiser.steps)
        self.limits = limit_bytes - self.beside
        self.choice: Ints | None = None
        self.cost_s = np.inf
        self.memory_bytes = np.inf
        self.bound_s = -np.inf
        self.price = 0.0
        self.weights = minimiser.weights
        self._start = perf_counter()

    @property
    def limit_bytes(self) -> float:
        """Of memory by the weights of now."""
        return self.minimiser.weigh(self.limits)

    def peak(self, usage: Floats) -> float:
        """Memory at the step with most."""
        return float((usage + self.beside).max())

    @property
    def gap(self) -> float:
        """How much the best choice may cost more than the cheapest there is, as a fraction of the bound."""
        if self.cost_s <= self.bound_s:
            return 0.0
        return (self.cost_s - self.bound_s) / abs(self.bound_s) if np.isfinite(self.bound_s) and self.bound_s != 0 else np.inf

    def offer(self, choice: Ints) -> tuple[float, Floats]:
        """Take `choice` if it fits and is the cheapest so far. Returns its cost, and memory at every step, `(steps,)`."""
        cost, usage = self.minimiser.usage(choice)
        if cost < self.cost_s and (usage <= self.limits).all():
            self.choice, self.cost_s, self.memory_bytes = choice.copy(), cost, self.peak(usage)
        return cost, usage

    def raise_bound(self, bound_s: float, price: float) -> None:
        """Note a proof that nothing within the limit costs less than `bound_s`."""
        if bound_s > self.bound_s:
            self.bound_s, self.price, self.weights = bound_s, price, self.minimiser.weights

    def report(self, phase: str) -> None:
        if self._progress is not None:
            self._progress(Progress(phase, float(self.cost_s), float(self.bound_s), float(self.gap), perf_counter() - self._start))
