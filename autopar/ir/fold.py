"""Fold: find the repeats of a graph by structure, so that everything behind may work on one layer instead of on a hundred.

Names are erased first: an operation becomes a *token* (operator, arguments, shapes, dtypes, whether gradients flow) and its operands
become *wiring* (who produced them, how far back). Position `i` matches position `i + period` when the tokens are equal and every
operand is, in both places,

* the same number of positions back (a value of the own repeat, or of the one before), or
* the same value (an invariant, made before the segment), or
* a parameter, buffer or constant of its own, used here for the first time or last used the same number of positions back.

`period * (count - 1)` matching positions in a row are a tandem repeat. The first repeat may read what comes into the segment from
anywhere, where the others read it from the repeat before them: an embedding instead of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.ir.graph import Arg, Graph, Ref, Symbol

Ints = NDArray[np.int64]

_NOWHERE = -1
_EXHAUSTIVE_OPS = 400  # below this length every period is tried; above, those that two equal windows of operations suggest
_WINDOW_OPS = 4
_MAX_PERIODS = 256
_MAX_OUTPUTS = 1 << 20
_MIN_TRIES = 64


@dataclass(frozen=True, slots=True)
class Segment:
    """`count` repeats of `length` positions, from position `start`; positions of operations in a graph, or of nodes in a problem."""

    start: int
    length: int
    count: int

    @property
    def stop(self) -> int:
        return self.start + self.length * self.count


def fold(graph: Graph, min_saved: int = 8) -> tuple[Segment, ...]:
    """Segments that tile `range(len(graph.ops))`, those with `count` 1 holding what does not repeat.

    A repeat is taken where it saves at least `min_saved` operations (`length * (count - 1)`). The repeat that saves most is taken
    first, then the best on either side of it; among equals the shortest period, then the boundary that fewest values cross, then
    the earliest. Equal graphs under other names fold equally. Near-linear in the number of operations.
    """
    wiring = _Wiring(graph)
    found: list[Segment] = []
    todo = [(0, wiring.size)]
    while todo:
        start, stop = todo.pop()
        best = wiring.best(start, stop, max(1, min_saved))
        if best is None:
            if start < stop:
                found.append(Segment(start, stop - start, 1))
        else:
            found.append(best)
            todo += [(start, best.start), (best.stop, stop)]
    return tuple(sorted(found, key=lambda segment: segment.start))


def repeats(graph: Graph, segment: Segment) -> bool:
    """Whether the repeats of `segment` are equal by the module's rules, read off operation by operation."""
    return _Wiring(graph).holds(segment)


def tokens(graph: Graph) -> Ints:
    """A number per operation, equal where operations are equal but for names and wiring. Shape `(len(graph.ops),)`; read-only."""
    known: Ints | None = graph.__dict__.get("_tokens")
    if known is None:
        known = graph.__dict__["_tokens"] = _tokens(graph)
    return known


def _tokens(graph: Graph) -> Ints:
    kinds: dict[tuple[object, ...], int] = {}
    kind_of = {name: kinds.setdefault((value.shape, value.dtype, value.requires_grad), len(kinds)) for name, value in graph.values.items()}

    def canonical(arg: Arg) -> object:
        if isinstance(arg, Ref):
            return (Ref, kind_of[arg.name])
        if isinstance(arg, tuple):
            return tuple([canonical(item) for item in arg])
        if isinstance(arg, float):
            return (float, arg.hex())
        if isinstance(arg, (bool, Symbol)):
            return (type(arg), arg)
        return arg

    numbers: dict[tuple[object, ...], int] = {}
    result = np.empty(len(graph.ops), np.int64)
    for position, op in enumerate(graph.ops):
        key = (op.target, canonical(op.args), canonical(op.kwargs) if op.kwargs else (), tuple([kind_of[name] for name in op.outputs]))
        result[position] = numbers.setdefault(key, len(numbers))
    return result


@dataclass(frozen=True, slots=True)
class _Limits:
    """Per position `i` of a run: a segment may hold `i` only if its start is in `low[i] < start <= high[i]`; where `turn[i]`, it may
    not hold both `i` and `i + 2 * period`."""

    low: NDArray[np.float64]
    high: NDArray[np.float64]
    turn: NDArray[np.bool_]


