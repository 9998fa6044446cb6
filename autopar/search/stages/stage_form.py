"""Pipelines of one schedule with so many groups, stages and microbatches: what may follow on the first stages, and bounds on all of it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache
from math import inf
from typing import Any

import numpy as np

from autopar.ir.pipelining.schedules import named
from autopar.search.stages.stage_bounds import Array, Behind, Layer, facts_of, fold, layer, no_stages
from autopar.search.stages.stage_costs import Group, PlacedStage, StageCost
from autopar.search.stages.stage_space import Pricing, Space, Table, least_needed_bytes

_MOST_KEPT = 4_000_000  # states and units of all layers together, each 80 bytes; beyond, they are made anew where they are needed
SAFE = 1 - 1e-12  # bounds and simulator add up in different orders


@dataclass(frozen=True, slots=True)
class Partial:
    """The first stages of a pipeline, decided; the state of devices then; whether one of the stages is a long one."""

    stages: tuple[PlacedStage, ...]
    state: int
    met: bool


@dataclass(frozen=True, slots=True)
class Children:
    """The ways to go on from `partial`, least `bounds_s` first: number k is entry `entries[k]` of the table for the next stage."""

    form: Form
    partial: Partial
    bounds_s: Array
    entries: Array

    def child(self, number: int) -> Partial:
        return self.form.child(self.partial, int(self.entries[number]))


class Form:
    """Pipelines of one schedule, with so many groups, stages and microbatches: bounds, and how to go on from a partial one.

    `loads_s`: of the longest stage, for one microbatch, between these. The bounds are the better the narrower that is.
    """

    def __init__(
        self, schedule: str, groups: int, each: int, microbatches: int, pricing: Pricing, space: Space, layers: dict[Hashable, Layer],
        loads_s: tuple[float, float] = (0.0, inf),
    ) -> None:  # fmt: skip
        self.schedule, self.groups, self.each, self.microbatches = schedule, groups, each, microbatches
        self.pricing, self.space, self.loads_s = pricing, space, loads_s
        self.count = groups * each
        self.facts = facts_of(schedule, groups, each, microbatches)
        self.group_of = [named(schedule).group_of(stage, groups) for stage in range(self.count)]
        self._layers = layers

    def narrowed(self, least_s: float, most_s: float) -> Form:
        return Form(self.schedule, self.groups, self.each, self.microbatches, self.pricing, self.space, self._layers, (least_s, most_s))

    def table(self, stage: int) -> Table:
        """The ways to go on for `stage`."""
        return self.pricing.table(self.space, self.microbatches, self.facts[stage].live, self.loads_s[1], stage >= self.groups)

    def behind(self, stage: int) -> Layer:
        """Bounds for `stage` and all behind it."""
        key = (
            id(self.space), self.microbatches, self.facts[stage:], max(0, self.groups - stage) if self.each > 1 else None, self.loads_s,
        )  # fmt: skip
        if key not in self._layers:
            if len(self._layers) * self.space.states * self.pricing.units > _MOST_KEPT:
                self._layers.clear()
            if stage == self.count:
                assert self.space.full is not None
                self._layers[key] = no_stages(self.space.states, self.pricing.units, self.space.full, self.loads_s[0] <= 0)
            else:
                ways = self.table(stage).ways
                self._layers[key] = layer(self.facts[stage], self.microbatches, ways, self.loads_s[0], self.behind(stage + 1))
        return self._layers[key]

    def start(self) -> Partial:
        return Partial((), 0, self.loads_s[0] <= 0)

    def children(self, partial: Partial) -> Children | None:
        """Every way to decide the next stage from which all can be decided, with a bound on what comes of it; None if there is none."""
        stage, m = len(partial.stages), self.microbatches
        start = partial.stages[-1].stop if partial.stages else 0
        if start == self.pricing.units:
            return None
        table, rest = self.table(stage), self.behind(stage + 1)
        ways, place = table.ways, partial.state * self.pricing.units + start
        which = np.arange(ways.first[place], ways.first[place + 1])
        if stage >= self.groups and len(which):
            shape = self._group(partial, stage).shape
            same = np.array([group.shape == shape for group in table.groups[partial.state]])
            which = which[same[ways.edge[which]]]
        f, b, to, stop = ways.f[which], ways.b[which], ways.to[which], ways.stop[which]
        behind = rest.any[:, to, stop]
        if not partial.met:
            behind = np.where(f + b >= self.loads_s[0], behind, rest.met[:, to, stop])
        possible = np.isfinite(behind[4])
        if not possible.any():
            return None
        which, f, b, behind = which[possible], f[possible], b[possible], behind[:, possible]
        c, r = self._arrivals(table, partial, stage, start)[:, ways.edge[which]]
        seen = self._fold(stage, f, b, ways.w[which], ways.after[which], c, r, Behind(*behind[:4]))
        for known in reversed(range(stage)):
            cost, (c, r) = partial.stages[known].cost, partial.stages[known].transfer_s
            seen = self._fold(known, cost.forward_s, cost.backward_s, cost.weight_s, cost.after_s, c, r, seen)
        bound = seen.end + (partial.stages[0].cost.before_s if stage else ways.before[which])
        if self.each > 1:
            bound = np.maximum(bound, self._shared(partial, m * (f + b) + behind[4]))
        order = np.argsort(bound, kind="stable")
        return Children(self, partial, bound[order] * SAFE, which[order])

    def child(self, partial: Partial, entry: int) -> Partial:
        """`partial` with one more stage."""
        stage = len(partial.stages)
        start = partial.stages[-1].stop if partial.stages else 0
        table = self.table(stage)
        ways, edge, stop = table.ways, int(table.ways.edge[entry]), int(table.ways.stop[entry])
        group = table.groups[partial.state][edge] if stage < self.groups else self._group(partial, stage)
        cost = self.pricing.every(start, stop, group, self.microbatches, self.facts[stage].live)[int(ways.slot[entry])]
        forward_s, backward_s = self._arrivals(table, partial, stage, start)[:, edge]
        placed = PlacedStage(start, stop, group, cost, (float(forward_s), float(backward_s)))
        met = partial.met or cost.forward_s + cost.backward_s >= self.loads_s[0]
        return Partial((*partial.stages, placed), int(ways.to[entry]), met)

    def _group(self, partial: Partial, stage: int) -> Group:
        """Of a stage whose group has one already."""
        return partial.stages[self.group_of.index(self.group_of[stage])].group

    def _arrivals(self, table: Table, partial: Partial, stage: int, start: int) -> Array:
        """(2, edges): transfers into the next stage and back."""
        edges = len(table.groups[partial.state])
        if stage == 0 or self.group_of[stage] == self.group_of[stage - 1]:
            return np.zeros((2, edges))
        sender = partial.stages[-1].group
        if stage >= self.groups:
            row = self.pricing.transfers(sender, self._group(partial, stage), self.microbatches)[:, start]
            return np.repeat(row[:, None], edges, axis=1)
        return self.pricing.arrivals(table, sender, partial.state, self.microbatches)[:, :, start]

    def _fold(self, stage: int, f: Any, b: Any, w: Any, after: Any, c: Any, r: Any, behind: Behind) -> Behind:
        facts = self.facts[stage]
        e, w = (b - w, w) if facts.splits else (b, 0.0)
        return fold(facts, self.microbatches, f, e, w, after, c, r, behind)

    def _shared(self, partial: Partial, rest_s: Array) -> Array:
        """With several stages on a group: all computing, and what the first stages make later groups wait, evenly over the groups."""
        known = sum(self.microbatches * (placed.cost.forward_s + placed.cost.backward_s) for placed in partial.stages)
        waits, arrival = 0.0, 0.0
        for placed in partial.stages[: self.groups]:
            arrival += placed.transfer_s[0]
            waits += arrival
            arrival += placed.cost.forward_s
        return (known + waits + rest_s) / self.groups

    def fits(self, costs: list[StageCost]) -> bool:
        """Whether stages that fit on their own fit together with the others of their group."""
        if self.count == self.groups:
            return True
        for numbers, alive in _alive(self.schedule, self.groups, self.count // self.groups, self.microbatches):
            mine = [costs[stage] for stage in numbers]
            base = sum(cost.fixed_bytes for cost in mine) + max(cost.workspace_bytes for cost in mine)
            if base + float((alive @ [cost.live_bytes for cost in mine]).max()) > self.pricing.limit_bytes:
                return False
        return True

    def least_bytes(self) -> float:
        """What the fullest device of the leanest such pipeline holds at least; infinite where no stages are possible at all."""
        behind = np.full((self.space.states, self.pricing.units + 1), np.inf)
        behind[self.space.full or 0, -1] = 0.0
        for stage in reversed(range(self.count)):
            found = np.full_like(behind, np.inf)
            again = [(group, self.space.full) for groups in self.space.groups for group, _ in groups]
            for state, groups in enumerate(self.space.groups):
                for group, after in groups if stage < self.groups else again if state == self.space.full else ():
                    need = least_needed_bytes(self.pricing, group, self.microbatches, self.facts[stage].live)
                    found[state, :-1] = np.minimum(found[state, :-1], np.maximum(need, behind[after]).min(axis=1))
            behind = found
        return float(behind[0, 0])


@lru_cache(maxsize=256)
def _alive(schedule: str, groups: int, each: int, microbatches: int) -> tuple[tuple[tuple[int, ...], Array], ...]:
    """By group its stages, and how many microbatches of each are alive together: `(moments, stages)`, of moments at which no stage has
    fewer than at another one."""
    row = named(schedule)
    found = []
    for group, order in enumerate(row.orders(groups, each, microbatches)):
        numbers = tuple(stage for stage in range(groups * each) if row.group_of(stage, groups) == group)
        steps = np.array([[((act.kind == "F") - (act.kind in "BW")) * (act.stage == stage) for stage in numbers] for act in order])
        moments = np.unique(np.cumsum(steps, 0), axis=0)
        least = [bool((moments >= moment).all(1).sum() == 1) for moment in moments]
        found.append((numbers, moments[least].astype(np.float64)))
    return tuple(found)
