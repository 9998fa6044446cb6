"""Make a problem smaller without changing its optimum: merge parallel edges, drop impossible and dominated strategies.

Strategy `b` of a node is dominated by `a` when replacing `b` by `a` can never hurt, whatever the neighbours do:

    unary[a] - unary[b] + sum over edges of max over j of (T[a, j] - T[b, j])  <=  0

in cost and in memory alike, so that a reduced problem is good for every price of memory. (Goldstein's dead-end elimination, 1994.)
Nodes at one position of a segment keep the same strategies, so that what was folded stays folded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autopar.errors import InfeasibleError, PlanError
from autopar.search.solver.problem import Floats, Problem, Table
from autopar.search.solver.rows import equal_rows

Ints = NDArray[np.int64]

_ROUNDS = 3
_COLUMNS = 8  # of what neighbours may choose, looked at before all
_SOME = np.arange(_COLUMNS)
_ROUNDING = 1e-12
_HUGE = 1e300  # below every difference of costs, yet finite, so that it adds to `inf` as `inf`
_SIDE_I, _SIDE_J, _FOREIGN = 0, 1, 2


def domain_sizes(problem: Problem) -> Ints:
    """Number of strategies per node."""
    sizes = np.array([len(table.cost_s) for table in problem.tables], np.int64)
    return sizes[np.array(problem.nodes, np.int64)] if problem.nodes else np.zeros(0, np.int64)


def restrict(problem: Problem, allowed: dict[int, tuple[int, ...]]) -> Problem:
    """The problem in which each node of `allowed` may only choose the strategies listed for it.

    Strategies keep their numbers; others cost `inf`. Nodes that shared a table and are restricted alike share the new one, so that
    pinning every repeat of a layer alike leaves it folded. Raises `PlanError` for a node or strategy that does not exist.
    """
    nodes, tables = list(problem.nodes), list(problem.tables)
    known: dict[tuple[int, tuple[int, ...]], int] = {}
    for node, choices in sorted(allowed.items()):
        if not 0 <= node < len(nodes):
            raise PlanError(f"cannot restrict node {node}: the problem has {len(nodes)}")
        table = tables[nodes[node]]
        wrong = [c for c in choices if not 0 <= c < len(table.cost_s)]
        if wrong or not choices:
            raise PlanError(f"cannot restrict node {node} to strategies {choices}: it has {len(table.cost_s)}")
        key = (nodes[node], tuple(sorted(set(choices))))
        if key not in known:
            known[key] = len(tables)
            tables.append(_only(table, list(key[1])))
        nodes[node] = known[key]
    return replace(problem, nodes=tuple(nodes), tables=tuple(tables))


def _only(table: Table, strategies: list[int]) -> Table:
    """A node's table in which all other strategies are impossible."""
    cost = np.full_like(table.cost_s, np.inf)
    cost[strategies] = table.cost_s[strategies]
    return replace(table, cost_s=cost, again=None if table.again is None else _only(table.again, strategies))


def _in_floats(table: Table) -> Table:
    if table.cost_s.dtype == np.float64 == table.memory_bytes.dtype:
        return table
    return replace(table, cost_s=np.asarray(table.cost_s, np.float64), memory_bytes=np.asarray(table.memory_bytes, np.float64))


@dataclass(frozen=True, slots=True)
class Reduced:
    """A smaller problem and the way back: strategy `s` of its node `i` is `kept[i][s]` of the original."""

    problem: Problem
    kept: tuple[Ints, ...]

    def original(self, choice: Ints) -> tuple[int, ...]:
        return tuple([int(kept[s]) for kept, s in zip(self.kept, choice.tolist(), strict=True)])


