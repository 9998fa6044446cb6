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

from autopar.ir.schedules import Action, named

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


@dataclass(frozen=True, slots=True)
class Prices:
    """One option of every stage on groups of one shape: arrays (unit it starts at, unit it stops before); `fits` where there is one."""

    fits: np.ndarray
    forward_s: np.ndarray
    backward_s: np.ndarray
    weight_s: np.ndarray
    before_s: np.ndarray
    after_s: np.ndarray


@dataclass(frozen=True, slots=True)
class Way:
    """A group for a stage and the state of devices `after`. `transfer_s`: (2, unit), least times into a stage that starts at a unit."""

    after: int
    prices: Prices
    transfer_s: np.ndarray


class Layer(NamedTuple):
    """Bounds of a stage and all behind it, and their least computing in all: arrays (state of devices, unit at which it starts)."""

    behind: Behind
    work: np.ndarray


def no_stages(states: int, units: int, full: int) -> Layer:
    """Behind the last stage: nothing, where all units and devices (state `full`) are taken."""
    done = np.full((states, units + 1), np.inf)
    done[full, units] = 0.0
    return Layer(Behind(done, done, done, done), done)


def layer(facts: Facts, microbatches: int, ways: tuple[tuple[Way, ...], ...], behind: Layer) -> Layer:
    """`behind` with one more stage before it, that has `ways[state]` to go on from each state of devices."""
    found = [np.full_like(behind.work, np.inf) for _ in range(5)]
    for state, every in enumerate(ways):
        open_ways = [way for way in every if np.isfinite(behind.work[way.after]).any()]
        if not open_ways:
            continue
        to = [way.after for way in open_ways]
        e: Any
        w: Any
        fits, f, b, w, before, after = (np.stack([getattr(way.prices, name) for way in open_ways]) for name in Prices.__slots__)
        c, r = np.stack([way.transfer_s for way in open_ways], axis=1)[:, :, :, None]
        e, w = (b - w, w) if facts.splits else (b, 0.0)
        del before  # known to hold up the first stage only, which `children` of nothing adds
        rest = [part[to][:, None, :] for part in (*behind.behind, behind.work)]
        seen = fold(facts, microbatches, f, e, w, after, c, r, Behind(*rest[:4]))
        for target, value in zip(found, (*seen, microbatches * (f + b) + rest[4]), strict=True):
            target[state, :-1] = np.where(fits, value, np.inf).min(axis=(0, 2))
    return Layer(Behind(*found[:4]), found[4])
