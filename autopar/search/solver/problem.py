"""`Problem`: choose one strategy per node, pay node and edge costs, keep the memory under a limit at every time step.

This is the one form in which planning hands its question to the solver, and in which problems read from files arrive. Nodes are
operations and parameters, edges are values that may need resharding. Equal layers share tables: a node or edge names its table by
index, so a problem of 128 layers stores the tables of one, and `segments` say which runs of nodes repeat.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autopar.ir.fold import Segment

__all__ = ["Floats", "Interval", "Ints", "Problem", "Segment", "Solution", "Table"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Interval = tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Cost and memory by strategy: shape `(n_i,)` for a node, `(n_i, n_j)` for an edge.

    `cost_s` may be `inf` where a choice is impossible; `memory_bytes` is finite and not negative.

    Of a problem that holds the memory of few time steps in its tables (`autopar.search.solver.steps`): `later_bytes`, memory at the steps
    after
    the first. Of one whose regions may be computed again (`Problem.regions`): `again`, the table if they are, equal in shape and in what
    is impossible.
    """

    cost_s: Floats
    memory_bytes: Floats
    later_bytes: tuple[Floats, ...] = ()
    again: Table | None = None

    @property
    def step_bytes(self) -> tuple[Floats, ...]:
        """Memory at every step."""
        return self.memory_bytes, *self.later_bytes

    def at(self, index: Any) -> Table:
        """The table of some strategies: every array at `index`."""
        later = tuple([np.ascontiguousarray(array[index]) for array in self.later_bytes])
        again = None if self.again is None else self.again.at(index)
        return Table(np.ascontiguousarray(self.cost_s[index]), np.ascontiguousarray(self.memory_bytes[index]), later, again)

    def __add__(self, other: Table) -> Table:
        """Of parallel edges."""
        again = None
        if self.again is not None or other.again is not None:
            again = (self.again or self) + (other.again or other)
        later = tuple([a + b for a, b in zip(self.later_bytes, other.later_bytes, strict=True)])
        return Table(self.cost_s + other.cost_s, self.memory_bytes + other.memory_bytes, later, again)


@dataclass(frozen=True, slots=True)
class Problem:
    """Minimise the summed cost subject to summed memory at most `memory_limit_bytes` at every time step (`inf`: no limit).

    `nodes[i]` is the index of node `i`'s table in `tables`; `edges` are `(i, j, table index)` with `i < j` and the table shaped
    `(n_i, n_j)`; several edges may join the same pair. `segments` tile `range(len(nodes))`: repeats of one segment have equal node
    tables position by position, equal inner edges, equal edges to the next repeat, and equal edges to nodes outside the segment
    (but for edges that only the first repeat has to nodes before it and only the last to nodes behind). The solver checks this and
    treats a segment that breaks it as unfolded.

    Time is whole numbers. `live[i] = (lo, hi)` says that node `i` holds its memory at the steps `lo <= t < hi` (none where
    `lo == hi`), `edges_live[e]` the same of edge `e`; None stands for always, for all of them. `also` are further holdings of nodes:
    `(i, table, lo, hi)` adds `tables[table].memory_bytes` by the strategy of node `i` at `lo <= t < hi`, and no cost; this is what
    is left of a node whose choice follows another's.

    `regions[i]` is the region of node `i`, -1 for none. Beside the strategies every region is computed once or again; if again, its nodes
    and the edges into them have their tables' `again`. None: nothing is computed again.
    """

    nodes: tuple[int, ...]
    edges: tuple[tuple[int, int, int], ...]
    tables: tuple[Table, ...]
    segments: tuple[Segment, ...]
    memory_limit_bytes: float = float("inf")
    live: tuple[Interval, ...] | None = None
    edges_live: tuple[Interval, ...] | None = None
    also: tuple[tuple[int, int, int, int], ...] = ()
    regions: tuple[int, ...] | None = None

    @property
    def timed(self) -> bool:
        """Whether memory differs between time steps."""
        return self.live is not None or self.edges_live is not None or bool(self.also)

    def evaluate(self, choice: tuple[int, ...]) -> tuple[float, float]:
        """Cost in seconds and memory in bytes, at the time step with most, of a choice of one strategy per node, term by term."""
        cost = memory = 0.0
        for i, table in enumerate(self.nodes):
            cost += float(self.tables[table].cost_s[choice[i]])
            memory += float(self.tables[table].memory_bytes[choice[i]])
        for i, j, table in self.edges:
            cost += float(self.tables[table].cost_s[choice[i], choice[j]])
            memory += float(self.tables[table].memory_bytes[choice[i], choice[j]])
        return cost, float(self.usage(choice)[1].max()) if self.timed else memory

    def usage(self, choice: tuple[int, ...]) -> tuple[Ints, Floats]:
        """Memory over time: `(starts, memory_bytes)`, both `(pieces,)`; a piece lasts until the next one starts, the last for ever.

        The first piece starts at the earliest time that any interval names (0 where none does).
        """
        memory = [self.tables[t].memory_bytes for t in self.nodes]
        held = [float(table[s]) for table, s in zip(memory, choice, strict=True)]
        over = [float(self.tables[t].memory_bytes[choice[i], choice[j]]) for i, j, t in self.edges]
        further = [float(self.tables[t].memory_bytes[choice[i]]) for i, t, _, _ in self.also]
        return usage_over_time([(held, self.live), (over, self.edges_live), (further, [(lo, hi) for _, _, lo, hi in self.also])])


def usage_over_time(held: list[tuple[list[float], tuple[Interval, ...] | list[Interval] | None]]) -> tuple[Ints, Floats]:
    """Summed memory over time of several lists of bytes, each with one interval per entry, or None for always. See `Problem.usage`.

    Exact where all sums are whole numbers below 2^53.
    """
    base = sum(sum(amounts) for amounts, live in held if live is None)
    timed = [(amounts, live) for amounts, live in held if live is not None and len(live)]
    if not timed:
        return np.zeros(1, np.int64), np.array([base])
    lo, hi = np.concatenate([np.array(live, np.int64).reshape(-1, 2) for _, live in timed]).T
    amount = np.concatenate([np.array(amounts, np.float64) for amounts, _ in timed])
    starts, place = np.unique(np.concatenate([lo, hi]), return_inverse=True)
    change: Floats = np.bincount(place, np.concatenate([amount, -amount]), len(starts)).astype(np.float64)
    return starts, base + np.cumsum(change)


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
