"""What a step consists of: the simulator's input, plain data that plans, profiles and tests fill alike.

A `Stage` is a row of `Piece`s (repeats of layers, or one piece for all), on one group of ranks. All ranks of a group do the same at the
same time, so one stands for all of them. A `Flow` is communication: so many seconds if it had its links for itself.

`of_plan` reads all of this from a plan file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

from autopar.errors import PlanError
from autopar.ir import folded_names
from autopar.ir.graph import DTYPE_BYTES
from autopar.ir.pipelining.schedules import Kind, Orders, named
from autopar.ir.placement import Placement, local_shape, parse
from autopar.ir.plan import GroupPlan, Plan, SegmentCost, SegmentPlan, StagePlan
from autopar.search.prices.optimizers import OPTIMIZER_STATES

MOST_PIECES = 1_000_000
"""More repeats than any model has; a plan file that says more would fill the memory of whoever simulates it."""

Links = tuple[tuple[str, float], ...]
"""Ends of links that a flow occupies, and the share of each that it takes when it runs alone."""


@dataclass(frozen=True, slots=True)
class Flow:
    """Communication that takes `seconds` alone. Flows of one `stream` of a group run one after the other, as they were issued."""

    seconds: float
    links: Links = ()
    stream: str = ""


@dataclass(frozen=True, slots=True)
class Piece:
    """A repeat of layers on one rank; times and activations are of one microbatch.

    `backward_s` is the whole backward pass, of which `weight_s` are gradients of weights (`I` takes the difference, `W` takes `weight_s`).
    `forward_comm`, `backward_comm`: collectives that computing waits for. `gather`, `regather`: parameters, fetched ahead of each forward
    or backward pass; `step_gather`: ahead of the first forward pass only. `reduce`: gradients, behind the last backward pass.
    `recompute`: the backward pass runs the forward pass again. Bytes are those of `autopar.ir.plan.SegmentCost`.
    """

    name: str
    forward_s: float
    backward_s: float
    weight_s: float = 0.0
    forward_comm: tuple[Flow, ...] = ()
    backward_comm: tuple[Flow, ...] = ()
    gather: tuple[Flow, ...] = ()
    regather: tuple[Flow, ...] = ()
    step_gather: tuple[Flow, ...] = ()
    reduce: tuple[Flow, ...] = ()
    optimizer_s: float = 0.0
    recompute: bool = False
    activation_bytes: float = 0.0
    checkpoint_bytes: float = 0.0
    parameter_bytes: float = 0.0
    gradient_bytes: float = 0.0
    optimizer_bytes: float = 0.0
    gathered_bytes: float = 0.0
    workspace_bytes: float = 0.0
    backward_workspace_bytes: float = 0.0
    postponed_bytes: float = 0.0
    unreduced_bytes: float = 0.0
    message_bytes: float = 0.0
    scattered_bytes: float = 0.0
    input_workspace_bytes: float = 0.0
    unkept_bytes: float = 0.0
    sent_bytes: float = 0.0


@dataclass(frozen=True, slots=True)
class Stage:
    """`pieces` in forward order, on `group`. `receive`: one microbatch from the stage before; `returns`: its gradients back to that
    stage. Both None for the first stage and where the stage before is on the same group. `at_once`: where a schedule splits the backward
    pass, the action that does all of it nevertheless. `receives_bytes`: of one microbatch from the stage before, on one rank."""

    name: str
    group: int
    pieces: tuple[Piece, ...]
    receive: Flow | None = None
    returns: Flow | None = None
    at_once: Literal["", "I", "W"] = ""
    receives_bytes: float = 0.0

    def does(self, kind: Kind) -> Kind | Literal[""]:
        """What an action of `kind` does here: a stage that makes all gradients `at_once` has the whole backward pass there."""
        if not self.at_once or kind not in "IW":
            return kind
        return "B" if kind == self.at_once else ""


@dataclass(frozen=True, slots=True)
class Workload:
    """One step: `stages` in order, `orders` of actions by group (`autopar.ir.pipelining.schedules`).

    `felt_share`: of the time that a group communicates beside computing, so much is lost to its computing (`Device.felt_share`).
    `resident_bytes`: by group, held all the time beside parameters (inputs, buffers). `ranks`: by group, for labels.
    """

    stages: tuple[Stage, ...]
    orders: Orders
    felt_share: float = 0.0
    resident_bytes: tuple[float, ...] = ()
    ranks: tuple[range, ...] = ()

    @property
    def splits(self) -> bool:
        """Whether gradients of weights are made apart."""
        return any(action.kind == "W" for action in self.orders[0])

    @property
    def groups(self) -> int:
        return len(self.orders)

    @property
    def microbatches(self) -> int:
        return 1 + max(action.microbatch for action in self.orders[0])


def of_plan(plan: Plan) -> Workload:
    """The step that `plan` describes. Raises `PlanError` where its schedule cannot have its stages and microbatches."""
    groups = plan.groups
    if (repeats := sum(segment.count for segment in plan.segments)) > MOST_PIECES:
        raise PlanError(f"the segments of the plan have {repeats:,} repeats; more than {MOST_PIECES:,} cannot be simulated")
    if plan.pipeline is None:
        stages: Sequence[StagePlan] = (StagePlan(name="", start=0, stop=plan.model.operations, group=0),)
        orders = named("gpipe" if plan.microbatches == 1 else "1f1b").orders(1, 1, plan.microbatches)
    else:
        stages = plan.pipeline.stages
        if not stages or len(stages) % len(groups):
            raise PlanError(f"{len(stages)} stages cannot be laid on {len(groups)} groups evenly; give each group as many as the others")
        schedule = named(plan.pipeline.schedule)
        orders = schedule.orders(len(groups), len(stages) // len(groups), plan.microbatches)
        for index, stage in enumerate(stages):
            if stage.group != (right := schedule.group_of(index, len(groups))):
                raise PlanError(f"stage {index} is on group {stage.group}; schedule {schedule.name} has it on group {right}")
    splits = any(action.kind == "W" for action in orders[0])
    places = [_Place(plan, index, group) for index, group in enumerate(groups)]
    found = []
    for index, row in enumerate(stages):
        place = places[row.group]
        pieces = [piece for segment in plan.segments if segment.stage == index for piece in _pieces(segment, place)]
        at_once: Literal["", "I", "W"] = ""
        if splits:
            pieces = [_kept_for_step(piece) for piece in pieces]
            # What recomputes would do so for each part. The first stage receives nothing that has a gradient.
            at_once = "I" if any(piece.recompute for piece in pieces) else "W" if index == 0 else ""
        before = places[stages[index - 1].group] if index else place
        receive = returns = None
        if before is not place:
            receive, returns = before.to(place, row.receives_s), place.to(before, row.returns_s)
        found.append(Stage(row.name or f"stage {index}", row.group, tuple(pieces), receive, returns, at_once, row.receives_bytes))
    ranks = tuple(place.ranks for place in places)
    resident = list(map(float, plan.predicted.resident_bytes)) or [0.0] * len(groups)
    for group, size in _held_once(plan).items():
        resident[group] -= size
    return Workload(tuple(found), orders, plan.cluster.felt_share, tuple(resident), ranks)


def _kept_for_step(piece: Piece) -> Piece:
    """Where the backward pass is split, the runtime keeps gathered parameters for the step."""
    return replace(
        piece, gather=(), regather=(), step_gather=piece.step_gather + piece.gather, gathered_bytes=0.0,
        parameter_bytes=piece.parameter_bytes + piece.gathered_bytes,
    )  # fmt: skip


def _held_once(plan: Plan) -> dict[int, float]:
    """By group, bytes of parameters and optimizer state that several of its stages count, but which it holds once (tied weights). A stage
    that wants the parameter in another placement than the first has a copy of its own, without optimizer state."""
    if plan.pipeline is None:
        return {}
    found: dict[int, float] = {}
    first: dict[tuple[int, str], tuple[Placement, ...]] = {}
    states = OPTIMIZER_STATES.get(plan.predicted.optimizer, 0)
    for row in plan.parameters:
        group = plan.pipeline.stages[row.stage].group
        stored = tuple(parse(text) for text in row.stored.values())
        size = prod(local_shape(row.shape, stored, tuple(plan.groups[group].mesh.values()))) * DTYPE_BYTES[_stored_dtype(plan, row.dtype)]
        for name in folded_names.expand(row.name):
            if (known := first.setdefault((group, name), stored)) is not stored:
                found[group] = found.get(group, 0.0) + size * ((known == stored) + (states if row.trainable else 0))
    return found


def _stored_dtype(plan: Plan, dtype: str) -> str:
    return plan.precision.stored if plan.precision is not None and dtype == plan.precision.compute else dtype


def sizes_of(cost: SegmentCost) -> dict[str, Any]:
    """What a `Piece` and a `SegmentCost` say alike: all bytes."""
    return {name: getattr(cost, name) for name in Piece.__slots__ if name.endswith("_bytes")}


def _pieces(segment: SegmentPlan, place: _Place) -> list[Piece]:
    cost = segment.cost

    def flows(by_axis: Mapping[str, float]) -> tuple[Flow, ...]:
        return tuple(place.collective(axis, seconds) for axis, seconds in by_axis.items() if seconds > 0)

    def piece(repeat: int) -> Piece:
        return Piece(
            segment.name if segment.count == 1 else f"{segment.name} #{repeat}",
            cost.forward_s, cost.backward_s, min(cost.weight_s, cost.backward_s), flows(cost.forward_comm_s), flows(cost.backward_comm_s),
            flows(cost.gather_s), flows(cost.regather_s), flows(cost.step_gather_s), flows(cost.reduce_s), cost.optimizer_s,
            repeat < segment.recompute, **sizes_of(cost),
        )  # fmt: skip

    return [piece(repeat) for repeat in range(segment.count)]


class _Place:
    """Where a group lies: which links its collectives and transfers take.

    Every device has its own end of the link inside the machine and its own network card (`autopar.ir.cluster.Link`), so that ranks of
    one machine are in each other's way only where a collective borrows the cards of its neighbours: the ring of an axis that crosses
    machines runs over all cards of a machine (`autopar.search.prices.collectives.axes`), also where groups share it.
    """

    def __init__(self, plan: Plan, index: int, group: GroupPlan) -> None:
        self.index, self.mesh = index, group.mesh
        self.per_node = plan.cluster.devices_per_node
        self.ranks = range(group.first_rank, group.first_rank + prod(group.mesh.values()))
        self.nodes = range(self.ranks[0] // self.per_node, self.ranks[-1] // self.per_node + 1)

    def collective(self, axis: str, seconds: float) -> Flow:
        sizes = list(self.mesh.values())
        position = list(self.mesh).index(axis) if axis in self.mesh else 0
        block = prod(sizes[position:])
        crosses = any(at // self.per_node != (at + block - 1) // self.per_node for at in range(self.ranks[0], self.ranks[-1] + 1, block))
        if not crosses:
            return Flow(seconds, tuple((f"group {self.index} inside {way}", 1.0) for way in ("out", "in")), axis)
        links = [(f"group {self.index} {way}", 1.0) for way in ("out", "in")]
        links += [(f"node {node} {way}", 1.0) for node in self.nodes for way in ("out", "in")]
        return Flow(seconds, tuple(links), axis)

    def to(self, other: _Place, seconds: float) -> Flow:
        """One microbatch to `other`; where more ranks receive than send, each sender's link serves several."""
        fan = max(1.0, len(other.ranks) / len(self.ranks))
        if self.nodes[0] == self.nodes[-1] == other.nodes[0] == other.nodes[-1]:
            return Flow(seconds, ((f"group {self.index} inside out", fan), (f"group {other.index} inside in", 1.0)))
        links = [(f"group {self.index} out", fan), (f"group {other.index} in", 1.0)]
        links += [(f"node {node} out", fan * self._cards(node)) for node in self.nodes]
        links += [(f"node {node} in", other._cards(node)) for node in other.nodes]
        return Flow(seconds, tuple(links))

    def _cards(self, node: int) -> float:
        """The share of a machine's network cards that belong to the group's ranks."""
        first, last = node * self.per_node, (node + 1) * self.per_node
        return len(range(max(first, self.ranks[0]), min(last, self.ranks[-1] + 1))) / self.per_node
