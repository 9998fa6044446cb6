"""Reduced costs: how far above the bound every choice with a certain strategy lies, after a sweep of messages against the order."""

from __future__ import annotations

import numpy as np

from autopar.search.solver.arrays import Arrays
from autopar.search.solver.compiled import compiled, fill, least_of
from autopar.search.solver.messages import Core
from autopar.search.solver.problem import Floats
from autopar.search.solver.trees import Trees

__all__ = ["reduced_costs"]


def reduced_costs(arrays: Arrays, trees: Trees, core: Core, reach: Floats) -> Floats:
    """`(S,)`: no choice with a strategy has a priced cost below the last sweep's bound plus its reduced cost, which is at least zero.

    `reach (S,)`: priced costs with trees included, as the last sweep (against the order) had them. What the bound leaves over at nodes
    and at edges adds up, because no cost is counted at two places.
    """
    left, found = np.zeros(len(arrays.cost)), np.zeros(len(arrays.cost))
    widest = int(arrays.sizes.max(initial=1))
    _of_core(arrays, core, reach, left, found, np.zeros(widest), np.zeros(widest))
    _of_trees(arrays, trees, reach, found, np.zeros(widest))
    return found


@compiled
def _of_core(arrays: Arrays, core: Core, reach: Floats, left: Floats, found: Floats, by_row: Floats, by_column: Floats) -> None:
    """`left (S,)` becomes what is left at nodes; a part of it is found there at once, the rest with the edges that have a share in it."""
    messages = core.messages
    for p in range(len(core.nodes)):
        v = core.nodes[p]
        at, size = arrays.first[v], arrays.sizes[v]
        for s in range(size):
            left[at + s] = reach[at + s]
            for a in range(core.start[p], core.start[p + 1]):
                left[at + s] += messages[core.inward[a] + s]
        least = least_of(left, at, at + size)
        own = max(0.0, 1.0 - core.share[p] * (core.middle[p] - core.start[p]))
        for s in range(size):
            left[at + s] -= least
            found[at + s] = own * left[at + s]
    for p in range(len(core.nodes)):
        v = core.nodes[p]
        at, size = arrays.first[v], arrays.sizes[v]
        for a in range(core.start[p], core.middle[p]):
            u = core.other[a]
            to, width = arrays.first[u], arrays.sizes[u]
            fill(by_row, size, np.inf)
            fill(by_column, width, np.inf)
            for s in range(size):
                here = core.share[p] * left[at + s] - messages[core.inward[a] + s]
                for r in range(width):
                    rest = here + arrays.table[core.rows[a] + s * width + r] - messages[core.outward[a] + r]
                    by_row[s] = min(by_row[s], rest)
                    by_column[r] = min(by_column[r], rest)
            least = least_of(by_row, 0, size)
            for s in range(size):
                found[at + s] += by_row[s] - least
            for r in range(width):
                found[to + r] += by_column[r] - least


@compiled
def _of_trees(arrays: Arrays, trees: Trees, reach: Floats, found: Floats, message: Floats) -> None:
    """From the roots down: a strategy's reduced cost is that of its best partner, and what the edge adds."""
    for place in range(len(trees.nodes) - 1, -1, -1):
        v = trees.nodes[place]
        at, size, a = arrays.first[v], arrays.sizes[v], trees.toward[place]
        if a < 0:
            least = least_of(reach, at, at + size)
            for s in range(size):
                found[at + s] = reach[at + s] - least
            continue
        u, rows = arrays.other[a], arrays.rows[a]
        to, width = arrays.first[u], arrays.sizes[u]
        for r in range(width):
            message[r] = np.inf
            for s in range(size):
                message[r] = min(message[r], reach[at + s] + arrays.table[rows + s * width + r])
        for s in range(size):
            found[at + s] = np.inf
            for r in range(width):
                if found[to + r] < np.inf and message[r] < np.inf:
                    rest = reach[at + s] + arrays.table[rows + s * width + r] - message[r] + found[to + r]
                    found[at + s] = min(found[at + s], rest)
