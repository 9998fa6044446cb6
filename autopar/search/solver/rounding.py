"""What rounding can do to answers: bounds are lowered by it, and memory that floating point cannot add up exactly is counted on a grid.

Whole numbers whose sums stay below 2^53 are exact, and nothing happens to them. Others: a sum of `n` numbers in any order is wrong by at
most `n` units roundoff of what their magnitudes add up to (Higham 2002, section 4.2).
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np

from autopar.search.solver.problem import Floats, Problem, Table

__all__ = ["fits", "lowered", "on_grids"]

_UNIT_ROUNDOFF = 2.0**-53
_EXACT = 2.0**53  # whole numbers below it are floating-point numbers


def lowered(problem: Problem, bound: float, priced: float = 0.0) -> float:
    """`bound` less what rounding can have done to it.

    `priced`: a price times a limit that has been taken off, by which numbers on the way were larger (0: no price, and then sums of whole
    numbers are exact). The best choice costs no less than the bound, and nothing larger than that and the negative costs is added up.
    """
    if not np.isfinite(bound):
        return bound
    costs = [problem.tables[t].cost_s for t in problem.nodes] + [problem.tables[t].cost_s for _, _, t in problem.edges]
    least = {id(cost): _least(cost) for cost in costs}
    size = abs(bound) - 2 * sum(min(0.0, least[id(cost)]) for cost in costs)
    whole = size < _EXACT / 2 and all(_whole(cost) for cost in {id(cost): cost for cost in costs}.values())
    if whole and not priced:
        return bound
    proven = bound - _UNIT_ROUNDOFF * 4 * (len(costs) + 8) * (size + 2 * abs(priced))
    return float(np.ceil(proven)) if whole else proven


def on_grids(problem: Problem) -> tuple[Problem, Problem] | None:
    """Two problems whose memory adds up exactly: all that fits fits the first, and what fits the second fits. None: `problem` itself does.

    Bytes are whole multiples of a power of two that is small beside all of them together: rounded down in the first and up in the
    second, and the limit the other way.
    """
    limit = problem.memory_limit_bytes
    if not np.isfinite(limit):
        return None
    used = [*problem.nodes, *(t for _, _, t in problem.edges), *(t for _, t, _, _ in problem.also)]
    total = sum(float(problem.tables[t].memory_bytes.max()) for t in used)
    if max(total, limit) < _EXACT and all(_whole(problem.tables[t].memory_bytes) for t in set(used)):
        return None
    unit = 2.0 ** (np.ceil(np.log2(max(total, abs(limit), 1e-300))) - 51)

    def rounded(up: bool) -> Problem:
        tables = tuple([Table(t.cost_s, _on_grid(t.memory_bytes, unit, up)) for t in problem.tables])
        return replace(problem, tables=tables, memory_limit_bytes=float(_on_grid(np.array([limit]), unit, not up)[0]))

    return rounded(up=False), rounded(up=True)


def fits(problem: Problem, choice: tuple[int, ...]) -> bool:
    """Whether the memory of a choice is within the limit at every step, in exact arithmetic."""
    tables = problem.tables
    held = [float(tables[t].memory_bytes[choice[i]]) for i, t in enumerate(problem.nodes)]
    over = [float(tables[t].memory_bytes[choice[i], choice[j]]) for i, j, t in problem.edges]
    further = [(float(tables[t].memory_bytes[choice[i]]), (lo, hi)) for i, t, lo, hi in problem.also]
    now = Fraction(0)
    change: dict[int, Fraction] = {}
    for amounts, live in ((held, problem.live), (over, problem.edges_live)):
        if live is None:
            now += sum(map(Fraction, amounts))
        else:
            further += zip(amounts, live, strict=True)
    for amount, (lo, hi) in further:
        change[lo] = change.get(lo, Fraction(0)) + Fraction(amount)
        change[hi] = change.get(hi, Fraction(0)) - Fraction(amount)
    peak = now
    for step in sorted(change):
        now += change[step]
        peak = max(peak, now)
    return peak <= problem.memory_limit_bytes


def _on_grid(numbers: Floats, unit: float, up: bool) -> Floats:
    """Whole multiples of `unit`. Whole numbers from 2^53 may have been rounded when they were read: they go one place further."""
    further = np.nextafter(numbers, np.inf if up else -np.inf)
    numbers = np.where(np.abs(numbers) >= _EXACT, further, numbers)
    return (np.ceil(numbers / unit) if up else np.floor(numbers / unit)) * unit


def _least(cost: Floats) -> float:
    return float(cost.min(initial=np.inf, where=cost < np.inf))


def _whole(numbers: Floats) -> bool:
    finite = numbers[np.isfinite(numbers)]
    return bool((finite == np.floor(finite)).all())
