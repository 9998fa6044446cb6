"""Pipelines of one schedule with so many groups, stages and microbatches: what may follow on the first stages, and bounds on all of it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from autopar.ir.schedules import named
from autopar.search.stage_bounds import Behind, Layer, facts_of, fold, layer, no_stages
from autopar.search.stage_costs import PlacedStage, StageCost
from autopar.search.stage_space import Pricing, Space, Step

SAFE = 1 - 1e-12  # bounds and simulator add up in different orders


@dataclass(frozen=True, slots=True)
class Partial:
    """The first stages of a pipeline, decided, and the state of devices then."""

    stages: tuple[PlacedStage, ...]
    state: int


@dataclass(frozen=True, slots=True)
class Children:
    """The ways to go on from `partial`, least `bounds_s` first: number k has `steps[which[k]]` up to unit `stops[k]`."""

    form: Form
    partial: Partial
    bounds_s: np.ndarray
    start: int
    steps: tuple[Step, ...]
    which: np.ndarray
    stops: np.ndarray
    arrivals_s: np.ndarray

    def child(self, number: int) -> Partial:
        step, stop = self.steps[self.which[number]], int(self.stops[number])
        forward_s, backward_s = self.arrivals_s[:, self.which[number]]
        placed = PlacedStage(self.start, stop, step.group, step.options[self.start, stop], (float(forward_s), float(backward_s)))
        return Partial((*self.partial.stages, placed), step.way.after)


class Form:
    """Pipelines of one schedule, with so many groups, stages and microbatches: bounds, and how to go on from a partial one."""

    def __init__(
        self, schedule: str, groups: int, each: int, microbatches: int, pricing: Pricing, space: Space, layers: dict[Hashable, Layer]
    ) -> None:
        self.schedule, self.groups, self.microbatches, self.pricing, self.space = schedule, groups, microbatches, pricing, space
        self.count = groups * each
        self.facts = facts_of(schedule, groups, each, microbatches)
        self.group_of = [named(schedule).group_of(stage, groups) for stage in range(self.count)]
        self._layers = layers

    def steps(self, stage: int) -> tuple[tuple[Step, ...], ...]:
        """The ways to go on for `stage`, by state of devices."""
        live = self.facts[stage].live
        if stage < self.groups:
            return self.pricing.steps(self.space, self.microbatches, live)
        return tuple(
            self.pricing.again(self.space, self.microbatches, live) if state == self.space.full else ()
            for state in range(self.space.states)
        )

    def behind(self, stage: int) -> Layer:
        """Bounds for `stage` and all behind it."""
        key = (id(self.space), self.microbatches, self.facts[stage:], max(0, self.groups - stage) if self.count > self.groups else None)
        if key not in self._layers:
            if stage == self.count:
                assert self.space.full is not None
                self._layers[key] = no_stages(self.space.states, self.pricing.units, self.space.full)
            else:
                ways = tuple(tuple(step.way for step in steps) for steps in self.steps(stage))
                self._layers[key] = layer(self.facts[stage], self.microbatches, ways, self.behind(stage + 1))
        return self._layers[key]

    def children(self, partial: Partial) -> Children | None:
        """Every way to decide the next stage from which all can be decided, with a bound on what comes of it; None if there is none."""
        stage, m = len(partial.stages), self.microbatches
        start = partial.stages[-1].stop if partial.stages else 0
        steps = self.steps(stage)[partial.state]
        if stage >= self.groups:
            group = partial.stages[self.group_of.index(self.group_of[stage])].group
            steps = tuple(replace(step, group=group) for step in steps if step.group.shape == group.shape)
        if not steps:
            return None
        rest = self.behind(stage + 1)
        after = [step.way.after for step in steps]
        prices = [step.way.prices for step in steps]
        which, stops = np.nonzero(np.stack([price.fits[start] for price in prices]) & np.isfinite(rest.work[after]))
        if not len(which):
            return None
        arrivals = np.zeros((2, len(steps)))
        if stage and self.group_of[stage] != self.group_of[stage - 1]:
            sender = partial.stages[-1].group
            arrivals = np.stack([self.pricing.transfers(sender, step.group, m)[:, start] for step in steps], axis=1)
        f, b, w, before, tail = (
            np.stack([getattr(price, name)[start] for price in prices])[which, stops]
            for name in ("forward_s", "backward_s", "weight_s", "before_s", "after_s")
        )
        to = np.array(after)[which]
        c, r = arrivals[:, which]
        seen = self._fold(stage, f, b, w, tail, c, r, Behind(*(part[to, stops] for part in rest.behind)))
        for place in reversed(range(stage)):
            cost, (c, r) = partial.stages[place].cost, partial.stages[place].transfer_s
            seen = self._fold(place, cost.forward_s, cost.backward_s, cost.weight_s, cost.after_s, c, r, seen)
        bound = seen.end + (partial.stages[0].cost.before_s if stage else before)
        if self.count > self.groups:
            bound = np.maximum(bound, self._shared(partial, m * (f + b) + rest.work[to, stops]))
        order = np.argsort(bound, kind="stable")
        return Children(self, partial, bound[order] * SAFE, start, steps, which[order], stops[order], arrivals)

    def _fold(self, stage: int, f: Any, b: Any, w: Any, after: Any, c: Any, r: Any, behind: Behind) -> Behind:
        facts = self.facts[stage]
        e, w = (b - w, w) if facts.splits else (b, 0.0)
        return fold(facts, self.microbatches, f, e, w, after, c, r, behind)

    def _shared(self, partial: Partial, rest_s: np.ndarray) -> np.ndarray:
        """With several stages on a group: all computing, and what the first stages make later groups wait, evenly over the groups."""
        known = sum(self.microbatches * (placed.cost.forward_s + placed.cost.backward_s) for placed in partial.stages)
        waits, arrival = 0.0, 0.0
        for group, placed in enumerate(partial.stages[: self.groups]):
            arrival += placed.transfer_s[0]
            waits += arrival
            arrival += placed.cost.forward_s
            del group
        return (known + waits + rest_s) / self.groups

    def fits(self, costs: list[StageCost]) -> bool:
        """Whether stages that fit on their own fit together with the others of their group."""
        if self.count == self.groups:
            return True
        alive = [0] * self.count
        for group, order in enumerate(named(self.schedule).orders(self.groups, self.count // self.groups, self.microbatches)):
            mine = [(stage, costs[stage]) for stage in range(self.count) if self.group_of[stage] == group]
            base = sum(cost.fixed_bytes for _, cost in mine) + max(cost.workspace_bytes for _, cost in mine)
            splits = self.facts[mine[0][0]].splits
            for action in order:
                alive[action.stage] += 1 if action.kind == "F" else -1 if action.kind == ("W" if splits else "B") else 0
                if base + sum(alive[stage] * cost.live_bytes for stage, cost in mine) > self.pricing.limit_bytes:
                    return False
        return True

    def least_bytes(self) -> float:
        """What the fullest device of the leanest such pipeline holds at least; infinite where no stages are possible at all."""
        behind = np.full((self.space.states, self.pricing.units + 1), np.inf)
        behind[self.space.full, -1] = 0.0
        for stage in reversed(range(self.count)):
            found = np.full_like(behind, np.inf)
            again = [(group, self.space.full) for groups in self.space.groups for group, _ in groups]
            for state, groups in enumerate(self.space.groups):
                for group, after in groups if stage < self.groups else again if state == self.space.full else ():
                    need = self.pricing.needed(group, self.microbatches, self.facts[stage].live)
                    found[state, :-1] = np.minimum(found[state, :-1], np.maximum(need, behind[after]).min(axis=1))
            behind = found
        return float(behind[0, 0])
