"""`Arrays`: a problem laid out flat, as the compiled loops of the search over time steps read it.

Everything that many nodes have in common is stored once: tables are named by the place where they begin. Of the time steps only
those are kept at which memory can be the highest (a step whose holdings are all part of the next step's, or of the one before it,
never decides) and can be over the limit.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autopar.search.solver.problem import Floats, Ints, Problem

__all__ = ["Arrays", "lay_out"]


class Arrays(NamedTuple):
    """A problem of `n` nodes with `S` strategies together, `h` half edges (each pair of neighbours has two), `r` holdings, `T` steps.

    `sizes (n,)`: strategies per node; node `v` has the places `first[v]` to `first[v + 1]` in all vectors of shape `(S,)`.
    `cost (S,)`: what strategies cost alone.
    Half edges of `v` are `start[v]` to `start[v + 1]`: `other` is the neighbour, `back` the same edge seen from there. In `table`
    (flat) it begins at `rows` with `v`'s strategies as rows and at `columns` with the neighbour's as rows.
    Holdings of `v` are `hold_start[v]` to `hold_start[v + 1]`: bytes `held[hold_first[k] + s]` at the steps `hold_lo <= t < hold_hi`.
    `room (T,)`: the limit less what is held whatever is chosen; `limit` the limit itself, in bytes.
    """

    sizes: Ints
    first: Ints
    cost: Floats
    start: Ints
    other: Ints
    back: Ints
    rows: Ints
    columns: Ints
    table: Floats
    hold_start: Ints
    hold_lo: Ints
    hold_hi: Ints
    hold_first: Ints
    held: Floats
    room: Floats
    limit: float

    @property
    def unit(self) -> float:
        """An amount of bytes to measure others by; positive."""
        known = [self.limit if self.limit < np.inf else 0.0, float(self.held.max(initial=0.0))]
        return max(known) or 1.0


def lay_out(problem: Problem) -> Arrays:
    """The problem in flat arrays. No edge may hold memory; parallel edges are added up."""
    sizes = np.array([len(problem.tables[t].cost_s) for t in problem.nodes], np.int64)
    first = _offsets(sizes)
    cost = _joined([problem.tables[t].cost_s for t in problem.nodes])
    start, other, back, rows, columns, table = _edges(problem, len(sizes))
    hold_start, lo, hi, hold_first, held, room = _holdings(problem, len(sizes))
    return Arrays(sizes, first, cost, start, other, back, rows, columns, table, hold_start, lo, hi, hold_first, held, room, _limit(problem))


def _limit(problem: Problem) -> float:
    """Sums of bytes that are no whole numbers differ in their last digits with the order of adding: the search stays below that."""
    limit = problem.memory_limit_bytes
    whole = all(float(number).is_integer() for table in problem.tables for number in (table.memory_bytes.sum(),))
    return limit if whole else limit * (1 - 1e-12)


def _offsets(counts: Ints | list[int]) -> Ints:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.asarray(counts, np.int64), dtype=np.int64)])


def _joined(parts: list[Floats]) -> Floats:
    return np.concatenate([np.zeros(0), *(part.ravel() for part in parts)]).astype(np.float64)


def _edges(problem: Problem, nodes: int) -> tuple[Ints, Ints, Ints, Ints, Ints, Floats]:
    """Half edges sorted by node, and the flat tables, each in both orientations."""
    between: dict[tuple[int, int], list[int]] = {}
    for i, j, t in problem.edges:
        between.setdefault((i, j), []).append(t)
    places: dict[tuple[int, ...], tuple[int, int]] = {}
    flat: list[Floats] = []
    size = 0
    by_pair = np.zeros((len(between), 4), np.int64)
    for place, ((i, j), tables) in enumerate(between.items()):
        key = tuple(sorted(tables))
        if key not in places:
            costs = np.add.reduce([problem.tables[t].cost_s for t in key])
            places[key] = (size, size + costs.size)
            flat += [costs, costs.T]
            size += 2 * costs.size
        by_pair[place] = (i, j, *places[key])
    left, right, rows, columns = by_pair.T
    source, other = np.concatenate([left, right]), np.concatenate([right, left])
    rows, columns = np.concatenate([rows, columns]), np.concatenate([columns, rows])
    order = np.lexsort((other, source))
    place_of = np.empty(len(order), np.int64)
    place_of[order] = np.arange(len(order))
    back = np.roll(place_of, len(left))[order] if len(order) else order
    start = np.searchsorted(source[order], np.arange(nodes + 1)).astype(np.int64)
    return start, other[order], back, rows[order], columns[order], _joined(flat)


def _holdings(problem: Problem, nodes: int) -> tuple[Ints, Ints, Ints, Ints, Floats, Floats]:
    """Holdings sorted by node, only the part that depends on the choice; the rest, and the limit, become `room`."""
    if problem.memory_limit_bytes == np.inf:
        none = np.zeros(0, np.int64)
        return np.zeros(nodes + 1, np.int64), none, none, none, np.zeros(0), np.full(1, np.inf)
    live = problem.live
    listed = [(node, table, *(live[node] if live else (0, 1))) for node, table in enumerate(problem.nodes)]
    if problem.live is None and problem.also:
        listed = [(node, table, *_whole_time(problem)) for node, table in enumerate(problem.nodes)]
    node, table, lo, hi = np.array([*listed, *problem.also], np.int64).reshape(-1, 4).T
    alive = lo < hi
    node, table, lo, hi = node[alive], table[alive], lo[alive], hi[alive]
    lo, hi, steps = _deciding_steps(lo, hi)
    room = np.full(steps, problem.memory_limit_bytes)
    least = np.array([t.memory_bytes.min() if t.memory_bytes.size else 0.0 for t in problem.tables])
    change = np.bincount(lo, least[table], steps + 1) - np.bincount(hi, least[table], steps + 1)
    room -= np.cumsum(change)[:steps]
    most = np.array([t.memory_bytes.max() if t.memory_bytes.ndim == 1 else 0.0 for t in problem.tables]) - least
    highest = np.cumsum(np.bincount(lo, most[table], steps + 1) - np.bincount(hi, most[table], steps + 1))[:steps]
    matters = highest > room * (1 - 1e-12)
    matters[np.argmin(room)] = True
    number = _offsets(matters.astype(np.int64))
    lo, hi, room = number[lo], number[hi], room[matters]
    varies = (most[table] > 0) & (lo < hi)
    node, table, lo, hi = node[varies], table[varies], lo[varies], hi[varies]
    order = np.lexsort((hi, lo, node))
    node, table, lo, hi = node[order], table[order], lo[order], hi[order]
    used = np.unique(table)
    begins = np.zeros(len(problem.tables), np.int64)
    begins[used] = _offsets([problem.tables[t].memory_bytes.size for t in used])[:-1]
    held = _joined([problem.tables[t].memory_bytes - least[t] for t in used])
    return np.searchsorted(node, np.arange(nodes + 1)).astype(np.int64), lo, hi, begins[table], held, room


def _whole_time(problem: Problem) -> tuple[int, int]:
    return min(lo for _, _, lo, _ in problem.also), max(hi for _, _, _, hi in problem.also)


def _deciding_steps(lo: Ints, hi: Ints) -> tuple[Ints, Ints, int]:
    """Intervals in numbers of deciding steps: those at which a holding has just begun and before another begins one ends."""
    if not len(lo):
        return lo, hi, 1
    times = np.unique(np.concatenate([lo, hi]))
    begins, ends = np.isin(times, lo), np.isin(times, hi)
    last_begin = np.maximum.accumulate(np.where(begins, np.arange(len(times)), -1))
    ending = np.flatnonzero(ends)
    steps = np.unique(last_begin[ending - 1])
    deciding: NDArray[np.int64] = times[steps[steps >= 0]]
    return np.searchsorted(deciding, lo).astype(np.int64), np.searchsorted(deciding, hi).astype(np.int64), len(deciding)