def reduce(problem: Problem) -> Reduced:
    """Merge parallel edges, then drop impossible and dominated strategies until nothing changes (or three rounds passed).

    Raises `InfeasibleError` when a node is left without a strategy.
    """
    assert not problem.timed, "tables hold the memory of all time steps"
    tables = [_in_floats(table) for table in problem.tables]
    edges = _merged(np.array(problem.edges, np.int64).reshape(-1, 3), tables)
    nodes = np.array(problem.nodes, np.int64)
    work = _Reduction(nodes, edges, tables, _groups(problem), problem.regions)
    for _ in range(_ROUNDS):
        if not work.round():
            break
    return work.result(problem)


def _merged(edges: Ints, tables: list[Table]) -> Ints:
    """Edges with at most one per pair of nodes; sums of tables are appended to `tables`, equal sums once."""
    edges = edges[np.lexsort((edges[:, 2], edges[:, 1], edges[:, 0]))]
    first = np.ones(len(edges), np.bool_)
    first[1:] = (edges[1:, :2] != edges[:-1, :2]).any(1)
    if first.all():
        return edges
    starts = np.flatnonzero(first)
    sizes = np.diff([*starts, len(edges)])
    merged = edges[starts].copy()
    known: dict[tuple[int, ...], int] = {}
    for at in np.flatnonzero(sizes > 1):
        key = tuple(edges[starts[at] : starts[at] + sizes[at], 2].tolist())
        if key not in known:
            known[key] = len(tables)
            total = tables[key[0]]
            for t in key[1:]:
                total = total + tables[t]
            tables.append(total)
        merged[at, 2] = known[key]
    return merged


def _groups(problem: Problem) -> Ints:
    """A number per node; nodes with equal numbers (one position of a segment, one table) keep the same strategies."""
    place = np.arange(len(problem.nodes))
    for segment in problem.segments:
        if segment.count > 1:
            place[segment.start : segment.stop] = np.tile(np.arange(segment.start, segment.start + segment.length), segment.count)
    return equal_rows(place, np.array(problem.nodes, np.int64))[1]


Views = dict[tuple[int, int, int], tuple[tuple[Floats, ...], ...]]
"""By edge table, side and neighbour's group: cost and memory of the edge, in every mode."""


