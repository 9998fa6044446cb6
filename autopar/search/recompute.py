"""How many repeats to recompute: as many as memory asks for, where that is cheaper than sharding more.

A repeat that is recomputed takes its forward pass twice and keeps only what enters it. Repeats are equal, so the question is a number. The
first guess comes from the plan that costs least with any memory: so many that what it lacks is saved. Around it the number is searched
by solving the problem with just so many.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from autopar.search.solve import solve_with

if TYPE_CHECKING:
    from autopar.search.place import Found, Place, Settings

Counts = tuple[tuple[int, ...], ...]
_MOST_STEPS = 32  # shares of the repeats that may be recomputed
_SOLVES = 4
_ENOUGH = 0.005  # of the time of a step; what helps less is the last change


@dataclass(frozen=True, slots=True)
class Trade:
    """What recomputing all repeats of a plan saves and takes: bytes at the peak, seconds of a step."""

    saved_bytes: float
    again_s: float

    @staticmethod
    def of(found: Found) -> Trade:
        saved = again_s = 0.0
        for part, most in zip(found.parts, found.place.most(), strict=True):
            repeats = sum(most)
            for row, cost in zip(part.rows, part.row_costs, strict=True):
                if repeats and (row.count > 1 or repeats == sum(one.count for one in part.rows)):
                    saved += (cost.activation_bytes - cost.checkpoint_bytes) * part.costs.live * row.count
                    again_s += (cost.forward_s + sum(cost.forward_comm_s.values())) * part.costs.microbatches * row.count
        return Trade(saved, again_s)


def wants(kept: Found) -> bool:
    """Whether recomputing could help: nothing fits without, or memory is dear enough."""
    if not kept.fits:
        return True
    trade = Trade.of(kept)
    return kept.price_s_per_byte * trade.saved_bytes > trade.again_s


def estimate_s(free: Found) -> float:
    """What a plan that costs least with any memory would cost with enough recomputed to fit; infinite if all is too little."""
    trade, missing = Trade.of(free), free.memory_bytes - free.limit_bytes
    if missing <= 0:
        return free.cost_s
    return free.cost_s + trade.again_s * missing / trade.saved_bytes if trade.saved_bytes >= missing else float("inf")


def recomputed(settings: Settings, kept: Found, free: Found | None = None) -> Found:
    """The best found with some share of the repeats recomputed, or `kept`, the best without.

    `free`: the plan of least cost with any memory. Its cost is the bound: it recomputes nothing."""
    place = kept.place
    free = free or unlimited(settings, place)
    trade, best = Trade.of(free), kept
    missing = max(0.0, free.memory_bytes - settings.limit_bytes)
    steps = min(_MOST_STEPS, max(count for row in place.most() for count in row))
    step = min(steps, max(1, -int(-steps * missing // max(trade.saved_bytes, 1.0))))
    low, high = 0, steps + 1  # too few; enough
    jump = max(1, steps // 8)
    tried: set[Counts] = set()
    for _ in range(_SOLVES):
        counts = tuple(tuple(-(-count * step // steps) for count in row) for row in place.most())
        if counts in tried:
            break
        tried.add(counts)
        found = settings.solve_as_is(place.recomputing(counts))
        worse = settings.rank(found) >= settings.rank(best)
        little = found.fits and best.fits and abs(found.cost_s - best.cost_s) < _ENOUGH * best.cost_s
        best = best if worse else found
        if little:
            break
        if worse and found.fits:
            low, step, jump = step, step + jump // 2, max(1, jump // 2)  # fewer cost more: back
            if not low < step < high:
                break
            continue
        if found.fits:
            high = step
            step = max(low + 1, step - jump)
        else:
            low = step
            short = (found.memory_bytes - settings.limit_bytes) / max(trade.saved_bytes, 1.0)
            step = min(high - 1, steps, max(step + 1, step - int(-steps * short // 1)))
        if not low < step < high:
            break
    return replace(best, bound_s=min(kept.bound_s, free.bound_s, best.cost_s))


def unlimited(settings: Settings, place: Place) -> Found:
    """The plan of least cost with any memory."""
    solution = solve_with(place.problem, {}, ready=place.ready)
    return settings.found(place, solution, solution.lower_bound_s)
