"""Cheap changes to a known choice: splice two choices, or change one node at a time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autopar.search.solver.minimise import Minimiser
from autopar.search.solver.problem import Floats

Ints = NDArray[np.int64]

_SWEEPS = 40


class Local:
    """Neighbourhoods of choices of a problem. All costs are exact differences, never estimates."""

    def __init__(self, minimiser: Minimiser) -> None:
        self.minimiser = minimiser
        problem, nodes, edges = minimiser.problem, minimiser.nodes, minimiser.edges
        self.edges = edges
        self.offset = np.concatenate([[0], np.cumsum(minimiser.sizes)])
        self.node_of = np.repeat(np.arange(len(nodes)), minimiser.sizes)
        self.node_cost = _joined([problem.tables[t].cost_s for t in nodes.tolist()])
        self.tables = [[table.step_bytes[step] for table in problem.tables] for step in range(minimiser.steps)]
        self.node_memory = [_joined([tables[t] for t in nodes.tolist()]) for tables in self.tables]
        self._by_table = [(int(t), np.flatnonzero(edges[:, 2] == t)) for t in np.unique(edges[:, 2])]
        ends = np.concatenate([edges[:, :2], edges[:, 1::-1]])
        ends = ends[np.argsort(ends[:, 0], kind="stable")]
        self._neighbours, self._first = ends[:, 1], np.searchsorted(ends[:, 0], np.arange(len(nodes) + 1))

    def splices(self, first: Ints, second: Ints) -> tuple[Floats, Floats]:
        """Cost and memory of all choices that follow `first` below a node and `second` from it on; by that node, `(nodes + 1,)` and
        `(steps, nodes + 1)`.

        Both choices must be possible (of finite cost).
        """
        cost = self._spliced(self.node_cost, [table.cost_s for table in self.minimiser.problem.tables], first, second)
        steps = [self._spliced(nodes, tables, first, second) for nodes, tables in zip(self.node_memory, self.tables, strict=True)]
        return cost, np.array(steps)

    def _spliced(self, node_values: Floats, tables: list[Floats], first: Ints, second: Ints) -> Floats:
        i, j = self.edges[:, 0], self.edges[:, 1]
        a, b = node_values[self.offset[:-1] + first], node_values[self.offset[:-1] + second]
        total: Floats = np.concatenate([[0.0], np.cumsum(a)]) + (b.sum() - np.concatenate([[0.0], np.cumsum(b)]))
        # an edge is of `first` once both ends are below the place, of `second` while both are not, between them mixed
        pure_first, pure_second, mixed = (self._edge_values(tables, x, y) for x, y in ((first, first), (second, second), (first, second)))
        impossible = mixed == np.inf
        steps, breaks = np.zeros(len(total)), np.zeros(len(total))
        np.add.at(breaks, i[impossible] + 1, 1.0)
        np.add.at(breaks, j[impossible] + 1, -1.0)
        mixed[impossible] = 0.0
        steps[0] = pure_second.sum()
        np.add.at(steps, i + 1, mixed - pure_second)
        np.add.at(steps, j + 1, pure_first - mixed)
        total += np.cumsum(steps)
        total[np.cumsum(breaks) > 0.5] = np.inf
        return total

    def _edge_values(self, tables: list[Floats], left: Ints, right: Ints) -> Floats:
        """The entry of each edge when its lower node chooses as in `left`, its higher as in `right`."""
        result = np.empty(len(self.edges))
        for t, rows in self._by_table:
            result[rows] = tables[t][left[self.edges[rows, 0]], right[self.edges[rows, 1]]]
        return result

    def alternatives(self, choice: Ints) -> tuple[Floats, Floats]:
        """Cost and memory that depend on each node, for each of its strategies, the others as in `choice`. Flat, see `offset`; memory with
        a row for every step."""
        at: list[Ints] = []
        cost: list[Floats] = [self.node_cost]
        memory: list[list[Floats]] = [[row] for row in self.node_memory]
        at.append(np.arange(len(self.node_cost)))
        for t, rows in self._by_table:
            table = self.minimiser.problem.tables[t]
            i, j = self.edges[rows, 0], self.edges[rows, 1]
            at.append((self.offset[i][:, None] + np.arange(table.cost_s.shape[0])).ravel())
            cost.append(table.cost_s[:, choice[j]].T.ravel())
            for row, held in zip(memory, table.step_bytes, strict=True):
                row += [held[:, choice[j]].T.ravel(), held[choice[i]].ravel()]
            at.append((self.offset[j][:, None] + np.arange(table.cost_s.shape[1])).ravel())
            cost.append(table.cost_s[choice[i]].ravel())
        where = np.concatenate(at)
        size = len(self.node_cost)
        costs: Floats = np.bincount(where, np.concatenate(cost), size).astype(np.float64)
        return costs, np.array([np.bincount(where, np.concatenate(row), size) for row in memory], np.float64)

    def improve(self, choice: Ints, limits: Floats) -> Ints:
        """Change single nodes while that makes the choice cheaper within the limits, `(steps,)`, or smaller while it is over one."""
        choice = choice.copy()
        for _ in range(_SWEEPS):
            if not self._sweep(choice, limits):
                break
        return choice

    def _sweep(self, choice: Ints, limits: Floats) -> bool:
        """One pass of changes, none beside another. Returns whether anything changed."""
        slack = limits - self.minimiser.usage(choice)[1]
        cost, memory = self.alternatives(choice)
        now = self.offset[:-1] + choice
        with np.errstate(invalid="ignore"):
            more_cost = cost - cost[now][self.node_of]
            more_memory = memory - memory[:, now][:, self.node_of]
        tolerance = 1e-12 * float(np.abs(cost[now]).sum())
        fits = bool((slack >= 0).all())
        tightest = int(slack.argmin())
        more = more_memory[tightest]
        if fits:
            useful = (more_cost < -tolerance) & (more_memory <= slack[:, None]).all(0)
            # savings per byte; those that need no memory first, the largest first among them
            with np.errstate(over="ignore"):
                rank = np.where(more <= 0, -np.inf, more_cost / np.maximum(more, 1e-300))
        else:
            useful = (more < 0) & (more_cost < np.inf)
            with np.errstate(over="ignore"):
                rank = more_cost / np.maximum(-more, 1e-300)
        moves = np.flatnonzero(useful)
        if not len(moves):
            return False
        moves = moves[np.lexsort((moves, more_cost[moves], rank[moves]))]
        touched = np.zeros(len(choice), np.bool_)
        changed = False
        for move in moves.tolist():
            node = int(self.node_of[move])
            if touched[node] or (fits and (more_memory[:, move] > slack).any()):
                continue
            choice[node] = move - self.offset[node]
            slack = slack - more_memory[:, move]
            touched[node] = True
            touched[self._neighbours[self._first[node] : self._first[node + 1]]] = True
            changed = True
            if not fits and slack[tightest] >= 0:
                break  # it fits now; the next sweep looks for cheaper
        return changed


def _joined(arrays: list[Floats]) -> Floats:
    return np.concatenate(arrays) if arrays else np.zeros(0)
