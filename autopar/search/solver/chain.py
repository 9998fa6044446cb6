"""Chains: runs of equal repeats in a problem, found by comparing nodes, edges and tables.

A segment may be cut anywhere: from one repeat's middle to the next one's is a repeat too. The cut that fewest combinations of
choices cross is taken, for that is the size of the tables in `powers`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.ir.fold import Segment

Ints = NDArray[np.int64]

NONE = -1
_MIN_REPEATS = 3


@dataclass(frozen=True)
class Chain:
    """Equal repeats. `rows[r, p]` is the node at position `p` of repeat `r`, shape `(count, length)`.

    `leaving` are the positions that the next repeat reads; `entering` the nodes, in the same order, that the first repeat reads
    (they belong to no repeat of this chain). `invariants` are nodes outside that every repeat has the same edges with.
    Edges of a repeat, as `(i, j, table)` with `i` before `j`: `inner` between positions, `carried` from a position of the repeat
    before to one of this, `before` from an invariant node to a position, `behind` from a position to an invariant node.
    `edges` are the numbers of the problem's edges that the repeats pay for, shape `(count, edges of a repeat)`.
    """

    rows: Ints
    leaving: tuple[int, ...]
    entering: tuple[int, ...]
    invariants: tuple[int, ...]
    inner: tuple[tuple[int, int, int], ...]
    carried: tuple[tuple[int, int, int], ...]
    before: tuple[tuple[int, int, int], ...]
    behind: tuple[tuple[int, int, int], ...]
    edges: Ints

    @property
    def count(self) -> int:
        return len(self.rows)

    def part(self, start: int, stop: int) -> Chain:
        """Repeats `start..stop` as a chain of their own."""
        entering = self.entering if start == 0 else tuple(self.rows[start - 1, list(self.leaving)].tolist())
        return Chain(
            self.rows[start:stop], self.leaving, entering, self.invariants,
            self.inner, self.carried, self.before, self.behind, self.edges[start:stop],
        )  # fmt: skip


def find_chains(nodes: Ints, edges: Ints, sizes: Ints, segments: tuple[Segment, ...], whole: bool = False) -> tuple[Chain, ...]:
    """The chains in the `segments` of a problem with `nodes[i]` the table of node `i`, `edges` rows `(i, j, table)`.

    `whole`: a row is a repeat as its segment has it, and begins nowhere else.
    Repeats that differ from their neighbours (the first, a pinned one) stay outside; a segment in which they all do gives no chain.
    """
    found: list[Chain] = []
    for segment in segments:
        if segment.count >= _MIN_REPEATS:
            plain = np.arange(segment.start, segment.stop).reshape(segment.count, segment.length)
            found += _Rows(nodes, edges, sizes, plain if whole else _cut(edges, sizes, segment)).chains()
    return tuple(found)


def _cut(edges: Ints, sizes: Ints, segment: Segment) -> Ints:
    """The nodes of `segment` in rows, cut where the fewest combinations of choices cross; -1 where a first or last row lacks a node.

    A node that reads nothing (a parameter) goes with the first node that reads it.
    """
    start, length, count = segment.start, segment.length, segment.count
    plain = np.arange(start, segment.stop).reshape(count, length)
    low = start + length * (count // 2)
    i, j = edges[:, 0], edges[:, 1]
    here = edges[(j >= low) & (j < low + length) & (i >= low - length)]
    source, target = here[:, 0] - low, here[:, 1] - low
    inner = source >= 0
    goes_with = np.arange(length)
    reads = np.zeros(length, np.bool_)
    reads[target] = True
    sources = inner & ~reads[np.where(inner, source, 0)]
    first_reader = np.full(length, length)
    np.minimum.at(first_reader, source[sources], target[sources])
    goes_with = np.where(first_reader < length, first_reader, goes_with)
    at_source, at_target = goes_with[source % length], goes_with[target]
    size = np.log(np.maximum(sizes[low : low + length], 1))
    best, best_size = 0, np.inf
    for cut in range(length):
        # how many rows an edge spans once the positions before the cut belong to the row before
        span = np.where(inner, 0, 1) + (at_source < cut).astype(int) - (at_target < cut).astype(int)
        if (span > 1).any() or (span < 0).any():
            continue
        crossing = size[np.unique(source[span == 1] % length)].sum()
        if crossing < best_size - 1e-9:
            best, best_size = cut, crossing
    early = goes_with < best
    if not early.any():
        return plain
    rows = np.full((count + 1, length), NONE, np.int64)
    rows[1:, ~early] = plain[:, ~early]
    rows[:-1, early] = plain[:, early]
    return rows


class _Rows:
    """Rows of nodes, and which edges each row has; looks for runs of equal rows."""

    def __init__(self, nodes: Ints, edges: Ints, sizes: Ints, rows: Ints) -> None:
        self.edges, self.sizes, self.rows = edges, sizes, rows
        count, length = rows.shape
        row_of, position_of = np.full(len(nodes), NONE), np.full(len(nodes), NONE)
        row, position = np.nonzero(rows >= 0)
        row_of[rows[row, position]], position_of[rows[row, position]] = row, position
        self.row_of = row_of
        i, j, table = edges.T
        row_i, row_j = row_of[i], row_of[j]
        within = (row_i >= 0) & (row_j >= 0)
        step = row_j - row_i
        # (owner row, kind, one end, other end, table)
        self.kind = np.select(
            [within & (step == 0), within & (step == 1), (row_i < 0) & (row_j >= 0), (row_i >= 0) & (row_j < 0), within],
            [0, 1, 2, 3, 4],
            NONE,
        )
        self.owner = np.where(self.kind == 3, row_i, row_j)
        end_i = np.where(self.kind == 2, i, position_of[i])
        end_j = np.where(self.kind == 3, j, position_of[j])
        self.code = np.stack([self.kind, end_i, end_j, table], 1)
        marks = _mix(self.code)
        self.firm, self.behind = np.zeros(count, np.uint64), np.zeros(count, np.uint64)
        for into, kinds in ((self.firm, (0, 1, 2)), (self.behind, (3,))):
            chosen = np.isin(self.kind, kinds)
            np.add.at(into, self.owner[chosen], marks[chosen])
        whole: NDArray[np.bool_] = np.all(rows >= 0, axis=1)
        tables = np.where(rows >= 0, nodes[np.maximum(rows, 0)], NONE)
        self.firm += (
            _mix(np.stack([np.full(rows.size, 5), np.tile(np.arange(length), count), tables.ravel()], 1)).reshape(rows.shape).sum(1)
        )
        # rows joined over more than one step are no repeats; nor is a row that lacks a node
        self.able = whole
        strange = self.kind == 4
        self.able[np.concatenate([row_i[strange], row_j[strange]])] = False
        self.order = np.argsort(self.owner, kind="stable")
        self.bounds = np.searchsorted(self.owner[self.order], np.arange(count + 1))

    def chains(self) -> list[Chain]:
        found = []
        row, count = 0, len(self.rows)
        while row < count:
            stop = row + 1
            while stop < count and self.able[stop] and self.firm[stop] == self.firm[row] and self.behind[stop] == self.behind[row]:
                stop += 1
            if self.able[row] and stop - row >= _MIN_REPEATS - 1 and (chain := self._chain(row, stop)) is not None:
                found.append(chain)
                stop = row + chain.count
            row = stop
        return found

    def _own(self, row: int) -> Ints:
        """Numbers of the edges that belong to `row`."""
        return self.order[self.bounds[row] : self.bounds[row + 1]]

    def _chain(self, start: int, stop: int) -> Chain | None:
        """Rows `start..stop` as a chain, with the row behind if it only has more edges to nodes behind the segment."""
        code = [tuple(c) for c in self.code[self._own(start)].tolist()]
        parts: list[list[tuple[int, int, int]]] = [[], [], [], []]
        for kind, i, j, table in code:
            parts[kind].append((i, j, table))
        inner, carried, before, behind = (tuple(sorted(part)) for part in parts)
        leaving = tuple(sorted({i for i, _, _ in carried}))
        if start == 0 and leaving:
            return None  # its entering nodes do not exist; equal rows that carry something start at 1
        entering = tuple(self.rows[start - 1, list(leaving)].tolist()) if leaving else ()
        if NONE in entering:
            return None
        wanted = Counter(code)
        if stop < len(self.rows) and self.able[stop] and self.firm[stop] == self.firm[start]:
            more = Counter([tuple(c) for c in self.code[self._own(stop)].tolist()])
            if not wanted - more and all(position in leaving for _, position, _, _ in more - wanted):
                stop += 1
        # what the last row gives to rows outside the chain must be among the nodes that stay visible
        if stop < len(self.rows):
            given = self.code[self._own(stop)]
            if not set(given[given[:, 0] == 1][:, 1].tolist()) <= set(leaving):
                stop -= 1
        if stop - start < _MIN_REPEATS - 1:
            return None
        edges = np.stack([self._numbers(row, wanted) for row in range(start, stop)])
        invariants = tuple(sorted({i for i, _, _ in before} | {j for _, j, _ in behind}))
        return Chain(self.rows[start:stop], leaving, entering, invariants, inner, carried, before, behind, edges)

    def _numbers(self, row: int, wanted: Counter[tuple[int, ...]]) -> Ints:
        """Numbers of the edges of `row` that every repeat has; an edge that only this one has stays outside."""
        own = self._own(row)
        if len(own) == wanted.total():
            return np.sort(own)
        left = wanted.copy()
        taken = []
        for number in own.tolist():
            key = tuple(self.code[number].tolist())
            if left[key] > 0:
                left[key] -= 1
                taken.append(number)
        return np.sort(np.array(taken, np.int64))


def _mix(rows: Ints) -> NDArray[np.uint64]:
    """A 64-bit number per row of integers that names it (splitmix64's finaliser over the columns)."""
    state = np.zeros(len(rows), np.uint64)
    with np.errstate(over="ignore"):
        for column in rows.T.astype(np.uint64):
            state = (state ^ column) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state ^= state >> np.uint64(31)
    return state
