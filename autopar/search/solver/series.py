"""Nodes with two neighbours and no memory that matters: a table between the neighbours takes their place.

    T[s, t]  =  min over r of (A[r, s] + cost[r] + B[r, t])

This is one step of variable elimination (Bertele and Brioschi 1972), taken where it does not make tables larger.
"""

from __future__ import annotations

import numpy as np

from autopar.search.solver.interned import Interned
from autopar.search.solver.problem import Floats, Ints
from autopar.search.solver.shrinking import Shrinking

__all__ = ["bridge_series"]

_GROWTH = 1.0  # the new table may have this many times the entries of the two that go
_MOST_TERMS = 50_000_000


def bridge_series(state: Shrinking) -> bool:
    """Take away nodes with two neighbours and no memory. Returns whether any was."""
    changed = False
    waiting = state.left()[::-1]
    while waiting:
        node = waiting.pop()
        if state.cost[node] < 0 or len(state.around[node]) != 2 or state.holds[node]:
            continue
        first, second = sorted(state.around[node])
        here, left, right = state.size(node), state.size(first), state.size(second)
        grown = 0 if second in state.around[first] else left * right
        if grown > _GROWTH * here * (left + right) or here * left * right > _MOST_TERMS:
            continue
        table, choice = _through(state.pool, state.around[node][first], state.cost[node], state.around[node][second])
        state.bridge(node, table, choice)
        changed = True
        waiting += [first, second]
    return changed


def _through(pool: Interned, first: int, cost: int, second: int) -> tuple[int, Ints]:
    """The table between the two neighbours, and the strategy that reaches each entry (the lowest of equal ones)."""

    def make() -> tuple[int, Ints]:
        to_first, to_second = pool.tables[first] + pool.vectors[cost][:, None], pool.tables[second]
        best: Floats = np.full((to_first.shape[1], to_second.shape[1]), np.inf)
        choice = np.zeros(best.shape, np.int16 if len(to_first) < 2**15 else np.int64)
        for strategy in range(len(to_first)):
            reached = to_first[strategy][:, None] + to_second[strategy]
            better = reached < best
            best[better] = reached[better]
            choice[better] = strategy
        return pool.table(best), choice

    found: tuple[int, Ints] = pool.once(("through", first, cost, second), make)
    return found
