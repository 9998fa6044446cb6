"""What no pipeline of a kind can beat: lower bounds on the step time that hold whatever the transfers do to each other.

A bound follows the longest of some chains of actions that must come one after the other. Let stage s take f seconds for a forward pass,
e for the backward pass that the stage before waits for (and w for gradients of weights, if a schedule does these later), c and r for a
transfer into it and back out, and `after` once at the end of a step. With its order of actions (`Facts`) and, of the stages behind it,

    trip   the least time from its first output to the gradient of that output, if nothing else ran
    first  the same as trip, but where stages do first what their order has first
    last   from its first output to the last gradient that comes back
    end    from its first output to the end of the step

the same four follow for the stage itself, seen from the stage before (`fold`). All grow with every time that enters, so least values
may be taken choice by choice: `fold` of least values is below every `fold`. Dynamic programming over stages from the last one forward
(`Layers`) thus bounds every completion of a partial pipeline.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from autopar.ir.pipelining.schedules import Action, named

Number = Any  # seconds: one float, or an array of them


@dataclass(frozen=True, slots=True)
class Facts:
    """What the bounds need to know of one stage's actions, in the order its group runs them.

    `ahead`: forward passes up to the first backward pass. `lead`: the most forward passes ever ahead of backward passes; `live`: the
    most microbatches with activations (until gradients of weights are done). `weights`: gradients of weights before the last backward
    pass. `backwards`, `weights_early`: backward passes and gradients of weights before the last forward pass.
    """

    ahead: int
    lead: int
    live: int
    weights: int
    backwards: int
    weights_early: int
    splits: bool


@lru_cache(maxsize=4096)
def facts_of(schedule: str, groups: int, stages_per_group: int, microbatches: int) -> tuple[Facts, ...]:
    """`Facts` of every stage. Raises `PlanError` where the schedule cannot have these numbers."""
    orders = named(schedule).orders(groups, stages_per_group, microbatches)
    return tuple(_facts([action for action in orders[group] if action.stage == stage])
                 for stage in range(groups * stages_per_group)
                 for group in (named(schedule).group_of(stage, groups),))  # fmt: skip


def _facts(order: list[Action]) -> Facts:
    splits = any(action.kind == "W" for action in order)
    for kinds in ("F", "BI", "W"):
        numbers = [action.microbatch for action in order if action.kind in kinds]
        assert numbers == sorted(numbers), "the bounds follow microbatches in order"
    forwards = backwards = weights = lead = live = 0
    ahead = weights_before = backwards_before = weights_early = 0
    for action in order:
        if action.kind == "F":
            forwards += 1
            backwards_before, weights_early = backwards, weights
        elif action.kind == "W":
            weights += 1
        else:
            ahead = ahead or forwards
            backwards += 1
            weights_before = weights
        lead = max(lead, forwards - backwards)
        live = max(live, forwards - (weights if splits else backwards))
    return Facts(ahead, lead, live, weights_before, backwards_before, weights_early, splits)


class Behind(NamedTuple):
    """The stages behind a point of the pipeline: see the module. Seconds, or arrays of seconds."""

    trip: Any
    first: Any
    last: Any
    end: Any


NOTHING = Behind(0.0, 0.0, 0.0, 0.0)


def fold(facts: Facts, microbatches: int, f: Number, e: Number, w: Number, after: Number, c: Number, r: Number, behind: Behind) -> Behind:
    """The stage and all behind it, seen from the stage before."""
    m = microbatches
    # The order has `ahead` forward passes first; the first gradient must also have been to the end and back.
    first = f + np.maximum((facts.ahead - 1) * f, behind.first) + e
    # Everything else it computes up to its last backward pass comes after its first one.
    last = first + (m - facts.ahead) * f + (m - 1) * e + facts.weights * w
    # The last forward pass comes after what the order has before it, then goes to the end and back.
    if facts.backwards:
        sent = first + (m - facts.ahead) * f + (facts.backwards - 1) * e + facts.weights_early * w
    else:
        sent = m * f + facts.weights_early * w
    last = np.maximum(last, sent + behind.trip + e)
    # Forward pass j + lead waits for backward pass j: round trips, one after the other.
    rounds = -(-m // facts.lead)
    last = np.maximum(last, rounds * (f + behind.trip + e) + (m - 1 - (rounds - 1) * facts.lead) * e)
    # The last gradient from behind still has to go through this stage.
    last = np.maximum(last, f + behind.last + e)
    end = np.maximum(last + (m - facts.weights if facts.splits else 0) * w + after, f + behind.end)
    # Seen from the stage before: microbatches come in and gradients go out one after the other.
    out = np.maximum(c + last + r, np.maximum(m * c + f + behind.trip + e + r, c + first + m * r))
    return Behind(c + f + behind.trip + e + r, c + first + r, out, c + end)


Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Ways:
    """All ways to go on with one stage: an entry each, sorted by the state of devices before it, then by the unit it starts at.

    `first[state * units + start]`: the first entry there, and at the end how many there are. `to`: state behind it; `stop`: the unit it
    stops before; `c`, `r`: the least that transfers into it and back out may take. `edge`, `slot`: which group and which option it is.
    """

    first: Array
    stop: Array
    to: Array
    edge: Array
    slot: Array
    f: Array
    b: Array
    w: Array
    before: Array
    after: Array
    c: Array
    r: Array


class Layer(NamedTuple):
    """Bounds of a stage and all behind it, `(5, states, units + 1)`, by the state of devices and the unit it starts at: `trip`, `first`,
    `last`, `end`, and the least computing in all. `met`: where one of these stages is a long one; `any`: whether or not."""

    met: Array
    any: Array


def no_stages(states: int, units: int, full: int, met: bool) -> Layer:
    """Behind the last stage: nothing, where all units and devices (state `full`) are taken."""
    never = np.full((5, states, units + 1), np.inf)
    done = never.copy()
    done[:, full, units] = 0.0
    return Layer(done if met else never, done)


def layer(facts: Facts, microbatches: int, ways: Ways, long_s: float, behind: Layer) -> Layer:
    """`behind` with one more stage before it; it is long if a microbatch takes it at least `long_s`."""
    width = behind.any.shape[2]
    open_ways = np.nonzero(np.isfinite(behind.any[4][ways.to, ways.stop]))[0]
    met, free = (np.full(behind.any.shape, np.inf) for _ in range(2))
    if len(open_ways):
        place = np.repeat(np.arange(len(ways.first) - 1), np.diff(ways.first))[open_ways]
        to, stop, f, b, w, after, c, r = (
            part[open_ways] for part in (ways.to, ways.stop, ways.f, ways.b, ways.w, ways.after, ways.c, ways.r)
        )
        starts = np.nonzero(np.diff(place, prepend=-1))[0]
        where = np.divmod(place[starts], width - 1)
        e, w = (b - w, w) if facts.splits else (b, 0.0 * w)

        def seen(rest: Array) -> Array:
            parts = rest[:, to, stop]
            found = fold(facts, microbatches, f, e, w, after, c, r, Behind(*parts[:4]))
            return np.stack([*found, microbatches * (f + b) + parts[4]])

        freely = seen(behind.any)
        free[:, where[0], where[1]] = np.minimum.reduceat(freely, starts, axis=1)
        if long_s > 0:
            bound = np.where(f + b >= long_s, freely, seen(behind.met))
            met[:, where[0], where[1]] = np.minimum.reduceat(bound, starts, axis=1)
        else:
            met = free
    return Layer(met, free)
