"""Which pipelines are worth solving: for every number of groups the stage search's best, unless a bound says that none can win.

The bound. Let `C` be the computing of one microbatch on one of `p` equal groups at the devices' best, all stages together: `p / m` of what
the whole batch takes at full speed on all devices, and every kernel's start once. Let stage `g` take `c_g` of it. Under `1f1b` and
`gpipe` a stage's first microbatch has passed all stages before it, and its last one goes back through them, so that a step takes at
least `c_0 + ... + c_(g-1) + m c_g`. However `C` is shared, the largest of these is at least

    C / (1 - (1 - 1/m)^p)

(all of them equal: each next stage a little smaller). Under other schedules some group computes at least `m C / p`.

What is looked at. A way to run the model is (groups, size of the inner axis, sequences of a microbatch on a rank);
`autopar.search.stages.guess`
says for each of them, in no time, about what a step takes. Of every number of groups the most promising ways are priced on their meshes
and go through the stage search, the number of groups that promises most first; of those that promise less than was found, only the first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from autopar.errors import PlanError
from autopar.ir.graph import Graph
from autopar.ir.pipelining.schedules import named
from autopar.ir.units import seconds
from autopar.search.pins import Pins
from autopar.search.simulator.quick import StageTime, quick
from autopar.search.stages.guess import Guess, Guesses
from autopar.search.stages.pipeline import Pipeline, op_seconds
from autopar.search.stages.place import Settings
from autopar.search.stages.stage_costs import Devices
from autopar.search.stages.stage_prices import StagePrices
from autopar.search.stages.stage_search import Pipeline as Candidate
from autopar.search.stages.stage_search import Row, Simulated, search_stages

FREE_SCHEDULES = ("1f1b", "interleaved-1f1b", "zbv", "interleaved-zb")
_WAITS_LESS = ("gpipe",)  # for slow links: no group waits for gradients between forward passes; on few ranks, for what it holds
_STAGES_PER_GROUP = 2  # of schedules that take any number
_MOST_GROUPS = 64
_TRIED, _TRIED_ON_MANY = 3, 2  # ways that are priced for each number of groups
_FEW_RANKS = 64
_HOPELESS = 1.05  # times the best so far: of groups that promise no better, one way and one schedule are looked at
_TOLERANCE = 0.02
_CLOSE = 1.1  # times the best so far, within which more stages a group are looked at too
_MOST_OPENED = 0  # what is proposed is solved again, better than its prices are, so that small changes to even pipelines will do
_SLACK = 1.05  # of memory: prices hold a little more than what is then solved
_ALWAYS_WAITS = ("1f1b", "gpipe")


@dataclass(frozen=True, slots=True)
class Proposal:
    """The best pipeline of `groups` groups by its prices, and what no such pipeline can beat; or `why` there is none."""

    groups: int
    bound_s: float
    pipeline: Pipeline | None = None
    simulated: Simulated | None = None
    why: str = ""

    @property
    def step_s(self) -> float:
        return self.simulated.step_s if self.simulated else math.inf


class Proposals:
    """Pipelines of `graph` on a cluster. `schedule`, `microbatches`: what is forced."""

    def __init__(self, graph: Graph, settings: Settings, pins: Pins, schedule: str | None = None, microbatches: int | None = None) -> None:
        self.settings = settings
        cluster = settings.cluster
        self.schedules = (schedule,) if schedule else FREE_SCHEDULES + (_WAITS_LESS if cluster.world_size <= _FEW_RANKS else ())
        tensor = [tp for tp in range(1, cluster.devices_per_node + 1) if cluster.devices_per_node % tp == 0]
        self.loose = replace(settings, limit_bytes=int(_SLACK * settings.limit_bytes))
        self.prices = StagePrices(graph, self.loose, pins, tensor)
        self.guesses = Guesses(self.prices, settings, schedule or "1f1b", microbatches)
        ideal = replace(settings, cluster=replace(cluster, device=replace(cluster.device, launch_s=0.0)))
        at_best_s, started_s = float(op_seconds(graph, ideal).sum()), float(op_seconds(graph, settings).sum())
        self.ideal_s, self.starts_s = at_best_s / cluster.world_size, started_s - at_best_s

    def groups(self) -> tuple[int, ...]:
        """Numbers of groups to try."""
        units = self.prices.units
        world, most = self.settings.cluster.world_size, min(_MOST_GROUPS, units if units <= _MOST_GROUPS else units // 2)
        return tuple(count for count in range(2, min(world, most) + 1) if world % count == 0)

    def bound_s(self, groups: int) -> float:
        """What no pipeline of so many equal groups can beat; see the module's docstring."""
        found = []
        for m in self.guesses.microbatches(groups):
            one_s = self.ideal_s * groups / m + self.starts_s
            waits = all(name in _ALWAYS_WAITS for name in self.schedules)
            found.append(one_s / (1 - (1 - 1 / m) ** groups) if waits else one_s * m / groups)
        return min(found, default=math.inf)

    @cached_property
    def least_s(self) -> float:
        """What no pipeline can beat."""
        return min((self.bound_s(groups) for groups in self.groups()), default=math.inf)

    def all(self, beat_s: float = math.inf) -> Iterator[Proposal]:
        """For every number of groups the best. Pipelines that are not even guessed to beat `beat_s` are not searched."""
        best_s, off = math.inf, math.inf
        tried = _TRIED if self.settings.cluster.world_size <= _FEW_RANKS else _TRIED_ON_MANY
        ways = {groups: self.guesses.best(groups) for groups in self.groups()}
        for groups, guesses in sorted(ways.items(), key=lambda item: item[1][0].step_s if item[1] else math.inf):
            bound_s = self.bound_s(groups)
            if not guesses:
                yield Proposal(groups, bound_s, why="the batch cannot be divided into microbatches")
            elif min(guess.hope_s for guess in guesses) >= beat_s:
                yield Proposal(groups, bound_s, why=f"not searched: cannot take less than {seconds(bound_s)}")
            elif bound_s >= best_s:
                yield Proposal(groups, bound_s, why=f"cannot take less than {seconds(bound_s)}")
            else:
                hopeful = best_s == math.inf or guesses[0].step_s * off < _HOPELESS * best_s
                schedules = self.schedules if hopeful else self.schedules[:1]
                found = self._best(groups, bound_s, guesses[: tried if hopeful else 1], schedules, best_s)
                best_s = min(best_s, found.step_s)
                off = min(off, found.step_s / guesses[0].step_s)
                yield found

    def _best(self, groups: int, bound_s: float, guesses: Sequence[Guess], schedules: Sequence[str], best_s: float) -> Proposal:
        """The best pipeline of so many groups."""
        size = self.settings.cluster.world_size // groups
        tensor: dict[int, list[int]] = {}
        for guess in guesses:
            tensor.setdefault(guess.microbatches, []).append(guess.tensor)
        for count, sizes in tensor.items():
            self.prices.only(size, count, sizes)
        row: Row | None = None
        why = ""
        for schedule in schedules:
            if row is not None and row.step_s >= _CLOSE * best_s:
                break
            try:
                found = self._search(groups, tuple(tensor), schedule)
            except PlanError as error:
                why = why or str(error)
                continue
            why = why or found.why
            if found.best is not None and (row is None or found.step_s < row.step_s):
                row, best_s = found, min(best_s, found.step_s)
            elif row is None and schedule in _ALWAYS_WAITS:
                break  # other schedules hold more
        if row is None or row.best is None or row.simulated is None:
            return Proposal(groups, bound_s, why=why or "no stage fits in memory")
        return Proposal(groups, bound_s, self._pipeline(row.best), row.simulated)

    def _search(self, groups: int, counts: Sequence[int], schedule: str) -> Row:
        cluster, wanted = self.settings.cluster, named(schedule).stages_per_group
        per_group = wanted or _STAGES_PER_GROUP
        self.prices.together = per_group
        return search_stages(
            self.prices, Devices(cluster.nodes, cluster.devices_per_node), limit_bytes=self.loose.limit_bytes, microbatches=counts,
            schedules=(schedule,), stages_per_group=(per_group,), groups=(groups,), simulate=judge, tolerance=_TOLERANCE,
            most_opened=_MOST_OPENED,
        ).rows[0]  # fmt: skip

    def _pipeline(self, found: Candidate) -> Pipeline:
        """Starts by name of operation are the same in the graph of every size of microbatch; see `StagePrices.in_body`."""
        meshes: list[tuple[int, int]] = []
        for group in range(found.groups):
            stages = [s for at, s in enumerate(found.stages) if named(found.schedule).group_of(at, found.groups) == group]
            choice = stages[0].cost.choice
            assert isinstance(choice, tuple)
            meshes.append((int(choice[0]), int(choice[1])))
        starts = tuple(self.prices.starts[stage.start] for stage in found.stages)
        return Pipeline(found.schedule, found.microbatches, self.prices.in_body(starts, found.microbatches), tuple(meshes))


def judge(candidate: Candidate) -> Simulated:
    """By the simulator for the inner loop."""
    stages = [
        StageTime(
            stage.cost.forward_s, stage.cost.backward_s, stage.cost.weight_s, stage.cost.before_s, stage.cost.after_s, *stage.transfer_s,
            stage.cost.fixed_bytes, stage.cost.live_bytes, stage.cost.workspace_bytes,
        )
        for stage in candidate.stages
    ]  # fmt: skip
    found = quick(candidate.schedule, candidate.groups, stages, candidate.microbatches)
    return Simulated(found.step_s, found.bubble, found.communication_s, found.memory_bytes)
