"""What the stage search is told: devices in groups, what a stage costs on one, what goes from one to the next.

A model is a row of *units* (layers, or pieces between cut candidates); a stage is units `start` to `stop` (exclusive) on a `Group` of
devices. Whoever prices stages implements `StageCosts`: `autopar.search.stages.pipeline` from a graph, `benchmarks/dapple.py` from a
published profile. The search asks each question once and takes equal stages (`kind`, `Group.shape`) as priced alike.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

Policy = Literal["append", "fresh", "scatter"]
"""Which devices the next stage gets, as in DAPPLE (Fan et al. 2021, PPoPP, section 4.2): first what is left of machines in use
(`append`: ranks in order), first machines that nobody uses (`fresh`), or an equal share of every machine (`scatter`)."""


@dataclass(frozen=True)
class Group:
    """The devices of one stage: `devices` lists `(node, how many of its devices)` in node order. Nodes are alike, and so are the devices
    of a node. `first_rank`: where it starts when stages take ranks in order (`append` from the first stage on)."""

    devices: tuple[tuple[int, int], ...]
    first_rank: int = 0

    @cached_property
    def size(self) -> int:
        return sum(count for _, count in self.devices)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Devices by node, most first: what a stage's costs depend on."""
        return tuple(sorted((count for _, count in self.devices), reverse=True))

    def __str__(self) -> str:
        return "+".join(str(count) for count in self.shape) if len(self.shape) <= 4 else str(self.size)


@dataclass(frozen=True, slots=True)
class StageCost:
    """One way to run a stage on its group, on the rank that takes longest or holds most.

    Per microbatch: `forward_s`, and `backward_s` of which `weight_s` are gradients of weights, for which no other stage waits (schedules
    that split the backward pass run them later). Once a step: `before_s` ahead of the first forward pass (gathering parameters),
    `after_s` behind the last backward pass (reducing gradients, and the optimizer, which takes `optimizer_s` of it). `fixed_bytes` are
    held all the time, `live_bytes` for each microbatch between its forward and its backward pass, `workspace_bytes` for a moment.
    `choice` is the caller's own.
    """

    forward_s: float
    backward_s: float
    weight_s: float = 0.0
    before_s: float = 0.0
    after_s: float = 0.0
    fixed_bytes: float = 0.0
    live_bytes: float = 0.0
    workspace_bytes: float = 0.0
    choice: Hashable = None
    optimizer_s: float = 0.0


class StageCosts(Protocol):
    """Prices of stages. Every answer must be exact: what is searched for is the best under these numbers.

    One whose `options` do not depend on `live` may say so with an attribute `live_matters = False`: it is asked less often. One that can
    price all stages at once may have a method `grid(group, microbatches, live)`: see `autopar.search.stages.stage_prices`.
    """

    @property
    def units(self) -> int:
        """How many units there are; cuts lie between them."""

    def kind(self, unit: int) -> Hashable:
        """Equal for units that cost the same: stages with equal kinds in order, on groups of one shape, are asked for once."""

    def options(self, start: int, stop: int, group: Group, microbatches: int, live: int) -> tuple[StageCost, ...]:
        """The ways to run units `start` to `stop` on `group` that are worth looking at, or none where it cannot be done.

        `microbatches`: parts of the global batch; times and bytes are for one of them. `live`: of how many of them the stage holds
        activations at most, under the schedule in question. The search checks `fixed + live * live_bytes + workspace` against its
        limit itself; one option (the fastest that fits) is enough, several let it choose between time and memory.
        """

    def transfer(self, cut: int, sender: Group, receiver: Group, microbatches: int) -> tuple[float, float]:
        """Seconds for one microbatch from the stage that ends before unit `cut` to the one that starts there, and for its gradients back.

        Between two stages microbatches go one after the other. The answer must not depend on which nodes these are, only on how the two
        groups lie to each other (moved along by whole nodes: the same).
        """


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


@dataclass(frozen=True)
class Devices:
    """`nodes` machines with `per_node` devices each."""

    nodes: int
    per_node: int

    @property
    def count(self) -> int:
        return self.nodes * self.per_node

    def take(self, used: tuple[int, ...], count: int, policy: Policy) -> tuple[Group, tuple[int, ...]]:
        """The next `count` devices by `policy` where `used[node]` are taken, and what is used then."""
        after = list(used)
        if policy == "scatter":
            left = count
            while left:
                for node in [node for node in range(self.nodes) if after[node] < self.per_node][:left]:
                    after[node] += 1
                    left -= 1
        else:
            partly = [node for node in range(self.nodes) if 0 < used[node] < self.per_node]
            unused = [node for node in range(self.nodes) if not used[node]]
            left = count
            for node in partly + unused if policy == "append" else unused + partly:
                taken = min(left, self.per_node - used[node])
                after[node] += taken
                left -= taken
        assert left == 0, "more devices taken than there are"
        devices = tuple((node, after[node] - used[node]) for node in range(self.nodes) if after[node] > used[node])
        return Group(devices, sum(used)), tuple(after)

    def choices(self, used: tuple[int, ...], count: int, policies: tuple[Policy, ...]) -> Iterator[tuple[Group, tuple[int, ...]]]:
        """What the policies give, each different group once."""
        seen = set()
        for policy in policies:
            group, after = self.take(used, count, policy)
            if group.devices not in seen:
                seen.add(group.devices)
                yield group, after
