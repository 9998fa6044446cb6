"""The memory of a shrinking problem: what every choice needs is taken off the limit, what cannot fit is dropped, and so are idle steps.

With the least memory of each node taken off at each step, the step's `slack` is what choices may still use. A strategy that needs more
than that at some step, alone, is in no choice within the limit. A step can go when all the largest strategies fit together; or when a
neighbouring step is at least as tight whatever is chosen:

    sum over holdings of max over s of (bytes here - bytes there)  <=  slack here - slack there

of which the step whose live set is part of another's is the simplest case (so that at most the maximal live sets are left).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autopar.errors import InfeasibleError
from autopar.search.solver.problem import Floats, Ints
from autopar.search.solver.shrinking import Shrinking

__all__ = ["tighten"]

Flags = NDArray[np.bool_]


def tighten(state: Shrinking) -> bool:
    """Take least memory off the limit, drop strategies that cannot fit and steps that cannot matter. Returns whether nodes changed.

    Raises `InfeasibleError` that names the time step when nothing fits.
    """
    _disjoint(state)
    pieces = _Pieces(state)
    if len(state.slack) and state.slack.min() < 0:
        step = int(state.slack.argmin())
        raise InfeasibleError(
            f"at time step {int(state.times[step])} the least memory of all nodes together is {-state.slack[step]:g} bytes over the limit",
            int(np.ceil(-state.slack[step])),
        )
    changed = _drop_what_cannot_fit(state, pieces)
    if changed:
        pieces = _Pieces(state)
    while True:
        idle = pieces.idle(state.slack)
        if not idle.any():
            break
        pieces.without(idle)
        state.slack, state.times = state.slack[~idle], state.times[~idle]
    pieces.put_back(state)
    return changed


def _disjoint(state: Shrinking) -> None:
    """Make each node's holdings disjoint in time and of least memory 0, and take what that leaves off the slack."""
    pool = state.pool
    taken = np.zeros(len(state.slack) + 1)
    for node in state.left():
        rows = state.holds[node]
        if not rows:
            continue
        if len(rows) == 1:
            ((span, vector),) = rows.items()
            least, rest = pool.lowered(vector)
            taken[span[0]] += least
            taken[span[1]] -= least
            state.holds[node] = {span: rest} if rest >= 0 else {}
            continue
        spans = np.array(list(rows), np.int64)
        breaks, place = np.unique(spans, return_inverse=True)
        place = place.reshape(-1, 2)
        values = np.stack([pool.vectors[vector] for vector in rows.values()])
        change = np.zeros((len(breaks), values.shape[1]))
        np.add.at(change, place[:, 0], values)
        np.add.at(change, place[:, 1], -values)
        usage = np.cumsum(change, 0)[:-1]
        low = usage.min(1)
        usage -= low[:, None]
        np.add.at(taken, breaks[:-1], low)
        np.add.at(taken, breaks[1:], -low)
        fresh = np.flatnonzero(np.concatenate([[True], (usage[1:] != usage[:-1]).any(1)]))
        ends = np.append(breaks[fresh[1:]], breaks[-1])
        used = np.any(usage[fresh], axis=1)
        state.holds[node] = {
            (int(lo), int(hi)): pool.vector(usage[at]) for at, lo, hi, any_ in zip(fresh, breaks[fresh], ends, used, strict=True) if any_
        }
    state.slack = state.slack - np.cumsum(taken)[:-1]


def _drop_what_cannot_fit(state: Shrinking, pieces: _Pieces) -> bool:
    """Drop strategies that need more than the slack of a step. Returns whether any was."""
    if not len(pieces.node):
        return False
    room = _range_minimum(state.slack, pieces.lo, pieces.hi)
    fits: dict[int, Flags] = {}
    for at in np.flatnonzero(pieces.most > room).tolist():
        node = int(pieces.node[at])
        fit = state.pool.vectors[pieces.vector[at]] <= room[at]
        fits[node] = fits[node] & fit if node in fits else fit
    for node, fit in fits.items():
        state.keep(node, np.flatnonzero(fit))
    return bool(fits)


