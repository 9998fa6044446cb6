"""Blocks with cycles: a forest and few nodes that close cycles in it, whose strategies are all tried (cutset conditioning: Pearl 1988)."""

from __future__ import annotations

import numpy as np

from autopar.search.solver.arrays import Arrays
from autopar.search.solver.compiled import State, compiled, whole
from autopar.search.solver.forest import Forest, solve
from autopar.search.solver.problem import Floats, Ints

__all__ = ["add_cuts", "solve_with_cuts"]

_MOST_TRIED = 400  # combinations of the cuts' strategies


@compiled
def add_cuts(arrays: Arrays, forest: Forest, count: int, touched: int, wanted: int, state: State) -> int:
    """Put up to `wanted` random nodes with two or more neighbours in the forest behind its `count` nodes. Returns how many."""
    found, tried = 0, 1
    for _ in range(8 * wanted):
        v = forest.touched[whole(state, touched)]
        if found == wanted or forest.inside[v] or forest.near[v] < 2 or tried * arrays.sizes[v] > _MOST_TRIED:
            continue
        known = False
        for place in range(count, count + found):
            known = known or forest.nodes[place] == v
        if not known:
            forest.nodes[count + found] = v
            tried *= arrays.sizes[v]
            found += 1
    return found


@compiled
def solve_with_cuts(
    arrays: Arrays, forest: Forest, count: int, cuts: int, priced: Floats, noise: float, old: Ints, new: Ints, state: State
) -> None:
    """The cheapest strategies of forest and cuts together into `new`; ties stay as they are. `old` is left as it was."""
    if cuts == 0:
        solve(arrays, forest, count, priced, noise, old, new, state)
        return
    nodes = forest.nodes[count : count + cuts]
    kept, best = np.empty(cuts, np.int64), np.empty(cuts, np.int64)
    for k in range(cuts):
        kept[k] = best[k] = old[nodes[k]]
    least = solve(arrays, forest, count, priced, 0.0, old, new, state) + _of_cuts(arrays, forest, nodes, priced, old)
    tried = 1
    for v in nodes:
        tried *= arrays.sizes[v]
    for number in range(tried):
        rest = number
        for v in nodes:
            old[v] = rest % arrays.sizes[v]
            rest //= arrays.sizes[v]
        alone = _of_cuts(arrays, forest, nodes, priced, old)
        if alone < np.inf:
            cost = alone + solve(arrays, forest, count, priced, 0.0, old, new, state)
            if cost < least:
                least = cost
                for k in range(cuts):
                    best[k] = old[nodes[k]]
    for k in range(cuts):
        old[nodes[k]] = new[nodes[k]] = best[k]
    solve(arrays, forest, count, priced, noise, old, new, state)
    for k in range(cuts):
        old[nodes[k]] = kept[k]


@compiled
def _of_cuts(arrays: Arrays, forest: Forest, nodes: Ints, priced: Floats, choice: Ints) -> float:
    """Priced cost of the cuts, and of their edges to nodes outside the forest."""
    total = 0.0
    for v in nodes:
        total += priced[arrays.first[v] + choice[v]]
        for a in range(arrays.start[v], arrays.start[v + 1]):
            u = arrays.other[a]
            if forest.inside[u]:
                continue
            among = False
            for w in nodes:
                among = among or w == u
            if not among or u > v:
                total += arrays.table[arrays.rows[a] + choice[v] * arrays.sizes[u] + choice[u]]
    return total
