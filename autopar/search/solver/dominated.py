"""Strategies that another one beats whatever the rest chooses, and leaves whose best reply is best in memory too.

Strategy `b` of a node goes when some `a` holds no more memory at any step and

    cost[a] - cost[b] + sum over neighbours of max over their strategies s of (T[a, s] - T[b, s])  <=  0

(Goldstein's dead-end elimination, 1994; equal strategies are a case of it). A node with one neighbour follows it when for each of the
neighbour's strategies one reply is cheapest and, at every step, smallest.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autopar.search.solver.interned import Interned
from autopar.search.solver.problem import Ints
from autopar.search.solver.reduce import worst_difference
from autopar.search.solver.shrinking import Shrinking

__all__ = ["drop_dominated", "fold_leaves"]

_SAMPLES = 6


def drop_dominated(state: Shrinking) -> bool:
    """Drop dominated strategies of all nodes. Returns whether any was."""
    changed = False
    for node in state.left():
        tables = tuple(sorted(state.around[node].values()))
        vectors = tuple(sorted(set(state.holds[node].values())))
        cost = state.cost[node]
        stays = _stays(state.pool, cost, vectors, tables)
        if stays is not None:
            state.keep(node, stays)
            changed = True
    return changed


def _stays(pool: Interned, cost: int, vectors: tuple[int, ...], tables: tuple[int, ...]) -> Ints | None:
    """The strategies that no other dominates; None for all. Of those that dominate each other the first stays."""
    stays: Ints | None = pool.once(("stays", cost, vectors, tables), lambda: _undominated(pool, cost, vectors, tables))
    return stays


def _undominated(pool: Interned, cost: int, vectors: tuple[int, ...], tables: tuple[int, ...]) -> Ints | None:
    alone = pool.vectors[cost]
    count = len(alone)
    candidates = ~np.eye(count, dtype=np.bool_)
    for vector in vectors:
        memory = pool.vectors[vector]
        candidates &= memory[:, None] <= memory
        if not candidates.any():
            return None
    # `a` must be no dearer than `b` whatever the neighbours do: also beside a few of their choices, which rules most pairs out
    for sample in range(_SAMPLES):
        beside = alone + sum(pool.tables[table][:, sample * pool.tables[table].shape[1] // _SAMPLES] for table in tables)
        candidates &= beside[:, None] <= beside
    a, b = np.nonzero(candidates)
    more = alone[a] - alone[b]
    for table in tables:
        if not len(a):
            return None
        more += worst_difference(pool.tables[table], a, b)
    better = more <= 0
    if not better.any():
        return None
    wins = np.zeros((count, count), np.bool_)
    wins[a[better], b[better]] = True
    first = np.triu(np.ones((count, count), np.bool_), 1)
    lost = (wins & (first | ~wins.T)).any(0)
    return np.flatnonzero(~lost)


def fold_leaves(state: Shrinking) -> bool:
    """Let nodes with one neighbour follow it where that is exact. Returns whether any did."""
    changed = False
    waiting = [node for node in state.left() if len(state.around[node]) == 1]
    while waiting:
        node = waiting.pop()
        if state.cost[node] < 0 or len(state.around[node]) != 1:
            continue
        ((leader, table),) = state.around[node].items()
        vectors = tuple(sorted(set(state.holds[node].values())))
        cost = state.cost[node]
        reply = _reply(state.pool, cost, vectors, table)
        if reply is not None:
            state.follow(node, leader, reply)
            changed = True
            if len(state.around[leader]) == 1:
                waiting.append(leader)
    return changed


def _reply(pool: Interned, cost: int, vectors: tuple[int, ...], table: int) -> int | None:
    """By each of the neighbour's strategies (columns of `table`) a reply that is cheapest and smallest, as an index vector."""
    reply: int | None = pool.once(("reply", cost, vectors, table), lambda: _best_reply(pool, cost, vectors, table))
    return reply


def _best_reply(pool: Interned, cost: int, vectors: tuple[int, ...], table: int) -> int | None:
    total = pool.vectors[cost][:, None] + pool.tables[table]
    possible = total < np.inf
    best: NDArray[np.bool_] = possible & (total <= total.min(0))
    for vector in vectors:
        memory = np.where(possible, pool.vectors[vector][:, None], np.inf)
        best &= memory <= memory.min(0)
    return pool.index(best.argmax(0)) if best.any(0).all() else None