def _range_minimum(values: Floats, lo: Ints, hi: Ints) -> Floats:
    """Minimum of `values[lo:hi]` for many ranges that are not empty, by a table of minima over powers of two."""
    levels = [values]
    while 2 ** len(levels) <= len(values):
        last, half = levels[-1], 2 ** (len(levels) - 1)
        levels.append(np.minimum(last[:-half], last[half:]))
    level = np.frexp(hi - lo)[1] - 1
    found = np.empty(len(lo))
    for k in np.unique(level).tolist():
        at = level == k
        found[at] = np.minimum(levels[k][lo[at]], levels[k][hi[at] - 2**k])
    return found


class _Pieces:
    """All holdings as arrays, by node and time: `node`, `lo`, `hi`, `vector` and `most` (bytes of the largest strategy)."""

    def __init__(self, state: Shrinking) -> None:
        self._state = state
        rows = [(node, lo, hi, vector) for node in state.left() for (lo, hi), vector in sorted(state.holds[node].items())]
        self.node, self.lo, self.hi, self.vector = np.array(rows, np.int64).reshape(-1, 4).T
        self.most = np.array([state.pool.most(vector) for vector in self.vector.tolist()], np.float64)

    def idle(self, slack: Floats) -> Flags:
        """`(steps,)`: steps that always hold, or hold where a step beside them does that is not idle itself or by the other's leave."""
        steps = len(slack)
        change = np.bincount(self.lo, self.most, steps + 1) - np.bincount(self.hi, self.most, steps + 1)
        idle = np.cumsum(change)[:-1] <= slack
        if not steps:
            return idle
        ending, starting = self.most.copy(), self.most.copy()
        follows = np.flatnonzero((self.node[1:] == self.node[:-1]) & (self.lo[1:] == self.hi[:-1]))
        ending[follows] = self._most_more(follows, follows + 1)
        starting[follows + 1] = self._most_more(follows + 1, follows)
        # at the boundary before step b, for b = 1 ... steps - 1
        more_before = np.bincount(self.hi, ending, steps + 1)[1:steps]
        more_behind = np.bincount(self.lo, starting, steps + 1)[1:steps]
        less_slack_behind = slack[:-1] - slack[1:]
        behind_rules = more_before <= less_slack_behind
        before_rules = (more_behind <= -less_slack_behind) & ~behind_rules
        idle[:-1] |= behind_rules
        idle[1:] |= before_rules
        return idle

    def _most_more(self, here: Ints, there: Ints) -> Floats:
        """The most bytes by which a strategy needs more in the pieces `here` than in `there`."""
        count = len(self._state.pool.vectors)
        pairs, place = np.unique(self.vector[here] * count + self.vector[there], return_inverse=True)
        more = self._state.pool.most_more
        return np.array([more(*divmod(pair, count)) for pair in pairs.tolist()], np.float64)[place]

    def without(self, idle: Flags) -> None:
        """Renumber time without the steps that are `idle`; join what is then one piece."""
        place = np.concatenate([[0], np.cumsum(~idle)])
        self.lo, self.hi = place[self.lo], place[self.hi]
        self._select(self.lo < self.hi)
        same = (self.node[1:] == self.node[:-1]) & (self.lo[1:] == self.hi[:-1]) & (self.vector[1:] == self.vector[:-1])
        if same.any():
            first = np.concatenate([[True], ~same])
            ends = np.append(np.flatnonzero(first)[1:], len(self.node)) - 1
            self.hi[first] = self.hi[ends]
            self._select(first)

    def _select(self, at: Flags) -> None:
        self.node, self.lo, self.hi = self.node[at], self.lo[at], self.hi[at]
        self.vector, self.most = self.vector[at], self.most[at]

    def put_back(self, state: Shrinking) -> None:
        """Make these the holdings of the nodes."""
        for node in state.left():
            if state.holds[node]:
                state.holds[node] = {}
                state.look(node)
        for node, lo, hi, vector in zip(self.node.tolist(), self.lo.tolist(), self.hi.tolist(), self.vector.tolist(), strict=True):
            state.holds[node][lo, hi] = vector