class _Reduction:
    def __init__(self, nodes: Ints, edges: Ints, tables: list[Table], group: Ints, regions: tuple[int, ...] | None) -> None:
        self.nodes, self.edges, self.tables, self.group = nodes, edges, tables, group
        region = np.array(regions, np.int64) if regions is not None else np.zeros(len(nodes), np.int64)
        self.foreign = region[edges[:, 0]] != region[edges[:, 1]]
        count = int(group.max()) + 1 if len(group) else 0
        self.table_of = np.zeros(count, np.int64)
        self.table_of[group] = nodes
        self.kept: list[Ints] = [np.arange(len(tables[t].cost_s)) for t in self.table_of]
        self.contexts: dict[int, list[list[tuple[int, int, int, int]]]] = {}
        for number, around in self._contexts():
            self.contexts.setdefault(number, []).append(around)
        self.stale = set(self.contexts)

    def _contexts(self) -> list[tuple[int, list[tuple[int, int, int, int]]]]:
        """Per group, every distinct surrounding of its nodes: `(edge table, side, neighbour's group, how often)`; `_FOREIGN` is added to
        the side of an edge that goes to another region, which may be computed again or not as it likes."""
        if not len(self.edges):
            return [(int(group), []) for group in np.unique(self.group)]
        i, j, table = self.edges.T
        node = np.concatenate([i, j])
        side = np.concatenate([_SIDE_I + _FOREIGN * self.foreign, np.full(len(i), _SIDE_J)])
        other = self.group[np.concatenate([j, i])]
        code = np.stack([np.concatenate([table, table]), side, other], 1)
        first, number = equal_rows(*code.T)
        rows = code[first]
        # the sum of random numbers names a multiset; two surroundings collide with a chance of 2^-64
        names = np.random.default_rng(0).integers(0, 2**63, len(rows), np.uint64)
        surrounding = np.zeros(len(self.nodes), np.uint64)
        np.add.at(surrounding, node, names[number])
        representative, _ = equal_rows(self.group, surrounding)
        order = np.argsort(node, kind="stable")
        bounds = np.searchsorted(node[order], np.arange(len(self.nodes) + 1))
        result = []
        for at in representative:
            codes, often = np.unique(number[order[bounds[at] : bounds[at + 1]]], return_counts=True)
            around = [(int(rows[c, 0]), int(rows[c, 1]), int(rows[c, 2]), int(n)) for c, n in zip(codes, often, strict=True)]
            result.append((int(self.group[at]), around))
        return result

    def _view(self, table: int, side: int, own: Ints, other: Ints) -> tuple[tuple[Floats, ...], ...]:
        """Cost and memory of an edge, `(own strategies, neighbour's strategies)` each; computed once and, where there is a table, again."""
        flipped = side % _FOREIGN == _SIDE_J
        at = np.ix_(other, own) if flipped else np.ix_(own, other)
        return tuple([tuple([one[at].T if flipped else one[at] for one in mode]) for mode in _modes(self.tables[table])])

    def round(self) -> bool:
        """One round over the groups whose surroundings may have changed. Returns whether any strategy was dropped."""
        stale, self.stale = self.stale, set()
        for group in sorted(stale):
            surroundings = self.contexts[group]
            known: Views = {}
            while self._drop_impossible(group, surroundings, known):
                known.clear()
                self._changed(group)
            count = len(self.kept[group])
            a, b = np.nonzero(~np.eye(count, dtype=np.bool_))
            for around in surroundings:
                if len(a):
                    a, b = self._dominating(group, around, known, a, b)
            if len(a):
                # of strategies that dominate each other the first stays
                pairs = set(zip(a.tolist(), b.tolist(), strict=True))
                lost = {y for x, y in pairs if x < y or (y, x) not in pairs}
                self.kept[group] = self.kept[group][[s for s in range(count) if s not in lost]]
                self._changed(group)
        return bool(self.stale)

    def _changed(self, group: int) -> None:
        """Neighbours of `group` are worth another look."""
        self.stale |= {other for around in self.contexts[group] for _, _, other, _ in around}

    def _drop_impossible(self, group: int, surroundings: list[list[tuple[int, int, int, int]]], known: Views) -> bool:
        """Drop strategies that cost `inf`, alone or beside all that a neighbour may choose. Views that were made are `known`."""
        own = self.kept[group]
        possible = self.tables[self.table_of[group]].cost_s[own] < np.inf
        # a node is impossible where *its* surroundings say so; the group keeps what any of its nodes may still need
        anywhere = np.zeros_like(possible)
        for around in surroundings or [[]]:
            here = possible.copy()
            for table, side, other, _ in around:
                key = (table, side, other)
                if key not in known:
                    known[key] = self._view(table, side, own, self.kept[other])
                here &= known[key][0][0].min(1) < np.inf
            if not here.any():
                node = int(np.flatnonzero(self.group == group)[0])
                raise InfeasibleError(f"node {node} has no possible strategy left: every choice costs inf, alone or with its neighbours")
            anywhere |= here
        if anywhere.all():
            return False
        self.kept[group] = own[anywhere]
        return True

    def _dominating(
        self,
        group: int,
        around: list[tuple[int, int, int, int]],
        known: Views,
        a: Ints,
        b: Ints,
    ) -> tuple[Ints, Ints]:
        """Those of the pairs `a`, `b` of strategies where `a` is at least as good as `b` in this surrounding."""
        own = self.kept[group]
        modes = _modes(self.tables[self.table_of[group]])
        views = [(known[edge, side, other], often, side >= _FOREIGN) for edge, side, other, often in around]
        count = max([len(modes), *[len(view) for view, _, _ in views]])
        for mode in range(count):
            for which, unary in enumerate(modes[min(mode, len(modes) - 1)]):
                at_some = [(view[min(mode, len(view) - 1)][which], often) for view, often, _ in views]
                plausible = _plausible(unary[own], at_some, a, b)
                a, b = a[plausible], b[plausible]
        for mode in range(count):
            for which, unary in enumerate(modes[min(mode, len(modes) - 1)]):
                if not len(a):
                    return a, b
                more = unary[own][a] - unary[own][b]
                for view, often, foreign in views:
                    if foreign and len(view) > 1:
                        more += often * np.maximum(*[worst_difference(one[which], a, b) for one in view])
                    else:
                        more += often * worst_difference(view[min(mode, len(view) - 1)][which], a, b)
                a, b = a[more <= 0], b[more <= 0]
        return a, b

    def result(self, problem: Problem) -> Reduced:
        """The reduced problem; equal tables under equal reductions stay one table."""
        tables: list[Table] = []
        numbers: dict[tuple[int, ...], int] = {}
        kept_number: dict[tuple[int, bytes], int] = {}
        kept_of = np.array([kept_number.setdefault((len(k), k.tobytes()), len(kept_number)) for k in self.kept], np.int64)

        def number(key: tuple[int, ...], table: Table, index: Any) -> int:
            if key not in numbers:
                numbers[key] = len(tables)
                tables.append(table.at(index))
            return numbers[key]

        new_table = np.zeros(len(self.kept), np.int64)
        for group, kept in enumerate(self.kept):
            t = int(self.table_of[group])
            new_table[group] = number((t, int(kept_of[group])), self.tables[t], kept)
        i, j, table = self.edges.T
        keys = np.stack([table, kept_of[self.group[i]], kept_of[self.group[j]]], 1)
        first, inverse = equal_rows(*keys.T)
        rows = keys[first]
        new_edge = np.zeros(len(rows), np.int64)
        for row, at in enumerate(first):
            kept_both = np.ix_(self.kept[self.group[i[at]]], self.kept[self.group[j[at]]])
            new_edge[row] = number(tuple(rows[row].tolist()), self.tables[int(table[at])], kept_both)
        edges = tuple(zip(i.tolist(), j.tolist(), new_edge[inverse].tolist(), strict=True))
        nodes = tuple(new_table[self.group].tolist())
        reduced = replace(problem, nodes=nodes, edges=edges, tables=tuple(tables))
        return Reduced(reduced, tuple([self.kept[g] for g in self.group.tolist()]))


