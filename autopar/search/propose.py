"""Which pipelines are worth solving: for every number of groups the stage search's best, unless a bound says that none can win.

The bound. Let `C` be the computing of one microbatch on one of `p` equal groups at the devices' best, all stages together: `p / m` of what
the whole batch takes at full speed on all devices, and every kernel's start once. Let stage `g` take `c_g` of it. Under `1f1b` and
`gpipe` a stage's first microbatch has passed all stages before it, and its last one goes back through them, so that a step takes at
least `c_0 + ... + c_(g-1) + m c_g`. However `C` is shared, the largest of these is at least

    C / (1 - (1 - 1/m)^p)

(all of them equal: each next stage a little smaller). Under other schedules some group computes at least `m C / p`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from autopar.errors import PlanError
from autopar.ir.graph import Graph
from autopar.ir.schedules import named
from autopar.search.pins import Pins
from autopar.search.pipeline import Pipeline, op_seconds
from autopar.search.place import Settings
from autopar.search.quick import StageTime, quick
from autopar.search.stage_costs import Devices
from autopar.search.stage_prices import StagePrices
from autopar.search.stage_search import Pipeline as Candidate
from autopar.search.stage_search import Row, Simulated, search_stages

SCHEDULES = ("1f1b", "interleaved-1f1b")
_MOST_GROUPS = 64
_MOST_ACCUMULATED = 16
_WORSE = 2  # numbers of groups in a row that take longer, from which more are not tried
_TIMES_GROUPS = (8, 4)  # microbatches to try, in groups: bubbles of an eighth or a fourth
_FEW_RANKS = 64  # on more ranks only the first of these is tried
_TOLERANCE = 0.02
_CLOSE = 1.1  # times the best so far, within which more stages a group are looked at too
_MOST_OPENED = 20
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
        self.schedules = (schedule,) if schedule else SCHEDULES
        self.forced = microbatches
        tensor = [tp for tp in range(1, cluster.devices_per_node + 1) if cluster.devices_per_node % tp == 0]
        self.prices = StagePrices(graph, settings, pins, tensor)
        ideal = replace(settings, cluster=replace(cluster, device=replace(cluster.device, launch_s=0.0)))
        at_best_s, started_s = float(op_seconds(graph, ideal).sum()), float(op_seconds(graph, settings).sum())
        self.ideal_s, self.starts_s = at_best_s / cluster.world_size, started_s - at_best_s

    def groups(self) -> tuple[int, ...]:
        """Numbers of groups to try."""
        units = self.prices.units
        world, most = self.settings.cluster.world_size, min(_MOST_GROUPS, units if units <= _MOST_GROUPS else units // 2)
        return tuple(count for count in range(2, min(world, most) + 1) if world % count == 0)

    def microbatches(self, groups: int) -> tuple[int, ...]:
        """Numbers of microbatches to try with so many groups; none where the batch does not divide."""
        if self.forced is not None:
            return (self.forced,) if self.prices.divides(self.forced) else ()
        found: dict[int, None] = {}
        if groups == 1:
            counts = (2**power for power in range(1, _MOST_ACCUMULATED.bit_length()))
            return tuple(count for count in counts if self.prices.batch % count == 0 and self.prices.divides(count))
        for times in _TIMES_GROUPS if self.settings.cluster.world_size <= _FEW_RANKS else _TIMES_GROUPS[:1]:
            wanted = groups * times
            for count in sorted(range(max(2, groups), 2 * wanted), key=lambda count: (abs(count - wanted), count)):
                if self.prices.batch % count == 0 and self.prices.divides(count):
                    found[count] = None
                    break
        return tuple(found)

    def bound_s(self, groups: int, microbatches: Sequence[int]) -> float:
        """What no pipeline of so many equal groups can beat; see the module's docstring."""
        found = []
        for m in microbatches:
            one_s = self.ideal_s * groups / m + self.starts_s
            waits = all(name in _ALWAYS_WAITS for name in self.schedules)
            found.append(one_s / (1 - (1 - 1 / m) ** groups) if waits else one_s * m / groups)
        return min(found, default=math.inf)

    @cached_property
    def least_s(self) -> float:
        """What no pipeline can beat."""
        return min((self.bound_s(groups, self.microbatches(groups)) for groups in self.groups()), default=math.inf)

    def all(self, accumulate: bool) -> Iterator[Proposal]:
        """For every number of groups the best; of one group, which only accumulates gradients, if `accumulate`."""
        best_s, worse = math.inf, 0
        for groups in ((1,) if accumulate else ()) + self.groups():
            counts = self.microbatches(groups)
            bound_s = self.bound_s(groups, counts)
            if not counts:
                yield Proposal(groups, bound_s, why="the batch cannot be divided into microbatches")
                continue
            if bound_s >= best_s:
                yield Proposal(groups, bound_s, why=f"cannot take less than {bound_s:.4g} s")
                continue
            if worse >= _WORSE:
                yield Proposal(groups, bound_s, why="not looked at: fewer groups took longer and longer")
                continue
            try:
                row = self._accumulated(counts) if groups == 1 else self._search(groups, counts, self.schedules[:1], (1,))
                if groups > 1 and row.best is not None and len(self.schedules) > 1 and row.step_s < _CLOSE * best_s:
                    other = self._search(groups, counts, self.schedules[1:], (2,))
                    row = other if other.step_s < row.step_s else row
            except PlanError as error:
                yield Proposal(groups, bound_s, why=str(error))
                continue
            if row.best is None or row.simulated is None:
                yield Proposal(groups, bound_s, why=row.why or "no stage fits in memory")
                continue
            worse = worse + 1 if row.simulated.step_s > best_s else 0
            best_s = min(best_s, row.simulated.step_s)
            yield Proposal(groups, bound_s, self._pipeline(row.best), row.simulated)

    def _accumulated(self, counts: Sequence[int]) -> Row:
        """Without stages: more microbatches take less memory and more time, so the first that fit are the best but for what sharding less
        saves; tried until more of them cost more."""
        best: Row | None = None
        for count in counts:
            row = self._search(1, (count,), ("1f1b",), (1,))
            if best is not None and best.best is not None and row.step_s >= best.step_s:
                break
            best = row
        assert best is not None
        return best

    def _search(self, groups: int, counts: Sequence[int], schedules: Sequence[str], per_group: Sequence[int]) -> Row:
        cluster = self.settings.cluster
        if (wanted := named(schedules[0]).stages_per_group) is not None:
            per_group = (wanted,)
        return search_stages(
            self.prices, Devices(cluster.nodes, cluster.devices_per_node), limit_bytes=self.settings.limit_bytes, microbatches=counts,
            schedules=schedules, stages_per_group=per_group, groups=(groups,), simulate=judge, tolerance=_TOLERANCE,
            most_opened=_MOST_OPENED,
        ).rows[0]  # fmt: skip

    def _pipeline(self, found: Candidate) -> Pipeline:
        """Starts by name of operation are the same in the graph of every size of microbatch; see `Pipeline.at`."""
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
