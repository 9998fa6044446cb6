"""Forests inside the graph: grown at random, and re-solved exactly while all other nodes keep their strategies.

A set of nodes whose induced graph has no cycle is solved by dynamic programming in one pass up and one down. Since most nodes have few
neighbours, one forest can hold most of a graph; small ones are trees around a place.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autopar.search.solver.arrays import Arrays
from autopar.search.solver.compiled import State, compiled, uniform, whole
from autopar.search.solver.problem import Floats, Ints

__all__ = ["Forest", "clear", "grow", "new_forest", "solve"]


class Forest(NamedTuple):
    """Room for a forest and for solving it: `nodes` parents first; `parent (n,)`: the half edge to the parent, -1 at a root.

    `inside (n,)`: whether a node is part of it; `near (n,)`: how many neighbours are; `touched`: nodes whose entries must be cleared;
    `open`: nodes that may join; `reach (S,)`, `message`: costs on the way up.
    """

    nodes: Ints
    parent: Ints
    inside: NDArray[np.bool_]
    near: Ints
    touched: Ints
    open: Ints
    reach: Floats
    message: Floats


def new_forest(arrays: Arrays) -> Forest:
    count, widest = len(arrays.sizes), int(arrays.sizes.max(initial=1))
    ints = [np.zeros(size, np.int64) for size in (count, count, count, count, len(arrays.other) + 1)]
    nodes, parent, near, touched, waiting = ints
    return Forest(nodes, parent, np.zeros(count, np.bool_), near, touched, waiting, np.zeros(len(arrays.cost)), np.zeros(widest))


@compiled
def grow(arrays: Arrays, forest: Forest, seeds: int, work: int, state: State) -> tuple[int, int]:
    """Grow trees from up to `seeds` random nodes until they have about `work` half edges. Returns the numbers of nodes and touched.

    A node joins while exactly one of its neighbours is inside; its neighbours without others join with it.
    """
    count = touched = done = 0
    inside, near, waiting = forest.inside, forest.near, forest.open
    for _ in range(seeds):
        if done >= work:
            break
        v = whole(state, len(arrays.sizes))
        if inside[v] or near[v] > 0:
            continue
        forest.parent[v] = -1
        forest.touched[touched] = v
        touched += 1
        waiting[0] = v
        many = 1
        while many > 0 and done < work:
            pick = whole(state, many)
            v = waiting[pick]
            many -= 1
            waiting[pick] = waiting[many]
            if inside[v] or near[v] > 1:
                continue
            inside[v] = True
            forest.nodes[count] = v
            count += 1
            done += arrays.start[v + 1] - arrays.start[v]
            for a in range(arrays.start[v], arrays.start[v + 1]):
                u = arrays.other[a]
                if near[u] == 0 and not inside[u]:
                    forest.touched[touched] = u
                    touched += 1
                near[u] += 1
                if near[u] == 1 and not inside[u]:
                    forest.parent[u] = arrays.back[a]
                    if arrays.start[u + 1] - arrays.start[u] == 1:
                        inside[u] = True
                        forest.nodes[count] = u
                        count += 1
                    else:
                        waiting[many] = u
                        many += 1
    return count, touched


@compiled
def clear(forest: Forest, touched: int) -> None:
    for place in range(touched):
        v = forest.touched[place]
        forest.inside[v] = False
        forest.near[v] = 0


@compiled
def solve(arrays: Arrays, forest: Forest, count: int, priced: Floats, noise: float, old: Ints, new: Ints, state: State) -> float:
    """The forest's cheapest strategies into `new` for the priced costs `(S,)` when all others keep `old`'s; ties stay as they are.

    `noise` adds up to so much to every strategy, at random: among nearly equal choices each then has its chance. Returns the priced
    cost of the forest and its edges.
    """
    total = 0.0
    table, reach, message, inside = arrays.table, forest.reach, forest.message, forest.inside
    for place in range(count - 1, -1, -1):
        v = forest.nodes[place]
        at, size, up = arrays.first[v], arrays.sizes[v], forest.parent[v]
        for s in range(at, at + size):
            reach[s] = priced[s]
        if noise > 0:
            for s in range(at, at + size):
                reach[s] += noise * uniform(state)
        for a in range(arrays.start[v], arrays.start[v + 1]):
            if a == up:
                continue
            u, begin = arrays.other[a], arrays.columns[a]
            if not inside[u]:
                begin += old[u] * size
                for s in range(size):
                    reach[at + s] += table[begin + s]
                continue
            below = arrays.first[u]
            for s in range(size):
                message[s] = np.inf
            for r in range(arrays.sizes[u]):
                here, row = reach[below + r], begin + r * size
                for s in range(size):
                    cost = here + table[row + s]
                    message[s] = cost if cost < message[s] else message[s]
            for s in range(size):
                reach[at + s] += message[s]
    for place in range(count):
        v = forest.nodes[place]
        at, size, up = arrays.first[v], arrays.sizes[v], forest.parent[v]
        best = old[v]
        if up < 0:
            least = reach[at + best]
            for s in range(size):
                if reach[at + s] < least:
                    least, best = reach[at + s], s
            total += least
        else:
            row = arrays.columns[up] + new[arrays.other[up]] * size
            least = reach[at + best] + table[row + best]
            for s in range(size):
                cost = reach[at + s] + table[row + s]
                if cost < least:
                    least, best = cost, s
        new[v] = best
    return total
