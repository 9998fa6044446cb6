"""Large neighbourhood search by forest moves that stay within the memory of every time step.

A move grows a random forest, at times with nodes that close cycles in it, and solves it with memory priced: by the dual's prices, by a
random part of them, or not at all. Where the result is over the room at some step, the price of that step is raised and the forest
solved again, some times. A walk may go up by a tolerance over the best so far, so that memory can be freed at one place and spent at
another.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from autopar.search.solver.arrays import Arrays
from autopar.search.solver.compiled import State, compiled, uniform, whole
from autopar.search.solver.cuts import add_cuts, solve_with_cuts
from autopar.search.solver.evaluate import cost_of, cost_of_change, usage_of, usage_of_change
from autopar.search.solver.forest import Forest, clear, grow, new_forest
from autopar.search.solver.problem import Floats, Ints

__all__ = ["Walk", "improve", "new_walk"]

_RAISED = 24  # steps with a price of their own in one move
_SMALLEST = 4.0  # half edges in the smallest forests
_LOWEST, _HIGHEST = -6.0, 2.0  # logarithms of the first price where memory is missing, in byte prices: dear repairs are hard to undo
_WITH_CUTS = 0.3  # of the moves that grow one tree
_MOST_CUTS = 2


class Walk(NamedTuple):
    """A walk's choice `(n,)`, what it uses `(T,)`, and `score`: cost and bytes over the room, summed over steps, now and at best.

    `best` is the choice of the best score (least excess first, then least cost). The rest is room for moves: `tried (n,)` a choice,
    `change (T + 1,)` a difference of usage, `priced (S,)`, and steps with raised prices.
    """

    choice: Ints
    usage: Floats
    best: Ints
    score: Floats
    forest: Forest
    tried: Ints
    change: Floats
    priced: Floats
    raised: Ints
    by: Floats


def new_walk(arrays: Arrays, choice: Ints) -> Walk:
    """A walk that begins at a possible choice."""
    usage = usage_of(arrays, choice)
    excess = float(np.maximum(usage - arrays.room, 0.0).sum())
    cost = float(cost_of(arrays, choice))
    score = np.array([cost, excess, cost, excess])
    change, priced = np.zeros(len(usage) + 1), np.zeros(len(arrays.cost))
    room = np.zeros(_RAISED, np.int64), np.zeros(_RAISED)
    return Walk(choice.copy(), usage, choice.copy(), score, new_forest(arrays), choice.copy(), change, priced, *room)


@compiled
def improve(
    arrays: Arrays, walk: Walk, dual: Floats, byte_price: float, noise: float, tolerance: float, moves: int, tries: int, state: State
) -> int:
    """Make `moves` moves. Returns how many changed the choice.

    `dual (S,)`: strategies' costs with memory at the dual's prices. `byte_price`: cost per byte, the first price where memory is
    missing and nothing is to be gained. `noise`: the most that costs are shaken by. `tolerance`: how far the walk may go above the
    best cost. `tries`: how often prices are raised in one move.
    """
    accepted = 0
    _add_up(arrays, walk)
    half_edges = max(len(arrays.other), 8)
    for _ in range(moves):
        work = int(_SMALLEST * np.exp(uniform(state) * np.log(half_edges / _SMALLEST))) + 1
        seeds = 1 if uniform(state) < 0.7 else 4 * len(arrays.sizes)
        count, touched = grow(arrays, walk.forest, seeds, work, state)
        cuts = 0
        if seeds == 1 and uniform(state) < _WITH_CUTS:
            cuts = add_cuts(arrays, walk.forest, count, touched, 1 + whole(state, _MOST_CUTS), state)
        draw = uniform(state)
        part = 1.0 if draw < 0.5 else (2.0 * uniform(state) if draw < 0.75 else 0.0)
        shake = noise * np.exp(-10.0 * uniform(state)) if uniform(state) < 0.3 else 0.0
        accepted += _move(arrays, walk, count, cuts, dual, part, byte_price, shake, tolerance, tries, state)
        for place in range(count + cuts):
            v = walk.forest.nodes[place]
            walk.tried[v] = walk.choice[v]
        clear(walk.forest, touched)
    return accepted


@compiled
def _add_up(arrays: Arrays, walk: Walk) -> None:
    """Usage and score of the walk anew: sums of changes drift where numbers are not whole."""
    usage = usage_of(arrays, walk.choice)
    excess = 0.0
    for t in range(len(arrays.room)):
        walk.usage[t] = usage[t]
        excess += max(usage[t] - arrays.room[t], 0.0)
    walk.score[0], walk.score[1] = cost_of(arrays, walk.choice), excess
    for v in range(len(walk.choice)):
        walk.tried[v] = walk.choice[v]


@compiled
def _move(
    arrays: Arrays,
    walk: Walk,
    count: int,
    cuts: int,
    dual: Floats,
    part: float,
    byte_price: float,
    shake: float,
    tolerance: float,
    tries: int,
    state: State,
) -> int:
    """Solve the grown forest, raising prices until the result may be taken. Returns 1 if it is, else 0."""
    nodes, old, new = walk.forest.nodes, walk.choice, walk.tried
    raised = 0
    if walk.score[1] > 0:
        raised = 1
        walk.raised[0] = 0
        for t in range(len(arrays.room)):
            if walk.usage[t] - arrays.room[t] > walk.usage[walk.raised[0]] - arrays.room[walk.raised[0]]:
                walk.raised[0] = t
        walk.by[0] = byte_price * np.exp(_LOWEST + (_HIGHEST - _LOWEST) * uniform(state))
    for _ in range(tries):
        _price(arrays, walk, count + cuts, dual, part, raised)
        solve_with_cuts(arrays, walk.forest, count, cuts, walk.priced, shake, old, new, state)
        gain = cost_of_change(arrays, nodes, count + cuts, old, new)
        lo, hi = usage_of_change(arrays, nodes, count + cuts, old, new, walk.change)
        worst, missing, excess = _excess(arrays, walk, lo, hi)
        cost = walk.score[0] + gain
        if excess < 0 or (excess == 0 and (gain < 0 or (cost <= walk.score[2] + tolerance and (lo < hi or shake > 0)))):
            _take(arrays, walk, count + cuts, gain, excess)
            return 1
        if worst < 0 or (gain >= 0 and walk.score[1] == 0):
            return 0
        place = 0
        while place < raised and walk.raised[place] != worst:
            place += 1
        if place < raised:
            walk.by[place] *= 2.0
        elif raised < _RAISED:
            walk.raised[raised] = worst
            walk.by[raised] = 0.5 * max(-gain / missing, 1e-3 * byte_price)
            raised += 1
        else:
            return 0
    return 0


@compiled
def _price(arrays: Arrays, walk: Walk, count: int, dual: Floats, part: float, raised: int) -> None:
    """Costs of the forest's strategies with memory at `part` of the dual's prices and at the raised ones."""
    for place in range(count):
        v = walk.forest.nodes[place]
        at, size = arrays.first[v], arrays.sizes[v]
        for s in range(at, at + size):
            walk.priced[s] = arrays.cost[s] if part == 0 else arrays.cost[s] + part * (dual[s] - arrays.cost[s])
        if raised == 0:
            continue
        for k in range(arrays.hold_start[v], arrays.hold_start[v + 1]):
            price = 0.0
            for r in range(raised):
                if arrays.hold_lo[k] <= walk.raised[r] < arrays.hold_hi[k]:
                    price += walk.by[r]
            if price > 0:
                begin = arrays.hold_first[k]
                for s in range(size):
                    walk.priced[at + s] += price * arrays.held[begin + s]


@compiled
def _excess(arrays: Arrays, walk: Walk, lo: int, hi: int) -> tuple[int, float, float]:
    """The step most over its room that the change makes worse (-1: none), the bytes missing there, and by how much the excess of all
    steps changes. Clears the change.
    """
    worst, missing, excess, now = -1, 0.0, 0.0, 0.0
    for t in range(lo, hi):
        now += walk.change[t]
        walk.change[t] = 0.0
        before, after = walk.usage[t] - arrays.room[t], walk.usage[t] + now - arrays.room[t]
        if before > 0 or after > 0:
            excess += max(after, 0.0) - max(before, 0.0)
            if now > 0 and after > missing:
                worst, missing = t, after
    if lo < hi:
        walk.change[hi] = 0.0
    return worst, missing, excess


@compiled
def _take(arrays: Arrays, walk: Walk, count: int, gain: float, excess: float) -> None:
    """Make the tried choice the walk's, and the best if it is."""
    lo, hi = usage_of_change(arrays, walk.forest.nodes, count, walk.choice, walk.tried, walk.change)
    now = 0.0
    for t in range(lo, hi):
        now += walk.change[t]
        walk.change[t] = 0.0
        walk.usage[t] += now
    if lo < hi:
        walk.change[hi] = 0.0
    for place in range(count):
        v = walk.forest.nodes[place]
        walk.choice[v] = walk.tried[v]
    walk.score[0] += gain
    walk.score[1] += excess
    if walk.score[1] <= 0:
        walk.score[1] = 0.0
    if walk.score[1] < walk.score[3] or (walk.score[1] == walk.score[3] and walk.score[0] < walk.score[2]):
        for v in range(len(walk.choice)):
            walk.best[v] = walk.choice[v]
        walk.score[2], walk.score[3] = walk.score[0], walk.score[1]
