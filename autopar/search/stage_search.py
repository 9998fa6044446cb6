"""The best pipeline: how many stages, where to cut, which devices, how many microbatches, which schedule, by simulated step time.

    search_stages(costs, Devices(2, 8), limit_bytes=16e9, microbatches=(1, 2, 4, 8), simulate=...) -> StageSearch

For each number of groups, partial pipelines (the first stages decided) are opened in the order of a lower bound on every way to complete
them (`autopar.search.stage_bounds`), whole ones are simulated. When the least bound left is no less than the best simulated time, that
is the optimum: the simulator decides, bounds only prune. See `autopar.search.stage_costs` for what the search is told.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from autopar.errors import PlanError
from autopar.ir.schedules import named
from autopar.search.stage_bounds import Behind, Layer, facts_of, fold, layer, no_stages
from autopar.search.stage_costs import Devices, Group, Policy, StageCost, StageCosts
from autopar.search.stage_replay import replay_s
from autopar.search.stage_space import Pricing, Space, Step

__all__ = ["Devices", "Group", "Pipeline", "PlacedStage", "Row", "Simulated", "StageCost", "StageCosts", "StageSearch", "search_stages"]

_SAFE = 1 - 1e-12  # bounds and simulator add up in different orders


@dataclass(frozen=True, slots=True)
class PlacedStage:
    """Units `start` to `stop` (exclusive) on `group`, as `cost` says; `transfer_s`: to receive one microbatch from the stage before, and
    for its gradients to go back (0, 0 for the first stage)."""

    start: int
    stop: int
    group: Group
    cost: StageCost
    transfer_s: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A candidate: what is simulated. Stage s runs on group `schedule.group_of(s, groups)`."""

    schedule: str
    microbatches: int
    groups: int
    stages: tuple[PlacedStage, ...]


@dataclass(frozen=True, slots=True)
class Simulated:
    """What the simulator says of a pipeline; `bubble` as `autopar.ir.plan.Predicted` has it, bytes by group."""

    step_s: float
    bubble: float
    communication_s: float
    memory_bytes: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """The best pipeline of `groups` groups, and what no such pipeline can beat; or `why` there is none."""

    groups: int
    best: Pipeline | None
    simulated: Simulated | None
    lower_bound_s: float
    why: str = ""
    simulations: int = 0

    @property
    def step_s(self) -> float:
        return self.simulated.step_s if self.simulated else math.inf


@dataclass(frozen=True, slots=True)
class StageSearch:
    """`best` of all rows (None where nothing fits); no pipeline in the space searched is faster than `lower_bound_s`."""

    best: Row | None
    rows: tuple[Row, ...]
    lower_bound_s: float

    @property
    def exact(self) -> bool:
        """Whether `best` is proven to be the optimum."""
        return self.best is not None and self.best.step_s <= self.lower_bound_s * (1 + 1e-9)


def search_stages(
    costs: StageCosts,
    devices: Devices,
    *,
    limit_bytes: float,
    microbatches: Sequence[int],
    schedules: Sequence[str] = ("1f1b",),
    stages_per_group: Sequence[int] = (1, 2),
    groups: Sequence[int] | None = None,
    sizes: Literal["equal", "all"] | Sequence[int] = "equal",
    policies: tuple[Policy, ...] = ("append",),
    simulate: Callable[[Pipeline], Simulated],
    tolerance: float = 0.0,
    most_simulations: int = 2_000,
) -> StageSearch:
    """The pipeline with the least simulated step time whose memory fits, and the best for each number of groups.

    `microbatches`, `schedules`, `stages_per_group`, `groups`: what to try; combinations that a schedule cannot have are left out.
    `sizes`: groups of equal size, of any size, or of these sizes; together they have all devices. `policies`: which devices a group may
    get. `limit_bytes`: per device. `simulate`: from a candidate to its time, never less than the bounds. `tolerance`: stop
    where the bound proves that no pipeline of as many groups is faster by more than this share; 0.0 is exact, unless it would take more
    than `most_simulations` for one number of groups (then `Row.lower_bound_s` is what has been proven).
    """
    pricing = Pricing(costs, limit_bytes)
    spaces: dict[tuple[int, ...], Space] = {}
    layers: dict[Hashable, Layer] = {}
    rows = []
    for count in groups or range(1, min(devices.count, costs.units) + 1):
        allowed = _sizes(sizes, devices, count)
        if allowed not in spaces:
            spaces[allowed] = Space(devices, allowed, policies)
        forms: list[_Form] = []
        why = "" if spaces[allowed].full is not None else f"{devices.count} devices do not make {count} equal groups"
        for name in schedules if not why else ():
            for each in stages_per_group:
                for parts in microbatches:
                    try:
                        forms.append(_Form(name, count, each, parts, pricing, spaces[allowed], layers))
                    except PlanError as error:
                        why = str(error)
        rows.append(_best(count, forms, why, simulate, tolerance, most_simulations))
    best = min((row for row in rows if row.best), key=lambda row: row.step_s, default=None)
    return StageSearch(best, tuple(rows), min((row.lower_bound_s for row in rows), default=math.inf))


