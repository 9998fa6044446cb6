"""`Problem`: choose one strategy per node, pay node and edge costs, keep the memory under a limit.

This is the one form in which planning hands its question to the solver. Nodes are operations and parameters, edges are values that
may need resharding. Equal layers share tables: a node or edge names its table by index, so a problem of 128 layers stores the
tables of one, and `segments` say which runs of nodes repeat.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.ir.fold import Segment

__all__ = ["Floats", "Problem", "Segment", "Solution", "Table"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Cost and memory by strategy: shape `(n_i,)` for a node, `(n_i, n_j)` for an edge.

    `cost_s` may be `inf` where a choice is impossible; `memory_bytes` is finite and not negative.
    """

    cost_s: Floats
    memory_bytes: Floats


@dataclass(frozen=True, slots=True)
class Problem:
    """Minimise the summed cost subject to summed memory at most `memory_limit_bytes` (`inf`: no limit).

    `nodes[i]` is the index of node `i`'s table in `tables`; `edges` are `(i, j, table index)` with `i < j` and the table shaped
    `(n_i, n_j)`; several edges may join the same pair. `segments` tile `range(len(nodes))`: repeats of one segment have equal node
    tables position by position, equal inner edges, equal edges to the next repeat, and equal edges to nodes outside the segment
    (but for edges that only the first repeat has to nodes before it and only the last to nodes behind). The solver checks this and
    treats a segment that breaks it as unfolded.
    """

    nodes: tuple[int, ...]
    edges: tuple[tuple[int, int, int], ...]
    tables: tuple[Table, ...]
    segments: tuple[Segment, ...]
    memory_limit_bytes: float = float("inf")

    def evaluate(self, choice: tuple[int, ...]) -> tuple[float, float]:
        """Cost in seconds and memory in bytes of a choice of one strategy per node, added up term by term."""
        cost = memory = 0.0
        for i, table in enumerate(self.nodes):
            cost += float(self.tables[table].cost_s[choice[i]])
            memory += float(self.tables[table].memory_bytes[choice[i]])
        for i, j, table in self.edges:
            cost += float(self.tables[table].cost_s[choice[i], choice[j]])
            memory += float(self.tables[table].memory_bytes[choice[i], choice[j]])
        return cost, memory


@dataclass(frozen=True, slots=True)
class Solution:
    """A choice and what is proven about it: no choice within the memory limit costs less than `lower_bound_s`.

    `feasible` is False when nothing is within the limit; then `choice` is a choice of least memory, so that
    `memory_bytes - memory_limit_bytes` is what is missing. `multiplier_s_per_byte` is the price of memory at which the lower bound
    was found, 0 where memory is no constraint; `solve_with` takes it to price alternatives.
    """

    choice: tuple[int, ...]
    cost_s: float
    memory_bytes: float
    lower_bound_s: float
    feasible: bool
    multiplier_s_per_byte: float = 0.0
