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
from dataclasses import dataclass
from typing import Literal

from autopar.errors import PlanError
from autopar.ir.units import size
from autopar.search.stage_bounds import Layer
from autopar.search.stage_costs import Devices, Group, Pipeline, PlacedStage, Policy, Simulated, StageCost, StageCosts
from autopar.search.stage_form import SAFE, Children, Form, Partial
from autopar.search.stage_improve import improve, seed
from autopar.search.stage_replay import replay_s
from autopar.search.stage_space import Pricing, Space

__all__ = ["Devices", "Group", "Pipeline", "PlacedStage", "Row", "Simulated", "StageCost", "StageCosts", "StageSearch", "search_stages"]

_FIRST_LOOK = 100  # partial pipelines opened for every number of groups
_IMPROVED = 2  # forms of every number of groups whose best pipeline is changed in small ways
_TURN = 200  # and then at a time, where it looks best


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
    most_opened: int = 20_000,
) -> StageSearch:
    """The pipeline with the least simulated step time whose memory fits, and the best for each number of groups.

    `microbatches`, `schedules`, `stages_per_group`, `groups`: what to try; combinations that a schedule cannot have are left out.
    `sizes`: groups of equal size, of any size, or of these sizes; together they have all devices. `policies`: which devices a group may
    get. `limit_bytes`: per device. `simulate`: from a candidate to its time, never less than the bounds. `tolerance`: stop where the
    bound proves that nothing is faster than the best by more than this share; 0.0 is exact, unless more than `most_opened` partial
    pipelines of one number of groups would have to be looked at. `lower_bound_s` is what has been proven, in all and in each row.
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
        races[-1].run(_FIRST_LOOK, math.inf)
    # Of numbers of groups that cannot win, the best so far will do.
    left = dict.fromkeys(races, most_opened)
    while True:
        beat_s = min((race.best_s for race in races), default=math.inf) * (1 - tolerance)
        hopeful = [race for race in races if left[race] > 0 and race.lower_bound_s < min(beat_s, race.beat_s)]
        if not hopeful:
            break
        race = min(hopeful, key=lambda race: race.lower_bound_s)
        left[race] -= max(1, race.run(min(_TURN, left[race]), beat_s))
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
        self._open: list[tuple[float, int, int, Children, int]] = []
        self._turn = 0
        self._passed_s = math.inf
        self._seen: set[Hashable] = set()
        self._improve()
        roots = [root for form in forms if (root := form.children(Partial((), 0)))]
        for root in sorted(roots, key=lambda root: float(root.bounds_s[0])):
            self._dive(root)

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

    def run(self, most: int, until_s: float) -> int:
        """Open at most so many partial pipelines, those that may be faster than `until_s`; returns how many."""
        for opened in range(most):
            if not self._open or self._open[0][0] >= min(self.beat_s, until_s):
                return opened
            bound_s, _, _, children, number = heapq.heappop(self._open)
            self._add(children, number + 1)
            partial = children.child(number)
            if len(partial.stages) == children.form.count:
                self._try_whole(children.form, partial, bound_s)
            else:
                self._add(children.form.children(partial))
        return most

    def _add(self, children: Children | None, number: int = 0) -> None:
        if children is None or number == len(children.bounds_s):
            return
        bound_s = float(children.bounds_s[number])
        if bound_s >= self.beat_s:
            self._passed_s = min(self._passed_s, bound_s)
            return
        self._turn += 1
        heapq.heappush(self._open, (bound_s, -len(children.partial.stages), self._turn, children, number))

    def _dive(self, children: Children | None) -> None:
        """Always the most promising next stage: a first time to beat. What is passed by stays to be looked at."""
        while children is not None:
            bound_s = float(children.bounds_s[0])
            if bound_s >= self.beat_s:
                self._add(children)
                return
            self._add(children, 1)
            partial = children.child(0)
            if len(partial.stages) == children.form.count:
                self._try_whole(children.form, partial, bound_s)
                return
            children = children.form.children(partial)

    def _try_whole(self, form: Form, partial: Partial, bound_s: float) -> None:
        if form.fits([stage.cost for stage in partial.stages]):
            self._look_at(form, partial.stages, bound_s)

    def _look_at(self, form: Form, stages: tuple[PlacedStage, ...], bound_s: float) -> None:
        key = (form, *((stage.group, stage.cost, stage.transfer_s) for stage in stages))
        if key in self._seen:  # other cuts between equal units
            return
        self._seen.add(key)
        least_s = SAFE * replay_s(
            form.schedule, form.groups, form.microbatches, [stage.cost for stage in stages], [stage.transfer_s for stage in stages]
        )
        if least_s >= self.beat_s:
            self._passed_s = min(self._passed_s, max(bound_s, least_s))
            return
        pipeline = Pipeline(form.schedule, form.microbatches, form.groups, stages)
        said = self.judge(pipeline)
        self.simulations += 1
        assert said.step_s >= max(least_s, bound_s) * (1 - 1e-9), f"simulated {said.step_s} s, below a bound {bound_s} s: {pipeline}"
        if said.step_s < self.best_s:
            self.best, self.said = pipeline, said

    def _improve(self) -> None:
        """A first time to beat: every form's evenest pipeline, and small changes to the best of them."""
        seeds = [(found.step_s, number, form, found) for number, form in enumerate(self.forms) if (found := seed(form))]
        for _, _, form, found in sorted(seeds)[:_IMPROVED]:
            self._look_at(form, improve(form, found).stages, 0.0)

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
        return f"a device would hold {size(least)} at least, and may hold {size(pricing.limit_bytes)}"
