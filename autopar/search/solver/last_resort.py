"""What is answered when time ends before anything that fits was found: the choice of least memory, made ready before the search begins.

After the reductions the room of a time step is what is left beside the least that nodes can hold: each at its least fits together, unless
that is impossible for some pair, or a node's least at one step is not its least at another. None of this needs compiled code.
"""

from __future__ import annotations

import numpy as np

from autopar.search.solver.arrays import Arrays
from autopar.search.solver.problem import Floats, Ints

__all__ = ["least_cost", "least_memory", "priced_by_room"]


def least_memory(arrays: Arrays) -> Ints:
    """`(n,)`: of each node the strategy that holds least, as a part of the room of its steps; of equals the cheapest."""
    owner = np.repeat(np.arange(len(arrays.sizes)), arrays.sizes)
    order = np.lexsort((arrays.cost, priced_by_room(arrays), np.isinf(arrays.cost), owner))
    return np.asarray(order[arrays.first[:-1]] - arrays.first[:-1])


def least_cost(arrays: Arrays) -> float:
    """A bound in a moment: the least entries of all nodes and edges."""
    begins, table = np.unique(arrays.rows, return_inverse=True)
    edges = np.minimum.reduceat(arrays.table, begins)[table].sum() / 2 if len(begins) else 0.0  # both ways round
    return float(np.minimum.reduceat(arrays.cost, arrays.first[:-1]).sum() + edges)


def priced_by_room(arrays: Arrays) -> Floats:
    """`(S,)`: what strategies hold, each step at the price of one over its room."""
    known = np.isfinite(arrays.room)
    prices = np.where(known, 1.0 / np.maximum(np.where(known, arrays.room, 1.0), 1e-3 * arrays.unit), 0.0)
    below = np.concatenate([np.zeros(1), np.cumsum(prices)])
    node = np.repeat(np.arange(len(arrays.sizes)), np.diff(arrays.hold_start))
    many = arrays.sizes[node]
    within = np.arange(many.sum()) - np.repeat(np.cumsum(many) - many, many)
    amounts = arrays.held[np.repeat(arrays.hold_first, many) + within] * np.repeat(below[arrays.hold_hi] - below[arrays.hold_lo], many)
    return np.bincount(np.repeat(arrays.first[node], many) + within, amounts, len(arrays.cost)).astype(np.float64)
