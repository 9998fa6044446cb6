"""`solve`: from a problem to a choice, and what is proven about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

import numpy as np

from autopar.search.minimise import Minimiser, Price
from autopar.search.problem import Problem, Solution
from autopar.search.reduce import check, reduce, restrict

__all__ = ["Progress", "restrict", "solve"]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a search is: what it does, the best cost so far, what no plan can beat, their gap, and seconds since the start."""

    phase: str
    best_cost_s: float
    lower_bound_s: float
    gap: float
    seconds: float


def solve(
    problem: Problem,
    *,
    effort: Literal["fast", "exact"] = "fast",
    time_limit_s: float | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Solution:
    check(problem)
    reduced = reduce(problem)
    minimiser = Minimiser(reduced.problem)
    minimum = minimiser.minimise(Price(0.0))
    cost, memory = minimiser.evaluate(minimum.choice)
    return Solution(reduced.original(minimum.choice), cost, memory, minimum.bound, memory <= problem.memory_limit_bytes)
