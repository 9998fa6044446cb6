"""Sequential tree-reweighted message passing (TRW-S: Kolmogorov 2006) over the core of a graph.

Every edge of the core carries two vectors, one to each end, that move cost from edges and other nodes onto a node without changing the
cost of any choice. After a sweep the minima of all nodes and edges, taken one by one, add up to a lower bound of the least cost.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from autopar.search.solver.arrays import Arrays
from autopar.search.solver.compiled import compiled, fill, least_of
from autopar.search.solver.problem import Floats, Ints
from autopar.search.solver.trees import Trees

__all__ = ["Core", "find_core", "magnitude", "rounding", "sweep"]


class Core(NamedTuple):
    """Half edges within the core, node by node in the order of sweeps.

    `nodes (c,)`; `rank (n,)` their places, -1 elsewhere; half edges of `nodes[p]` are `start[p]` to `start[p + 1]`, those to nodes
    before it first, up to `middle[p]`. `other`: the neighbour; `rows`: where the table begins, rows are the node's own strategies;
    `inward`, `outward`: where in `messages` what comes along the edge begins, and what goes. `share (c,)`: the part of a node's cost
    that each of its edges on one side may take.
    """

    nodes: Ints
    rank: Ints
    start: Ints
    middle: Ints
    other: Ints
    rows: Ints
    inward: Ints
    outward: Ints
    share: Floats
    messages: Floats


def find_core(arrays: Arrays, trees: Trees) -> Core:
    """The core in the order of node numbers (which is the order of the graph that a problem comes from), all messages zero."""
    count = len(arrays.sizes)
    rank = np.full(count, -1, np.int64)
    rank[trees.core] = np.arange(len(trees.core))
    source = np.repeat(np.arange(count), np.diff(arrays.start))
    edges = np.flatnonzero((rank[source] >= 0) & (rank[arrays.other] >= 0))
    source, other = source[edges], arrays.other[edges]
    outward = np.zeros(len(edges), np.int64)
    if len(edges):
        outward[1:] = np.cumsum(arrays.sizes[other])[:-1]
    position = np.zeros(len(arrays.other), np.int64)
    position[edges] = np.arange(len(edges))
    inward = outward[position[arrays.back[edges]]]
    start = np.searchsorted(source, np.append(trees.core, count)).astype(np.int64)
    before = np.bincount(rank[source[other < source]], minlength=len(trees.core)).astype(np.int64)
    behind = np.diff(start) - before
    share = 1.0 / np.maximum(1, np.maximum(before, behind))
    messages = np.zeros(int(arrays.sizes[other].sum()))
    return Core(trees.core, rank, start, start[:-1] + before, other, arrays.rows[edges], inward, outward, share, messages)


@compiled
def sweep(arrays: Arrays, core: Core, cost: Floats, forward: bool, sums: Floats, message: Floats) -> float:
    """Send messages along the order of nodes or against it. Returns the lower bound of the core's cost that is proven by it.

    `cost (S,)`: priced costs of the core's nodes, trees included; `sums`, `message`: room for the largest number of strategies.

    Why it is a bound: when a node is left, its minimum is taken out and each of its edges onward has got its share of the rest; such
    an edge with its share is nowhere below what is taken out of it, and the shares add up to at most the whole.
    """
    table, messages = arrays.table, core.messages
    bound = 0.0
    count = len(core.nodes)
    for place in range(count):
        p = place if forward else count - 1 - place
        v = core.nodes[p]
        at, size = arrays.first[v], arrays.sizes[v]
        for s in range(size):
            sums[s] = cost[at + s]
        for a in range(core.start[p], core.start[p + 1]):
            begin = core.inward[a]
            for s in range(size):
                sums[s] += messages[begin + s]
        least = least_of(sums, 0, size)
        bound += least
        share = core.share[p]
        low, high = (core.middle[p], core.start[p + 1]) if forward else (core.start[p], core.middle[p])
        for a in range(low, high):
            width, inward, outward, rows = arrays.sizes[core.other[a]], core.inward[a], core.outward[a], core.rows[a]
            fill(message, width, np.inf)
            for s in range(size):
                here, begin = share * (sums[s] - least) - messages[inward + s], rows + s * width
                for r in range(width):
                    there = here + table[begin + r]
                    message[r] = there if there < message[r] else message[r]
            edge = least_of(message, 0, width)
            bound += edge
            for r in range(width):
                messages[outward + r] = message[r] - edge
    return bound


@compiled
def rounding(arrays: Arrays, core: Core, cost: Floats, choice: Ints, sums: Floats) -> None:
    """Fill in `choice` for the core's nodes one by one: what is chosen before counts as it is, what comes behind by its messages."""
    for p in range(len(core.nodes)):
        v = core.nodes[p]
        at, size = arrays.first[v], arrays.sizes[v]
        for s in range(size):
            sums[s] = cost[at + s]
        for a in range(core.start[p], core.middle[p]):
            u = core.other[a]
            begin, width = core.rows[a] + choice[u], arrays.sizes[u]
            for s in range(size):
                sums[s] += arrays.table[begin + s * width]
        for a in range(core.middle[p], core.start[p + 1]):
            begin = core.inward[a]
            for s in range(size):
                sums[s] += core.messages[begin + s]
        choice[v] = 0
        for s in range(1, size):
            if sums[s] < sums[choice[v]]:
                choice[v] = s


@compiled
def magnitude(arrays: Arrays, core: Core, cost: Floats) -> float:
    """What bounds the rounding error of a sweep in units of the last place: how many numbers are added up times the largest of them,
    over all nodes and edges.
    """
    total = 0.0
    for v in range(len(arrays.sizes)):
        largest = _largest(cost, arrays.first[v], arrays.first[v + 1])
        for a in range(arrays.start[v], arrays.start[v + 1]):
            begin = arrays.rows[a]
            largest += _largest(arrays.table, begin, begin + arrays.sizes[v] * arrays.sizes[arrays.other[a]])
        p = core.rank[v]
        if p >= 0:
            for a in range(core.start[p], core.start[p + 1]):
                largest += _largest(core.messages, core.inward[a], core.inward[a] + arrays.sizes[v])
        total += largest * (4 + arrays.start[v + 1] - arrays.start[v] + arrays.hold_start[v + 1] - arrays.hold_start[v])
    return total


@compiled
def _largest(numbers: Floats, begin: int, end: int) -> float:
    largest = 0.0
    for k in range(begin, end):
        size = abs(numbers[k])
        if largest < size < np.inf:
            largest = size
    return largest
