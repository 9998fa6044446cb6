"""Costs and holdings of choices, compiled: of a whole choice, and of the change from one choice to another."""

from __future__ import annotations

import numpy as np

from autopar.search.solver.arrays import Arrays
from autopar.search.solver.compiled import compiled
from autopar.search.solver.problem import Floats, Ints

__all__ = ["add_prices", "cost_of", "cost_of_change", "usage_of", "usage_of_change"]


@compiled
def cost_of(arrays: Arrays, choice: Ints) -> float:
    """The cost of a choice `(n,)`; `inf` where it is impossible."""
    twice = 0.0
    alone = 0.0
    for v in range(len(choice)):
        alone += arrays.cost[arrays.first[v] + choice[v]]
        for a in range(arrays.start[v], arrays.start[v + 1]):
            u = arrays.other[a]
            if u > v:
                twice += arrays.table[arrays.rows[a] + choice[v] * arrays.sizes[u] + choice[u]]
    return alone + twice


@compiled
def usage_of(arrays: Arrays, choice: Ints) -> Floats:
    """What the choice holds at each step beyond what is held whatever is chosen, `(T,)` bytes; compare with `arrays.room`."""
    usage = np.zeros(len(arrays.room) + 1)
    for v in range(len(choice)):
        for k in range(arrays.hold_start[v], arrays.hold_start[v + 1]):
            amount = arrays.held[arrays.hold_first[k] + choice[v]]
            usage[arrays.hold_lo[k]] += amount
            usage[arrays.hold_hi[k]] -= amount
    for t in range(1, len(usage)):
        usage[t] += usage[t - 1]
    return usage[:-1]


@compiled
def add_prices(arrays: Arrays, prices: Floats, priced: Floats) -> None:
    """Add what strategies hold, at `prices (T,)` per byte and step, to `priced (S,)`."""
    below = np.zeros(len(prices) + 1)
    for t in range(len(prices)):
        below[t + 1] = below[t] + prices[t]
    for v in range(len(arrays.sizes)):
        at = arrays.first[v]
        for k in range(arrays.hold_start[v], arrays.hold_start[v + 1]):
            price = below[arrays.hold_hi[k]] - below[arrays.hold_lo[k]]
            if price > 0:
                for s in range(arrays.sizes[v]):
                    priced[at + s] += price * arrays.held[arrays.hold_first[k] + s]


@compiled
def cost_of_change(arrays: Arrays, nodes: Ints, count: int, old: Ints, new: Ints) -> float:
    """The cost of `new` less that of `old`, which differ at most at `nodes[:count]`."""
    change = 0.0
    for place in range(count):
        v = nodes[place]
        if new[v] == old[v]:
            continue
        change += arrays.cost[arrays.first[v] + new[v]] - arrays.cost[arrays.first[v] + old[v]]
        for a in range(arrays.start[v], arrays.start[v + 1]):
            u = arrays.other[a]
            if new[u] == old[u] or u > v:
                begin, width = arrays.rows[a], arrays.sizes[u]
                change += arrays.table[begin + new[v] * width + new[u]] - arrays.table[begin + old[v] * width + old[u]]
    return change


@compiled
def usage_of_change(arrays: Arrays, nodes: Ints, count: int, old: Ints, new: Ints, change: Floats) -> tuple[int, int]:
    """Add the differences of holdings at their first steps, and take them away behind their last, in `change (T + 1,)`.

    Returns the steps `lo <= t < hi` between which something changes.
    """
    lo, hi = len(change), 0
    for place in range(count):
        v = nodes[place]
        if new[v] == old[v]:
            continue
        for k in range(arrays.hold_start[v], arrays.hold_start[v + 1]):
            amount = arrays.held[arrays.hold_first[k] + new[v]] - arrays.held[arrays.hold_first[k] + old[v]]
            if amount != 0:
                begin, end = arrays.hold_lo[k], arrays.hold_hi[k]
                change[begin] += amount
                change[end] -= amount
                lo, hi = min(lo, begin), max(hi, end)
    return lo, hi
