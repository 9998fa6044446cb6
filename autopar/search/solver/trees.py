"""Trees that hang off the graph: solved exactly for any prices, from the leaves up and back down.

Nodes with one neighbour are taken off until none is left, as in variable elimination (Bertelè and Brioschi 1972). What stays is the
core, where messages are needed.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from autopar.search.solver.arrays import Arrays
from autopar.search.solver.compiled import compiled, fill, least_of
from autopar.search.solver.problem import Floats, Ints

__all__ = ["Trees", "choose_down", "find_trees", "pass_up"]


class Trees(NamedTuple):
    """`nodes (m,)`: leaves first; `toward (m,)`: the half edge by which each hangs on what stays, -1 at a root. `core`: what is left."""

    nodes: Ints
    toward: Ints
    core: Ints


def find_trees(arrays: Arrays) -> Trees:
    """Take off nodes with at most one neighbour left, again and again."""
    degree = np.diff(arrays.start)
    nodes, toward = np.zeros(len(degree), np.int64), np.zeros(len(degree), np.int64)
    count = _take_off(arrays, degree, nodes, toward)
    return Trees(nodes[:count], toward[:count], np.setdiff1d(np.arange(len(degree)), nodes[:count]))


@compiled
def _take_off(arrays: Arrays, degree: Ints, nodes: Ints, toward: Ints) -> int:
    """`degree` counts the neighbours that are not off yet; -1 once a node is off itself."""
    count = 0
    for v in range(len(degree)):
        if degree[v] <= 1:
            nodes[count] = v
            count += 1
    done = 0
    while done < count:
        v = nodes[done]
        toward[done] = -1
        for a in range(arrays.start[v], arrays.start[v + 1]):
            u = arrays.other[a]
            if degree[u] >= 0:
                toward[done] = a
                degree[u] -= 1
                if degree[u] == 1:
                    nodes[count] = u
                    count += 1
        degree[v] = -1
        done += 1
    return count


@compiled
def pass_up(arrays: Arrays, trees: Trees, reach: Floats, message: Floats) -> float:
    """Add to the priced costs `reach (S,)` of every node what the trees that hang on it cost at least. Returns the sum over roots."""
    table = arrays.table
    constant = 0.0
    for place in range(len(trees.nodes)):
        v = trees.nodes[place]
        at, size, a = arrays.first[v], arrays.sizes[v], trees.toward[place]
        if a < 0:
            constant += least_of(reach, at, at + size)
            continue
        u = arrays.other[a]
        to, width = arrays.first[u], arrays.sizes[u]
        fill(message, width, np.inf)
        for s in range(size):
            begin, here = arrays.rows[a] + s * width, reach[at + s]
            for r in range(width):
                cost = here + table[begin + r]
                message[r] = cost if cost < message[r] else message[r]
        for r in range(width):
            reach[to + r] += message[r]
    return constant


@compiled
def choose_down(arrays: Arrays, trees: Trees, reach: Floats, choice: Ints) -> None:
    """The best strategies of the trees' nodes for the core's in `choice`, which is filled in."""
    for place in range(len(trees.nodes) - 1, -1, -1):
        v = trees.nodes[place]
        at, a = arrays.first[v], trees.toward[place]
        least = np.inf
        for s in range(arrays.sizes[v]):
            cost = reach[at + s]
            if a >= 0:
                u = arrays.other[a]
                cost += arrays.table[arrays.rows[a] + s * arrays.sizes[u] + choice[u]]
            if cost < least:
                least, choice[v] = cost, s
