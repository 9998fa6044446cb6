"""The best pipeline: how many stages, where to cut, which devices, how many microbatches, which schedule, by simulated step time.

    search_stages(costs, Devices(2, 8), limit_bytes=16e9, microbatches=(1, 2, 4, 8), simulate=...) -> StageSearch

For each number of groups, partial pipelines (the first stages decided) are opened in the order of a lower bound on every way to complete
them (`autopar.search.stages.stage_bounds`), whole ones are simulated. When the least bound left is no less than the best simulated time,
that is the optimum: the simulator decides, bounds only prune. See `autopar.search.stages.stage_costs` for what the search is told.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

from autopar.errors import PlanError
from autopar.ir.units import size
from autopar.search.stages.stage_bounds import Layer
from autopar.search.stages.stage_costs import Devices, Group, Pipeline, PlacedStage, Policy, Simulated, StageCost, StageCosts
from autopar.search.stages.stage_form import SAFE, Children, Form
from autopar.search.stages.stage_improve import Draft, actions, improve, least_step_s, seed
from autopar.search.stages.stage_space import Pricing, Space

__all__ = ["Devices", "Group", "Pipeline", "PlacedStage", "Row", "Simulated", "StageCost", "StageCosts", "StageSearch", "search_stages"]

_IMPROVED = 2  # forms of every number of groups whose best pipeline is changed in small ways
_WORSE = 1.3  # than another form's: not one of these
_TURN = 200  # partial pipelines opened at a time, where it looks best
_SHORT = 0.02  # a longest stage that takes less than this share of a step is not looked at more closely
_FIRST_LOOK = 50  # partial pipelines opened of every number of groups, before anything cleverer
_DIVE_EVERY = 20  # of so many partial pipelines that are opened, one is completed at once
_DEEP = 4  # stages known for the effort of one more
_REPLAYED, _SIMULATED = 1000, 20  # actions for the effort of one
_NARROW = 1.03  # loads of the longest stage that differ by no more are looked at together


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
    every_row: bool = False,
    most_opened: int = 10_000,
) -> StageSearch:
    """The pipeline with the least simulated step time whose memory fits, and the best for each number of groups.

    `microbatches`, `schedules`, `stages_per_group`, `groups`: what to try; combinations that a schedule cannot have are left out.
    `sizes`: groups of equal size, of any size, or of these sizes; together they have all devices. `policies`: which devices a group may
    get. `limit_bytes`: per device. `simulate`: from a candidate to its time, never less than the bounds. `tolerance`: stop where the
    bound proves that nothing is faster than the best by more than this share; 0.0 is exact, if `most_opened` suffices (partial pipelines
    looked at, and some actions played through as much: about a millisecond each; counted, so that answers repeat; 0: nothing is proven, and
    what small changes to even pipelines lead to is the answer, if there are any that fit). `every_row`: do so
    for every number of groups; otherwise numbers that cannot win have what small changes to even pipelines lead to. `lower_bound_s`
    is what has been proven, in all and in each row.
    """
    pricing = Pricing(costs, limit_bytes)
    spaces: dict[tuple[int, ...], Space] = {}
    layers: dict[Hashable, Layer] = {}
    races = []
    for count in groups or range(1, min(devices.count, costs.units) + 1):
        allowed = _sizes(sizes, devices, count)
        if allowed not in spaces:
            spaces[allowed] = Space(devices, allowed, policies)
        forms: list[Form] = []
        why = "" if spaces[allowed].full is not None else f"{devices.count} devices do not make {count} groups of such sizes"
        for name in schedules if not why else ():
            for each in stages_per_group:
                for parts in microbatches:
                    try:
                        forms.append(Form(name, count, each, parts, pricing, spaces[allowed], layers))
                    except PlanError as error:
                        why = str(error)
        races.append(_Race(count, forms, why, simulate, tolerance))
    best_s = min((race.best_s for race in races), default=math.inf)
    for race in sorted(races, key=lambda race: race.best_s):
        if not most_opened:
            continue  # small changes to even pipelines will do; without several stages a group these are found wherever anything fits
        race.begin(race.best_s if every_row else min(best_s, race.best_s), most_opened)
        best_s = min(best_s, race.best_s)
    while True:
        beat_s = min((race.best_s for race in races), default=math.inf) * (1 - tolerance)
        hopeful = [race for race in races if race.lower_bound_s < (race.beat_s if every_row else min(beat_s, race.beat_s))]
        if not hopeful or sum(race.effort for race in races) >= most_opened:
            break
        race = min(hopeful, key=lambda race: race.lower_bound_s)
        race.run(_TURN, math.inf if every_row else beat_s)
    rows = tuple(race.row() for race in races)
    best = min((row for row in rows if row.best), key=lambda row: row.step_s, default=None)
    return StageSearch(best, rows, min((row.lower_bound_s for row in rows), default=math.inf))


def _sizes(sizes: Literal["equal", "all"] | Sequence[int], devices: Devices, groups: int) -> tuple[int, ...]:
    if sizes == "equal":
        return (devices.count // groups,) if devices.count % groups == 0 else ()
    if sizes == "all":
        return tuple(range(1, devices.count + 1))
    return tuple(sorted({int(size) for size in sizes}))


class _Race:
    """Best first over the partial pipelines of all forms of one number of groups."""

    def __init__(self, groups: int, forms: list[Form], why: str, judge: Callable[[Pipeline], Simulated], tolerance: float) -> None:
        self.groups, self.forms, self.why, self.judge, self.tolerance = groups, forms, why, judge, tolerance
        self.best: Pipeline | None = None
        self.said: Simulated | None = None
        self.simulations = 0
        self._open: list[tuple[float, int, int, Children | Pipeline, int]] = []
        self._turn = 0
        self._opened = 0
        self.effort = 0.0
        self._passed_s = math.inf
        self._seen: set[Hashable] = set()
        self._least_replay_s = math.inf
        self._improve()

    @property
    def best_s(self) -> float:
        return self.said.step_s if self.said else math.inf

    @property
    def beat_s(self) -> float:
        """What is not below this is not looked at."""
        return self.best_s * (1 - self.tolerance)

    @property
    def lower_bound_s(self) -> float:
        """The least time that may still be possible."""
        return min(self._open[0][0] if self._open else math.inf, self._passed_s, self.best_s)

    def row(self) -> Row:
        return Row(self.groups, self.best, self.said, self.lower_bound_s, "" if self.best else self._why(), self.simulations)

    def begin(self, limit_s: float, most: int) -> None:
        """Open all forms, as far as they may be faster than `limit_s`."""
        if self.best is None:  # nothing even fits: any pipeline that does
            for form in self.forms:
                self._dive(form.children(form.start()))
        self._passed_s = min(self._passed_s, limit_s)
        roots = [root for form in self.forms if (root := self._root(form.narrowed(0.0, limit_s / form.microbatches), limit_s))]
        for root in sorted(roots, key=lambda root: float(root.bounds_s[0]))[: 1 if self.best else None]:
            self._dive(root)
        for root in roots:
            self._add(root)
        self.run(min(_FIRST_LOOK, most), limit_s)
        if most <= _FIRST_LOOK or not self._open or self._open[0][0] >= min(limit_s, self.beat_s):
            return
        # Too many to open: look at them by the load of the longest stage, in ever narrower parts.
        self._open.clear()
        for root in roots:
            parts = [root.form.loads_s]
            while parts:
                least_s, most_s = parts.pop()
                part = self._root(root.form.narrowed(least_s, most_s), limit_s)
                if part is None:
                    continue
                if math.isinf(most_s) or most_s <= _NARROW * least_s or most_s < _SHORT * root.form.loads_s[1]:
                    self._add(part)
                else:
                    middle_s = math.sqrt(least_s * most_s) if least_s else most_s / 2
                    parts += [(least_s, middle_s), (middle_s, most_s)]

    def _root(self, form: Form, limit_s: float) -> Children | None:
        """The first stages of a form that may be faster."""
        root = form.children(form.start())
        if root is not None and root.bounds_s[0] >= min(limit_s, self.beat_s):
            self._passed_s = min(self._passed_s, float(root.bounds_s[0]))
            return None
        return root

    def run(self, most: int, until_s: float) -> None:
        """Open at most so many partial pipelines, those that may be faster than `until_s`."""
        for _ in range(most):
            if not self._open or self._open[0][0] >= min(self.beat_s, until_s):
                return
            bound_s, _, _, children, number = heapq.heappop(self._open)
            if isinstance(children, Pipeline):
                self._simulate(children, bound_s)
                continue
            self._add(children, number + 1)
            partial = children.child(number)
            if len(partial.stages) == children.form.count:
                self._replay(children.form, partial.stages, bound_s)
            else:
                self._opened += 1
                self.effort += 1 + len(partial.stages) / _DEEP
                found = children.form.children(partial)
                self._add(found)
                if self._opened % _DIVE_EVERY == 0:
                    self._dive(found)

    def _add(self, children: Children | None, number: int = 0) -> None:
        if children is not None and number < len(children.bounds_s):
            self._push(float(children.bounds_s[number]), len(children.partial.stages), children, number)

    def _push(self, bound_s: float, depth: int, what: Children | Pipeline, number: int) -> None:
        if bound_s >= self.beat_s:
            self._passed_s = min(self._passed_s, bound_s)
            return
        self._turn += 1
        heapq.heappush(self._open, (bound_s, -depth, self._turn, what, number))

    def _dive(self, children: Children | None) -> None:
        """Always the most promising next stage: a first time to beat."""
        while children is not None:
            bound_s = float(children.bounds_s[0])
            partial = children.child(0)
            if len(partial.stages) == children.form.count:
                self._replay(children.form, partial.stages, bound_s)
                return
            children = children.form.children(partial)

    def _replay(self, form: Form, stages: tuple[PlacedStage, ...], bound_s: float) -> None:
        """A whole pipeline: better known now, it waits for its turn to be simulated."""
        costs = [stage.cost for stage in stages]
        key = (form.schedule, form.microbatches, *((stage.group, stage.cost, stage.transfer_s) for stage in stages))
        if key in self._seen or not form.fits(costs):  # seen: other cuts between equal units
            return
        self._seen.add(key)
        self.effort += actions(form) / _REPLAYED
        least_s = SAFE * least_step_s(form, stages)
        pipeline = Pipeline(form.schedule, form.microbatches, form.groups, stages)
        if least_s < self._least_replay_s:
            self._least_replay_s = least_s
            self._simulate(pipeline, max(bound_s, least_s))
        else:
            self._push(max(bound_s, least_s), form.count, pipeline, 0)

    def _simulate(self, pipeline: Pipeline, bound_s: float) -> None:
        said = self.judge(pipeline)
        self.simulations += 1
        self.effort += 2 * len(pipeline.stages) * pipeline.microbatches / _SIMULATED
        assert said.step_s >= bound_s * (1 - 1e-9), f"simulated {said.step_s} s, below the bound {bound_s} s: {pipeline}"
        if said.step_s < self.best_s:
            self.best, self.said = pipeline, said

    def _improve(self) -> None:
        """A first time to beat: every form's evenest pipeline, and small changes to the best of them."""
        seeds: list[tuple[float, int, Form, Draft]] = []
        beat_s = math.inf
        for number, form in enumerate(self.forms):
            if found := seed(form, _WORSE * beat_s):
                beat_s = min(beat_s, found.step_s)
                seeds.append((found.step_s, number, form, found))
        for _, _, form, found in sorted(seeds)[:_IMPROVED]:
            better = improve(form, found)
            if better.step_s < self.best_s:
                self._simulate(Pipeline(form.schedule, form.microbatches, form.groups, better.stages), 0.0)

    def _why(self) -> str:
        """Why there is none."""
        if self.why and not self.forms:
            return self.why
        pricing = self.forms[0].pricing
        fewest = min(form.count for form in self.forms)
        if fewest > pricing.units:
            return f"{fewest} stages, and the model can be cut in {pricing.units}"
        least = min(form.least_bytes() for form in self.forms)
        if math.isinf(least):
            return "no stage can be run on such a group"
        if least <= pricing.limit_bytes:
            return f"none was found that fits in {size(pricing.limit_bytes)} a device"
        if size(least) == size(pricing.limit_bytes):
            return f"a device would hold {size(least - pricing.limit_bytes)} more than the {size(pricing.limit_bytes)} that it may hold"
        return f"a device would hold {size(least)} at least, and may hold {size(pricing.limit_bytes)}"
