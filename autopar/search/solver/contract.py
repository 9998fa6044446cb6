"""Nodes whose choice follows from a neighbour's: drop what is impossible, fix what has one strategy, contract functional edges.

An edge is functional when each strategy of `i` leaves `j` exactly one possible strategy, `f(s_i)`; values that must be laid out as
their producer chooses make most edges so. Then `j` can go: its costs, its memory and its other edges become `i`'s by `f`. A strategy
without a possible partner at some neighbour goes first (arc consistency: Mackworth 1977). An edge whose table is a sum of one part by
`i` and one by `j` is no edge.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autopar.search.solver.shrinking import Shrinking

__all__ = ["settle"]


def settle(state: Shrinking) -> None:
    """Look at nodes until none is worth a look any more.

    Raises `InfeasibleError` when a node is left without a possible strategy.
    """
    while (node := state.next()) is not None:
        possible = _possible(state, node)
        if possible is not None:
            state.keep(node, np.flatnonzero(possible))
        if state.size(node) == 1:
            state.fix(node)
            continue
        for other in list(state.around[node]):
            if other in state.around[node]:
                _contract(state, node, other)
                if state.cost[node] < 0:
                    break


def _possible(state: Shrinking, node: int) -> NDArray[np.bool_] | None:
    """`(n,)`: the strategies that cost less than `inf` alone and beside each neighbour; None for all."""
    found = state.pool.possible(state.cost[node])
    for table in state.around[node].values():
        rows = state.pool.possible_rows(table)
        if rows is not None:
            found = rows if found is None else found & rows
    return found


def _contract(state: Shrinking, node: int, other: int) -> None:
    """Let one of two ends follow the other where that is possible and does not make tables larger; cut an edge that is a sum."""
    table = state.around[node][other]
    ways = [(node, other, table), (other, node, table ^ 1)]
    if _burden(state, other) > _burden(state, node):
        ways.reverse()  # where both could follow, the one with less to hand over
    for leader, follower, between in ways:
        choice = state.pool.function(between)
        if choice is not None and _growth(state, leader, follower) <= 0:
            state.follow(follower, leader, choice)
            return
    parts = state.pool.separable(table)
    if parts is not None:
        state.cut(node, other, parts)


def _burden(state: Shrinking, node: int) -> int:
    return len(state.around[node]) + len(state.holds[node])


def _growth(state: Shrinking, leader: int, follower: int) -> int:
    """By how many entries the tables grow when `follower` passes its edges to `leader`."""
    many, few = state.size(leader), state.size(follower)
    growth = -many * few
    for other in state.around[follower]:
        if other != leader:
            known = other in state.around[leader]
            growth += state.size(other) * ((0 if known else many) - few)
    return growth
