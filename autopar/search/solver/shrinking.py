"""`Shrinking`: a problem in pieces that can be taken away one by one, and what brings the taken ones back.

Every change keeps the least cost within the limit, and every choice of what is left stands for one choice of the whole with the same
cost. Memory is a set of holdings per node, `(lo, hi)` to bytes by strategy, beside a `slack` per step: what the limit leaves after all
that does not depend on any choice. Strategies keep their first numbers in `names`, so that the way back needs no translation.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from autopar.errors import InfeasibleError
from autopar.search.solver.interned import Interned
from autopar.search.solver.problem import Floats, Interval, Ints, Problem, Segment, Table

__all__ = ["Shrinking"]

Hold = dict[Interval, int]


class Shrinking:
    """The nodes that are left: `cost[i]` a vector, `around[i]` neighbour to table (its rows are `i`'s), `holds[i]` interval to vector.

    `cost[i]` is -1 where node `i` is gone. `queue` holds nodes worth a look.
    """

    def __init__(self, problem: Problem) -> None:
        self.pool = Interned()
        self.cost: list[int] = []
        self.names: list[int] = []
        self.holds: list[Hold] = []
        self.around: list[dict[int, int]] = []
        self.first_nodes = len(problem.nodes)
        self.first_sizes: list[int] = []
        self.constant = 0.0
        # node, the nodes it follows (none, one or two), their names at that time, and its strategy by theirs
        self.followers: list[tuple[int, tuple[int, ...], tuple[int, ...], Ints]] = []
        self.queue: deque[int] = deque()
        self._queued: list[bool] = []
        self._places, self.slack = self._steps(problem)
        self.times = self._places[: len(self.slack)].copy()  # when each step starts
        always = (0, len(self.slack))
        intervals = problem.live or [None] * len(problem.nodes)
        for table, live in zip(problem.nodes, intervals, strict=True):
            self._add_node(self._costs(problem, table))
            self.hold(len(self.cost) - 1, self._steps_of(live, always), self._bytes(problem, table))
        for node, table, lo, hi in problem.also:
            self.hold(node, self._steps_of((lo, hi), always), self._bytes(problem, table))
        for edge, (i, j, table) in enumerate(problem.edges):
            number, memory = self._costs(problem, table), problem.tables[table].memory_bytes
            span = self._steps_of(problem.edges_live[edge] if problem.edges_live else None, always)
            if span[0] < span[1] and memory.any():
                self._edge_as_node(i, j, number, memory, span)
            else:
                self.join(i, j, number)

    # ---- building

    @staticmethod
    def _steps(problem: Problem) -> tuple[Ints, Floats]:
        """Times at which anything begins or ends, and the limit of each step between them; no step without a limit."""
        if problem.memory_limit_bytes == np.inf:
            return np.zeros(1, np.int64), np.zeros(0)
        times = [*(problem.live or ()), *(problem.edges_live or ()), *((lo, hi) for _, _, lo, hi in problem.also)]
        places = np.unique(np.array(times, np.int64)) if times else np.zeros(0, np.int64)
        if len(places) < 2:
            places = np.array([0, 1], np.int64) if not len(places) else np.array([places[0], places[0] + 1], np.int64)
        return places, np.full(len(places) - 1, problem.memory_limit_bytes)

    def _steps_of(self, live: Interval | None, always: Interval) -> Interval:
        if live is None or not len(self.slack):
            return always
        lo, hi = np.searchsorted(self._places, live).tolist()
        return lo, hi

    def _costs(self, problem: Problem, table: int) -> int:
        cost = problem.tables[table].cost_s
        return int(self.pool.once(("cost", table), lambda: self.pool.vector(cost) if cost.ndim == 1 else self.pool.table(cost)))

    def _bytes(self, problem: Problem, table: int) -> int:
        return int(self.pool.once(("bytes", table), lambda: self.pool.vector(problem.tables[table].memory_bytes)))

    def _add_node(self, cost: int) -> None:
        size = len(self.pool.vectors[cost])
        self.cost.append(cost)
        self.names.append(int(self.pool.once(("whole", size), lambda: self.pool.index(np.arange(size)))))
        self.first_sizes.append(size)
        self.holds.append({})
        self.around.append({})
        self._queued.append(False)
        self.look(len(self.cost) - 1)

    def _edge_as_node(self, i: int, j: int, table: int, memory: Floats, span: Interval) -> None:
        """An edge with memory becomes a node whose strategies are the pairs of its ends' (what depends on one end alone goes to that)."""
        rows, columns = memory.shape
        if (memory == memory[:, :1]).all():
            self.hold(i, span, self.pool.vector(memory[:, 0]))
        elif (memory == memory[:1]).all():
            self.hold(j, span, self.pool.vector(memory[0]))
        else:
            self._add_node(self.pool.vector(self.pool.tables[table].ravel()))
            node = len(self.cost) - 1
            self.hold(node, span, self.pool.vector(memory.ravel()))
            for end, size, of in ((i, rows, np.repeat(np.arange(rows), columns)), (j, columns, np.tile(np.arange(columns), rows))):
                same = np.where(of[:, None] == np.arange(size), 0.0, np.inf)
                self.join(node, end, self.pool.table(same))
            return
        self.join(i, j, table)

    def join(self, i: int, j: int, table: int) -> None:
        """Add an edge; `table` has `i`'s strategies as rows."""
        known = self.around[i].get(j)
        table = table if known is None else self.pool.sum(known, table)
        self.around[i][j], self.around[j][i] = table, table ^ 1
        self.look(i)
        self.look(j)

    def hold(self, node: int, span: Interval, vector: int) -> None:
        """Add a holding of `node`: bytes by strategy at the steps of `span`."""
        if span[0] < span[1]:
            known = self.holds[node].get(span)
            self.holds[node][span] = vector if known is None else self.pool.plus(known, vector)

    def look(self, node: int) -> None:
        """Note that `node` is worth a look."""
        if not self._queued[node]:
            self._queued[node] = True
            self.queue.append(node)

    def next(self) -> int | None:
        """A node worth a look that is still there, or None."""
        while self.queue:
            node = self.queue.popleft()
            self._queued[node] = False
            if self.cost[node] >= 0:
                return node
        return None

    # ---- reading

    def left(self) -> list[int]:
        return [node for node, cost in enumerate(self.cost) if cost >= 0]

    def size(self, node: int) -> int:
        return len(self.pool.vectors[self.cost[node]])

    # ---- changes

    def keep(self, node: int, stays: Ints) -> None:
        """Leave `node` only the strategies with the (present) numbers `stays`.

        Raises `InfeasibleError` when that is none.
        """
        if not len(stays):
            name = f"node {node}" if node < self.first_nodes else "an edge"
            raise InfeasibleError(
                f"{name} has no possible strategy left: each costs inf or is over the limit, alone or with its neighbours"
            )
        pool, index = self.pool, self.pool.index(stays)
        self.cost[node] = pool.taken(self.cost[node], index)
        self.names[node] = pool.composed(self.names[node], index)
        self.holds[node] = {span: pool.taken(vector, index) for span, vector in self.holds[node].items()}
        for other, table in self.around[node].items():
            self.around[node][other] = rows = pool.rows(table, index)
            self.around[other][node] = rows ^ 1
            self.look(other)
        self.look(node)

    def follow(self, node: int, leader: int, choice: int) -> None:
        """Take `node` away: it chooses `choice[s]` (an index vector) when `leader` chooses `s`. All its edges pass to `leader`."""
        pool = self.pool
        table = self.around[node].pop(leader) ^ 1
        del self.around[leader][node]
        self.cost[leader] = pool.plus(self.cost[leader], pool.plus(pool.taken(self.cost[node], choice), pool.picked(table, choice)))
        for span, vector in self.holds[node].items():
            self.hold(leader, span, pool.taken(vector, choice))
        for other, between in self.around[node].items():
            del self.around[other][node]
            self.join(leader, other, pool.rows(between, choice))
        self.look(leader)

        names = pool.indices[pool.composed(self.names[node], choice)]
        self.followers.append((node, (leader,), (self.names[leader],), names))
        self._remove(node)

    def cut(self, node: int, other: int, costs: tuple[int, int]) -> None:
        """Take the edge between two nodes away and give each the costs (vectors) that are its part."""
        del self.around[node][other], self.around[other][node]
        for end, vector in zip((node, other), costs, strict=True):
            self.cost[end] = self.pool.plus(self.cost[end], vector)
            self.look(end)

    def bridge(self, node: int, table: int, choice: Ints) -> None:
        """Take `node` away, which has two neighbours and no memory: `table` joins them, at `choice[s, t]` of `node`, lower node first."""
        first, second = sorted(self.around[node])
        for other in (first, second):
            del self.around[other][node]
        self.join(first, second, table)
        names = self.pool.indices[self.names[node]]
        self.followers.append((node, (first, second), (self.names[first], self.names[second]), names[choice]))
        self._remove(node)

    def fix(self, node: int, strategy: int = 0) -> None:
        """Take `node` away: it chooses `strategy` (its present number). What it costs its neighbours is theirs, its memory is taken."""
        pool = self.pool
        self.constant += float(pool.vectors[self.cost[node]][strategy])
        for (lo, hi), vector in self.holds[node].items():
            self.slack[lo:hi] -= pool.vectors[vector][strategy]
        for other, table in self.around[node].items():
            del self.around[other][node]
            self.cost[other] = pool.plus(self.cost[other], pool.row(table, strategy))
            self.look(other)
        self.followers.append((node, (), (), pool.indices[self.names[node]][strategy]))
        self._remove(node)

    def _remove(self, node: int) -> None:
        self.cost[node] = -1
        self.around[node], self.holds[node] = {}, {}

    # ---- the way back

    def original(self, choice: Ints, left: Ints) -> tuple[int, ...]:
        """One strategy per node of the first problem, from one (in present numbers) for each node of `left`."""
        whole = [-1] * len(self.cost)
        for node, strategy in zip(left.tolist(), choice.tolist(), strict=True):
            whole[node] = int(self.pool.indices[self.names[node]][strategy])
        for node, leaders, names, by in reversed(self.followers):
            at = [int(np.searchsorted(self.pool.indices[n], whole[leader])) for leader, n in zip(leaders, names, strict=True)]
            whole[node] = int(by[tuple(at)])
        return tuple(whole[: self.first_nodes])

    def problem(self, limit_bytes: float) -> tuple[Problem, Ints]:
        """What is left as a problem, and its nodes' numbers here. Its last node is one more, with one strategy: all that is fixed."""
        left = self.left()
        position = {node: at for at, node in enumerate(left)}
        tables: list[Table] = []
        numbers: dict[tuple[int, ...], int] = {}

        def number(key: tuple[int, ...], cost: Floats, memory: Floats) -> int:
            if key not in numbers:
                numbers[key] = len(tables)
                tables.append(Table(cost, memory))
            return numbers[key]

        nodes, live, edges = [], [], []
        also: list[tuple[int, int, int, int]] = []
        vectors = self.pool.vectors
        for at, node in enumerate(left):
            cost = vectors[self.cost[node]]
            rows = sorted(self.holds[node].items())
            (lo, hi), memory = rows[0] if rows else ((0, 0), -1)
            nodes.append(number((self.cost[node], memory), cost, vectors[memory] if rows else np.zeros(len(cost))))
            live.append((lo, hi))
            also += [(at, number((-1, v), np.zeros(len(cost)), vectors[v]), lo, hi) for (lo, hi), v in rows[1:]]
            for other, table in sorted(self.around[node].items()):
                if node < other:
                    values = self.pool.tables[table]
                    edges.append((at, position[other], number((-2, table), values, np.broadcast_to(0.0, values.shape))))
        taken = limit_bytes - self.slack if len(self.slack) else np.zeros(0)
        starts = np.flatnonzero(np.diff(taken, prepend=np.nan) != 0)
        for lo, hi in zip(starts.tolist(), [*starts[1:].tolist(), len(taken)], strict=False):
            one = np.array([taken[lo]])
            also.append((len(left), number((-3, self.pool.vector(one)), np.zeros(1), one), lo, hi))
        nodes.append(number((-4,), np.array([self.constant]), np.zeros(1)))
        live.append((0, 0))
        segments = (Segment(0, len(nodes), 1),)
        shrunk = Problem(tuple(nodes), tuple(edges), tuple(tables), segments, limit_bytes, tuple(live), None, tuple(also))
        return shrunk, np.array(left, np.int64)