def _modes(table: Table) -> tuple[tuple[Floats, ...], ...]:
    """Cost and memory at every step; of what is computed once and, where there is a table, again."""
    once = table.cost_s, *table.step_bytes
    return (once,) if table.again is None else (once, (table.again.cost_s, *table.again.step_bytes))


def _plausible(own: Floats, views: list[tuple[Floats, int]], a: Ints, b: Ints) -> NDArray[np.bool_]:
    """Whether `a` may be at least as good as `b`, for each pair: whether it is beside some of what all neighbours may choose.

    `own`: `(n,)`; `views`: tables `(n, neighbour's strategies)`, and how often each counts."""
    total = np.repeat(own[:, None], _COLUMNS, 1)
    for view, often in views:
        some = view[:, _SOME * view.shape[1] // _COLUMNS]
        total += some if often == 1 else often * some
    return np.asarray((total[a] <= (total + _ROUNDING * np.abs(total))[b]).all(1))


def worst_difference(table: Floats, a: Ints, b: Ints) -> Floats:
    """Max over `j` of `table[a, j] - table[b, j]` for pairs `a`, `b`; where `b` is impossible nothing is asked of `a`.

    `table`: `(n, m)`, entries finite or `inf`. Returns `(pairs,)`.
    """
    if (table == table[:1]).all():
        return np.zeros(len(a))
    with np.errstate(invalid="ignore"):
        difference = table[a] - table[b]
    if not (finite := table < np.inf).all():
        difference[~finite[b]] = -np.inf
    worst: Floats = difference.max(1)
    return np.where(worst == -np.inf, -_HUGE, worst)
