"""The best pipeline: how many stages, where to cut, which devices, how many microbatches, which schedule, by simulated step time.

    search_stages(costs, Devices(2, 8), limit_bytes=16e9, microbatches=(1, 2, 4, 8), simulate=...) -> StageSearch

See `autopar.search.stage_costs` for what it is told (`StageCosts`, `StageCost`, `Group`, `Devices`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from autopar.search.stage_costs import Devices, Group, Policy, StageCost, StageCosts

__all__ = ["Devices", "Group", "Pipeline", "PlacedStage", "Row", "Simulated", "StageCost", "StageCosts", "StageSearch", "search_stages"]


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


@dataclass(frozen=True, slots=True)
class StageSearch:
    """`best` of all rows (None where nothing fits); no pipeline in the space searched is faster than `lower_bound_s`."""

    best: Row | None
    rows: tuple[Row, ...]
    lower_bound_s: float
    simulations: int

    @property
    def exact(self) -> bool:
        return self.best is not None and self.best.simulated is not None and self.best.simulated.step_s <= self.lower_bound_s * (1 + 1e-9)


def search_stages(
    costs: StageCosts,
    devices: Devices,
    *,
    limit_bytes: float,
    microbatches: Sequence[int],
    schedules: Sequence[str] = ("1f1b",),
    stages_per_group: Sequence[int] = (1,),
    groups: Sequence[int] | None = None,
    sizes: Literal["equal", "all"] | Sequence[int] = "equal",
    policies: tuple[Policy, ...] = ("append",),
    simulate: Callable[[Pipeline], Simulated] | None = None,
    tolerance: float = 0.0,
    most_simulations: int = 100_000,
) -> StageSearch:
    """The pipeline with the least simulated step time whose memory fits, and the best for each number of groups.

    `microbatches`, `schedules`, `stages_per_group`, `groups`: what to try (a schedule takes the stages per group that it can have).
    `sizes`: groups of equal size, or of these sizes in any mix; together they have all devices. `policies`: which devices a group may
    get. `limit_bytes`: per device. `tolerance`: stop improving where the bound proves the rest to be less than this share better;
    0.0 is exact. `simulate`: from a candidate to its time; by default `autopar.search.simulate`.
    """
    raise NotImplementedError
