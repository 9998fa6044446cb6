"""Connected parts without memory that matters: each is eliminated exactly, apart from all others, where its tables fit.

Parts that hold memory at some deciding step stay together, whether an edge joins them or not: what one of them holds, another cannot.
"""

from __future__ import annotations

import numpy as np

from autopar.search.solver.eliminate import hopeless
from autopar.search.solver.minimise import Minimiser, Price
from autopar.search.solver.problem import Ints, Problem, Segment, Table
from autopar.search.solver.shrinking import Shrinking

__all__ = ["settle_parts"]


def settle_parts(state: Shrinking, patient: bool) -> bool:
    """Fix the nodes of each part without memory at a cheapest choice. Returns whether any was.

    Once begun, an elimination goes on to its end: dear ones are for the `patient`.
    """
    changed = False
    for nodes in _parts(state):
        if not any(state.holds[node] for node in nodes):
            choice = _cheapest(state, nodes, patient)
            if choice is not None:
                for node, strategy in zip(nodes, choice.tolist(), strict=True):
                    state.fix(node, strategy)
                changed = True
    return changed


def _parts(state: Shrinking) -> list[list[int]]:
    """The nodes that are left, by connected part."""
    parts = []
    seen: set[int] = set()
    for start in state.left():
        if start in seen:
            continue
        seen.add(start)
        part = [start]
        for node in part:  # grows on the way
            fresh = [other for other in state.around[node] if other not in seen]
            seen.update(fresh)
            part += fresh
        parts.append(sorted(part))
    return parts


def _cheapest(state: Shrinking, nodes: list[int], patient: bool) -> Ints | None:
    """`(nodes,)`: a choice of least cost; None where elimination would take too much of memory or time, or nothing is possible."""
    place = {node: at for at, node in enumerate(nodes)}
    pairs = [(node, other) for node in nodes for other in sorted(state.around[node]) if node < other]
    if hopeless({place[node]: state.size(node) for node in nodes}, [(place[i], place[j]) for i, j in pairs]):
        return None
    tables: list[Table] = []
    numbers: dict[tuple[str, int], int] = {}

    def table(kind: str, number: int) -> int:
        if (kind, number) not in numbers:
            numbers[kind, number] = len(tables)
            cost = state.pool.vectors[number] if kind == "node" else state.pool.tables[number]
            tables.append(Table(cost, np.broadcast_to(0.0, cost.shape)))
        return numbers[kind, number]

    own = tuple([table("node", state.cost[node]) for node in nodes])
    edges = tuple([(place[i], place[j], table("edge", state.around[i][j])) for i, j in pairs])
    minimiser = Minimiser(Problem(own, edges, tuple(tables), (Segment(0, len(nodes), 1),)))
    minimiser.searches = False  # a search is what this one is part of
    if not minimiser.fits or (minimiser.dear and not patient):
        return None
    minimum = minimiser.minimise(Price(0.0))
    return minimum.choice if minimum.exact and minimum.bound < np.inf else None