def _sizes(sizes: Literal["equal", "all"] | Sequence[int], devices: Devices, groups: int) -> tuple[int, ...]:
    if sizes == "equal":
        return (devices.count // groups,) if devices.count % groups == 0 else ()
    if sizes == "all":
        return tuple(range(1, devices.count + 1))
    return tuple(sorted({int(size) for size in sizes}))


@dataclass(frozen=True, slots=True)
class _Partial:
    """The first stages of a pipeline, decided, and the state of devices then."""

    stages: tuple[PlacedStage, ...]
    state: int


@dataclass(frozen=True, slots=True)
class _Children:
    """The ways to go on from `partial`, least `bounds_s` first: number k has `steps[which[k]]` up to unit `stops[k]`."""

    form: _Form
    partial: _Partial
    bounds_s: np.ndarray
    start: int
    steps: tuple[Step, ...]
    which: np.ndarray
    stops: np.ndarray
    arrivals_s: np.ndarray

    def child(self, number: int) -> _Partial:
        step, stop = self.steps[self.which[number]], int(self.stops[number])
        forward_s, backward_s = self.arrivals_s[:, self.which[number]]
        placed = PlacedStage(self.start, stop, step.group, step.options[self.start, stop], (float(forward_s), float(backward_s)))
        return _Partial((*self.partial.stages, placed), step.way.after)


class _Form:
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

    def children(self, partial: _Partial) -> _Children | None:
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
        return _Children(self, partial, bound[order] * _SAFE, start, steps, which[order], stops[order], arrivals)

    def _fold(self, stage: int, f: Any, b: Any, w: Any, after: Any, c: Any, r: Any, behind: Behind) -> Behind:
        facts = self.facts[stage]
        e, w = (b - w, w) if facts.splits else (b, 0.0)
        return fold(facts, self.microbatches, f, e, w, after, c, r, behind)

    def _shared(self, partial: _Partial, rest_s: np.ndarray) -> np.ndarray:
        """With several stages on a group: all computing, and what the first stages make later groups wait, evenly over the groups."""
        known = sum(self.microbatches * (placed.cost.forward_s + placed.cost.backward_s) for placed in partial.stages)
        waits, arrival = 0.0, 0.0
        for group, placed in enumerate(partial.stages[: self.groups]):
            arrival += placed.transfer_s[0]
            waits += arrival
            arrival += placed.cost.forward_s
            del group
        return (known + waits + rest_s) / self.groups

    def fits(self, partial: _Partial) -> bool:
        """Whether the stages of a group fit together; one stage on a group fits, or it would not be there."""
        if self.count == self.groups:
            return True
        alive = [0] * self.count
        for group, order in enumerate(named(self.schedule).orders(self.groups, self.count // self.groups, self.microbatches)):
            mine = [(stage, partial.stages[stage].cost) for stage in range(self.count) if self.group_of[stage] == group]
            base = sum(cost.fixed_bytes for _, cost in mine) + max(cost.workspace_bytes for _, cost in mine)
            splits = self.facts[mine[0][0]].splits
            for action in order:
                alive[action.stage] += 1 if action.kind == "F" else -1 if action.kind == ("W" if splits else "B") else 0
                if base + sum(alive[stage] * cost.live_bytes for stage, cost in mine) > self.pricing.limit_bytes:
                    return False
        return True

    def pipeline(self, partial: _Partial) -> Pipeline:
        return Pipeline(self.schedule, self.microbatches, self.groups, partial.stages)


class _Race:
    """Best first over the partial pipelines of all forms of one number of groups."""

    def __init__(self, judge: Callable[[Pipeline], Simulated], tolerance: float, most_simulations: int) -> None:
        self.judge, self.tolerance, self.most = judge, tolerance, most_simulations
        self.best: Pipeline | None = None
        self.said: Simulated | None = None
        self.simulations = 0
        self._open: list[tuple[float, int, int, _Children, int]] = []
        self._turn = 0
        self._passed_s = math.inf
        self._seen: set[Hashable] = set()

    @property
    def beat_s(self) -> float:
        """What is not below this is not looked at."""
        return self.said.step_s * (1 - self.tolerance) if self.said else math.inf

    def add(self, children: _Children | None, number: int = 0) -> None:
        if children is None or number == len(children.bounds_s):
            return
        bound_s = float(children.bounds_s[number])
        if bound_s >= self.beat_s:
            self._passed_s = min(self._passed_s, bound_s)
            return
        self._turn += 1
        heapq.heappush(self._open, (bound_s, -len(children.partial.stages), self._turn, children, number))

    def try_whole(self, form: _Form, partial: _Partial, bound_s: float) -> None:
        if not form.fits(partial):
            return
        pipeline = Pipeline(form.schedule, form.microbatches, form.groups, partial.stages)
        key = (form.schedule, form.microbatches, *((stage.group, stage.cost, stage.transfer_s) for stage in partial.stages))
        if key in self._seen:  # other cuts between equal units
            return
        self._seen.add(key)
        self.simulations += 1
        least_s = _SAFE * replay_s(
            form.schedule,
            form.groups,
            form.microbatches,
            [stage.cost for stage in partial.stages],
            [stage.transfer_s for stage in partial.stages],
        )
        if least_s >= self.beat_s:
            self._passed_s = min(self._passed_s, max(bound_s, least_s))
            return
        said = self.judge(pipeline)
        assert said.step_s >= max(least_s, bound_s) * (1 - 1e-9), f"simulated {said.step_s} s, below a bound {bound_s} s: {pipeline}"
        if self.said is None or said.step_s < self.said.step_s:
            self.best, self.said = pipeline, said

    def dive(self, children: _Children | None) -> None:
        """Always the most promising next stage: a first time to beat. What is passed by stays to be looked at."""
        while children is not None:
            bound_s = float(children.bounds_s[0])
            if bound_s >= self.beat_s:
                self.add(children)
                return
            self.add(children, 1)
            partial = children.child(0)
            if len(partial.stages) == children.form.count:
                self.try_whole(children.form, partial, bound_s)
                return
            children = children.form.children(partial)

    def run(self) -> float:
        """The least time that may still be possible when it ends."""
        while self._open and self._open[0][0] < self.beat_s and self.simulations < self.most:
            bound_s, _, _, children, number = heapq.heappop(self._open)
            self.add(children, number + 1)
            partial = children.child(number)
            if len(partial.stages) == children.form.count:
                self.try_whole(children.form, partial, bound_s)
            else:
                self.add(children.form.children(partial))
        return min(self._open[0][0] if self._open else math.inf, self._passed_s, self.said.step_s if self.said else math.inf)


def _best(
    groups: int, forms: list[_Form], why: str, judge: Callable[[Pipeline], Simulated], tolerance: float, most_simulations: int
) -> Row:
    race = _Race(judge, tolerance, most_simulations)
    roots = [root for form in forms if (root := form.children(_Partial((), 0)))]
    for root in sorted(roots, key=lambda root: float(root.bounds_s[0])):
        race.dive(root)
    bound_s = race.run()
    if race.best is None and not why:
        why = "none that fits was found" if roots else _why_none(forms)
    return Row(groups, race.best, race.said, bound_s, "" if race.best else why, race.simulations)


def _why_none(forms: list[_Form]) -> str:
    return "none"