class _Wiring:
    """The graph as arrays. Operands of all operations stand in one row; `owner` says whose each is.

    Per operand: `value` numbers it; `producer` is the position of the operation that makes it (-1 for sources), `slot` which of
    that operation's outputs it is, `previous` the operand that last read it before this one (-1 when this is the first).
    """

    def __init__(self, graph: Graph) -> None:
        self.size = len(graph.ops)
        self.token = tokens(graph)
        source_kind = {"input": 0, "parameter": 1, "buffer": 2, "constant": 3}
        number: dict[str, tuple[int, int, int, int]] = {}
        for name, kind in graph.source_kind.items():
            number[name] = (len(number), _NOWHERE, 0, source_kind[kind])
        last_use: dict[str, int] = {}
        last_row: dict[str, int] = {}
        rows: list[tuple[int, int, int, int, int]] = []
        first: list[int] = []
        for position, op in enumerate(graph.ops):
            first.append(len(rows))
            operands = op.operands
            for name in operands:
                rows.append((*number[name], last_row.get(name, _NOWHERE)))
                last_row[name] = len(rows) - 1
                last_use[name] = position
            for slot, name in enumerate(op.outputs):
                number[name] = (len(number), position, slot, _NOWHERE)
        first.append(len(rows))
        table = np.array(rows, np.int64).reshape(-1, 5).T
        self.value, self.producer, self.slot, self.kind, self.previous = table
        self.first = np.array(first, np.int64)
        self.owner = np.repeat(np.arange(self.size), np.diff(self.first))
        # crossing[b]: by value, made at `made` and last read at `read`; a boundary at b is crossed when made < b <= read
        self.made = np.array([number[name][1] for name in last_use], np.int64)
        self.read = np.array(list(last_use.values()), np.int64)

    def periods(self, start: int, stop: int) -> list[int]:
        """Distances at which operations may repeat, within positions `start..stop`."""
        length = stop - start
        if length <= _EXHAUSTIVE_OPS:
            return list(range(1, length // 2 + 1))
        token = self.token[start:stop]
        window = np.zeros(length - _WINDOW_OPS + 1, np.int64)
        for offset in range(_WINDOW_OPS):
            window = window * 1_000_003 + token[offset : offset + len(window)]  # wraps around; a collision costs time, not truth
        order = np.argsort(window, kind="stable")
        distances: list[Ints] = []
        for step in (1, 2, 3, 4):
            near, far = order[:-step], order[step:]
            distances.append((far - near)[window[near] == window[far]])
        distance, votes = np.unique(np.concatenate(distances), return_counts=True)
        keep = (distance > 0) & (distance <= length // 2)
        distance, votes = distance[keep], votes[keep]
        ranked = np.lexsort((distance, -votes))[:_MAX_PERIODS]
        return sorted(int(d) for d in distance[ranked])

    def best(self, start: int, stop: int, min_saved: int) -> Segment | None:
        """The repeat within `start..stop` that saves most operations."""
        best: Segment | None = None
        best_rank: tuple[int, int, int, int] | None = None
        for period in self.periods(start, stop):
            equal = self.token[start : stop - period] == self.token[start + period : stop]
            for run_start, run_stop in _runs(equal, start):
                most = period * ((run_stop - run_start) // period)
                if most < min_saved or (best_rank is not None and most < -best_rank[0]):
                    continue
                for segment in self._tandems(run_start, run_stop, period):
                    saved = period * (segment.count - 1)
                    if saved < min_saved or (best_rank is not None and saved < -best_rank[0]):
                        break
                    rank = (-saved, period, self._crossing(segment), segment.start)
                    if (best_rank is None or rank < best_rank) and self.holds(segment):
                        best, best_rank = segment, rank
        return best

    def _crossing(self, segment: Segment) -> int:
        """How many values go from the first repeat to the second or further."""
        boundary = segment.start + segment.length
        return int(np.count_nonzero((self.made >= segment.start) & (self.made < boundary) & (self.read >= boundary)))

    def _tandems(self, run_start: int, run_stop: int, period: int) -> list[Segment]:
        """Candidate tandem repeats in a run of equal tokens, the longest first, in all their rotations.

        `_limits` knows most of the rules; `holds` knows all and says the last word.
        """
        limits = self._limits(run_start, run_stop, period)
        limited = np.flatnonzero((limits.low >= run_start) | (limits.high < np.inf) | limits.turn)
        place, low, high, turn = limited + run_start, limits.low[limited], limits.high[limited], limits.turn[limited]
        # a start becomes possible behind a `low`, behind a position that fits no start, or behind a turn; its rotations follow
        bounds = np.unique(np.concatenate([[run_start], low[low >= run_start] + 1, place[(high < np.inf) | turn] + 1])).astype(int)
        found: list[Segment] = []
        for left, right in zip(bounds, [*bounds[1:], run_stop], strict=True):
            for start in range(left, min(right, left + period)):
                broken = (place >= start) & ~((low < start) & (start <= high))
                end = int(place[np.argmax(broken)]) if broken.any() else run_stop
                turns = turn & (place >= start)
                if turns.any():
                    end = min(end, int(place[np.argmax(turns)]) + period)
                if (count := (end - start) // period + 1) > 1:
                    found.append(Segment(int(start), period, count))
        return sorted(found, key=lambda segment: (-segment.count, segment.start))[: 4 * period + _MIN_TRIES]

    def _limits(self, run_start: int, run_stop: int, period: int) -> _Limits:
        """What the wiring of every position `i` in the run, beside that of `i + period`, asks of a segment that holds both."""
        count = run_stop - run_start
        low, high, turn = np.full(count, -1.0), np.full(count, np.inf), np.zeros(count, np.bool_)
        near = np.arange(self.first[run_start], self.first[run_stop])
        # equal tokens have equally many operands, so the operands of i and i + period correspond one to one
        far = near + (self.first[run_start + period] - self.first[run_start])
        owner, other = self.owner[near], self.owner[far]
        made, later = self.producer[near], self.producer[far]
        index = owner - run_start
        same_value = self.value[near] == self.value[far]
        made_here = (made >= 0) & (later >= 0) & (self.slot[near] == self.slot[far])
        same_distance = made_here & (owner - made == other - later) & (owner - made < 2 * period)
        own = (made < 0) & (later < 0) & (self.kind[near] == self.kind[far]) & (self.kind[near] > 0) & ~same_value
        fresh = own & (self.previous[near] < 0) & (self.previous[far] < 0)
        again = own & (self.previous[near] >= 0) & (near - self.previous[near] == far - self.previous[far])
        matches = same_distance | fresh | again
        # an invariant must be made before the segment
        inside = same_value & ~matches
        np.maximum.at(low, index[inside], made[inside].astype(float))
        # the first repeat may read from before the segment what the others read from the repeat before them
        entering = ~matches & ~same_value & (later >= 0) & (made < later) & (other - later < 2 * period)
        np.maximum.at(low, index[entering], np.maximum(made, owner - period)[entering].astype(float))
        np.minimum.at(high, index[entering], np.minimum(later, owner)[entering].astype(float))
        never = ~matches & ~same_value & ~entering
        high[index[never]] = -1.0
        # what is an invariant between two repeats cannot be a source of its own, or carried, between the next two
        mode = np.select([inside, same_distance | entering, fresh, again], [1, 2, 3, 4], 0)
        step = int(self.first[run_start + period] - self.first[run_start])
        if step < len(mode):
            changed = mode[:-step] != mode[step:]
            turn[index[: len(changed)][changed]] = True
        return _Limits(low, high, turn)

    def holds(self, segment: Segment) -> bool:
        """Check a segment against the rules, operand by operand."""
        start, length, count = segment.start, segment.length, segment.count
        if count < 2 or start < 0 or segment.stop > self.size:
            return False
        token = self.token[start : segment.stop].reshape(count, length)
        if not (token == token[0]).all():
            return False
        rows = np.arange(self.first[start], self.first[segment.stop]).reshape(count, -1)
        made, value = self.producer[rows] - start, self.value[rows]
        repeat = np.arange(count)[:, None]
        # what each operand is, seen from its repeat: (which kind of wiring, where)
        outside = made < 0
        back = repeat - made // length
        place = np.where(outside, _NOWHERE, (made % length) * _MAX_OUTPUTS + self.slot[rows])
        inner = ~outside & (back == back[1]) & (back <= 1) & (place == place[1])
        same = outside & (value == value[0])
        distance = np.where(self.previous[rows] < 0, 0, rows - self.previous[rows])
        kind = self.kind[rows]
        own = (kind > 0) & (kind == kind[0]) & (distance == distance[0]) & (distance <= np.arange(rows.shape[1]))
        enters = inner.copy()
        enters[0] = outside[0] & (back[1] == 1)
        own_columns, same_columns = own.all(0), same.all(0)
        own_columns &= ~same_columns
        if np.isin(value[0, same_columns], value[:, own_columns]).any():
            return False  # a source of one repeat's own that the others read elsewhere
        return bool((inner.all(0) | same_columns | own_columns | enters.all(0)).all())


def _runs(flags: NDArray[np.bool_], offset: int) -> list[tuple[int, int]]:
    """Half-open runs of true flags, shifted by `offset`."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8))) + offset
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]
