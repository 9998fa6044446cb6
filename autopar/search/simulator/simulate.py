"""The simulator: what a step takes, on which stream, and where it waits.

    simulation = simulate(plan)
    simulation.step_s, simulation.bubble, simulation.peak_bytes

Each group of ranks has a stream that computes, one stream for each mesh axis that communicates, and one for what it sends to each other
group. All ranks of a group do the same, so one is simulated: 16,384 devices are as many groups as the plan has.

The computing stream runs the schedule's actions in order, an action its pieces one after the other (backward: last one first). It waits

* before a forward pass for the microbatch from the stage before, before a backward pass for gradients from the stage behind;
* for the collectives that computing needs (`forward_comm`, `backward_comm`), which go on their axis's stream behind what was issued there;
* before a piece for its gathered parameters: they are fetched while the piece before it computes. In a pipeline, what is gathered once
  a step is fetched from the start of the step on, in order, and so are the first parameters that a stage uses;
* before the optimizer for all gradients to be reduced: a piece's are issued once its last backward pass is over. In a pipeline those of
  a stage that another waits for are issued behind its whole last backward pass, as they are where gradients of weights are made apart;
  of the first stage's, what is reduced over a second axis is.

How streams slow each other down: `autopar.search.simulator.flows`. Memory over time: `autopar.search.simulator.timeline`.

What is said of a group adds up to the step: `compute_s` (forward, backward, recomputation), `optimizer_s`, `communication_s` (all that
computing waited for or lost to communication within its group) and `idle_s` (waiting for other groups). The *bubble* is
`idle_s / compute_s`. With equal stages and free transfers it is (p-1)/m for GPipe and 1F1B and (p-1)/(v m) interleaved, for p groups of
v stages and m microbatches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from autopar.ir.pipelining.schedules import Action
from autopar.ir.plan import Plan
from autopar.search.simulator import timeline
from autopar.search.simulator.flows import Tasks
from autopar.search.simulator.timeline import Memory
from autopar.search.simulator.workload import Flow, Piece, Stage, Workload, of_plan

EventKind = Literal["forward", "backward", "input", "weight", "recompute", "optimizer", "collective", "gather", "reduce", "transfer"]
_KIND: dict[str, EventKind] = {"F": "forward", "B": "backward", "I": "input", "W": "weight"}
MOST_PIECES_APART = 4_000
"""Pieces are tasks of their own up to this many; beyond, an action in which nothing but computing and blocking collectives happens is
one task of each kind. Its time is the same (but for who is in whose way within it), and the picture stays readable."""


class Event(NamedTuple):
    """What `stream` of `group` did from `start_s` to `end_s`. `stream`: `compute`, a mesh axis, or `to group 3`.

    `stage`, `microbatch`: -1 where it serves no single one.
    """

    group: int
    stream: str
    start_s: float
    end_s: float
    kind: EventKind
    label: str
    stage: int
    microbatch: int


@dataclass(frozen=True, slots=True)
class GroupTime:
    """Where the step of a group went; see the module's docstring."""

    compute_s: float
    optimizer_s: float
    communication_s: float
    idle_s: float

    @property
    def bubble(self) -> float:
        return self.idle_s / self.compute_s if self.compute_s else 0.0


@dataclass(frozen=True, slots=True)
class Simulation:
    """What `simulate` found. `groups`, `memory` and `ranks`: by group. `events`: in order of start."""

    step_s: float
    groups: tuple[GroupTime, ...]
    memory: tuple[Memory, ...]
    ranks: tuple[range, ...]
    events: tuple[Event, ...]

    @property
    def bubble(self) -> float:
        """Idle over computing time, of all groups together."""
        compute_s = sum(group.compute_s for group in self.groups)
        return sum(group.idle_s for group in self.groups) / compute_s if compute_s else 0.0

    @property
    def communication_s(self) -> float:
        """Exposed communication of the group that has most."""
        return max(group.communication_s for group in self.groups)

    @property
    def peak_bytes(self) -> tuple[float, ...]:
        """Largest memory of each group."""
        return tuple(memory.peak_bytes for memory in self.memory)


def simulate(plan: Plan) -> Simulation:
    """One training step of `plan`, from what the plan file says alone. Raises `PlanError` where its schedule cannot run."""
    return run(of_plan(plan))


def run(workload: Workload) -> Simulation:
    """One step of `workload`, with events and memory over time."""
    step = _Step(workload)
    step_s = step.tasks.run()
    spans = [[(step.tasks.start_s[first], step.tasks.end_s[last]) for first, last in spans] for spans in step.spans]
    memory = tuple(timeline.memory(workload, group, spans[group], step_s) for group in range(workload.groups))
    ranks = workload.ranks or tuple(range(group, group + 1) for group in range(workload.groups))
    return Simulation(step_s, step.times(step_s), memory, ranks, step.events())


class _Label(NamedTuple):
    stream: str
    kind: EventKind
    text: str
    stage: int
    microbatch: int


class _Step:
    """The tasks of a step. `spans`: by group and action, its first and its last task; `_compute`: what a group's computing waits for."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.tasks = Tasks(workload.felt_share)
        self.labels: dict[int, tuple[int, _Label]] = {}
        self.spans: list[list[tuple[int, int]]] = [[] for _ in workload.orders]
        self.arrivals: dict[int, int] = {}  # first task of an action -> the task that brings what it reads from another group
        self.thread: list[list[int]] = [[] for _ in workload.orders]  # by group, what its computing does or waits for, in order
        self._last: list[int] = [-1] * workload.groups
        self._stream: dict[tuple[int, str], int] = {}
        self._arrived: dict[tuple[str, int, int], int] = {}
        self._previous: dict[int, str] = {}  # by stage, the kind of its last action
        self._reduced: list[list[int]] = [[] for _ in workload.orders]
        total = workload.microbatches * sum(len(stage.pieces) for stage in workload.stages)
        self.apart = total <= MOST_PIECES_APART
        self._first: set[Action] = set()
        self._final: set[Action] = set()
        self._at_start: dict[tuple[int, int], int] = {}  # by stage and piece: what gathers for its first microbatch
        for order in workload.orders:
            stages = {action.stage for action in order}
            for stage in stages:
                forwards = [action for action in order if action.stage == stage and action.kind == "F"]
                gradients = [action for action in order if action.stage == stage and workload.stages[stage].does(action.kind) in ("B", "W")]
                self._first.add(forwards[0])
                self._final.add(gradients[-1])
        if workload.groups > 1:
            for number in range(len(workload.stages)):
                self._gather_at_start(number)
        self._lay()

    def _gather_at_start(self, number: int) -> None:
        """What a stage fetches before its first microbatch comes (`autopar.runtime.pipelining.pipeline_stage.LiveStage.begin`)."""
        stage = self.workload.stages[number]
        fetches = [index for index, piece in enumerate(stage.pieces) if piece.step_gather or piece.gather]
        for index in fetches:
            piece = stage.pieces[index]
            flows = piece.step_gather + (piece.gather if index == fetches[0] else ())
            task = self._async(stage.group, flows, (), "gather", Action("F", number, 0), piece.name)
            self._at_start[number, index] = task

    def _lay(self) -> None:
        """Actions in an order in which each comes after what it needs."""
        orders = self.workload.orders
        position = [0] * len(orders)
        moved = True
        while moved:
            moved = False
            for group, order in enumerate(orders):
                while position[group] < len(order) and self._can(order[position[group]]):
                    self._action(group, order[position[group]])
                    position[group] += 1
                    moved = True
        assert all(position[group] == len(order) for group, order in enumerate(orders)), "the schedule deadlocks; `check` it"
        for group in range(len(orders)):
            self._optimizer(group)

    def _can(self, action: Action) -> bool:
        kind, stage, microbatch = action
        if kind == "F":
            return stage == 0 or ("F", stage, microbatch) in self._arrived
        return kind == "W" or stage + 1 == len(self.workload.stages) or ("B", stage, microbatch) in self._arrived

    # ---- one action -------------------------------------------------------------------------------------------------------------

    def _action(self, group: int, action: Action) -> None:
        kind, number, microbatch = action
        stage = self.workload.stages[number]
        arrival = self._arrived.pop(("F" if kind == "F" else "B", number, microbatch), -1) if kind != "W" else -1
        start = len(self.thread[group])
        if kind == "F":
            self._forward(group, action, stage, arrival)
        else:
            self._backward(group, action, stage, arrival)
        self._previous[number] = kind
        mine = self.thread[group][start:]
        self.spans[group].append((mine[0], mine[-1]))
        if arrival >= 0:
            self.arrivals[mine[0]] = arrival
        if kind == "F" and number + 1 < len(self.workload.stages):
            after = self.workload.stages[number + 1]
            self._arrived["F", number + 1, microbatch] = self._send(group, after.group, after.receive, action)
        if kind in "BI" and number:
            before = self.workload.stages[number - 1]
            self._arrived["B", number - 1, microbatch] = self._send(group, before.group, stage.returns, action)

    def _forward(self, group: int, action: Action, stage: Stage, arrival: int) -> None:
        first = action in self._first
        ahead = [(piece.step_gather if first else ()) + piece.gather for piece in stage.pieces]
        there: list[int] = []
        if first and self.workload.groups > 1:
            there = [self._at_start.get((action.stage, index), -1) for index in range(len(ahead))]
            begun = next((index for index, task in enumerate(there) if task >= 0), -1)
            ahead = [() if index == begun else piece.gather for index, piece in enumerate(stage.pieces)]
        steps = [(piece, piece.forward_s, piece.forward_comm, "") for piece in stage.pieces]
        self._pieces(group, action, steps, ahead, arrival, there=there)

    def _backward(self, group: int, action: Action, stage: Stage, arrival: int) -> None:
        kind = stage.does(action.kind)
        steps: list[tuple[Piece, float, tuple[Flow, ...], str]] = []
        ahead: list[tuple[Flow, ...]] = []
        # What the forward pass gathered last is still there if nothing came between.
        still_there = self._previous.get(action.stage) == "F" and next((piece for piece in reversed(stage.pieces) if piece.gather), None)
        behind: list[tuple[Flow, ...]] = []
        for piece in reversed(stage.pieces) if kind else ():
            if kind == "W":
                steps.append((piece, piece.weight_s, (), ""))
                ahead.append(())
            else:
                regather = () if piece is still_there else piece.regather
                if piece.recompute:
                    steps.append((piece, piece.forward_s, piece.forward_comm, "recompute"))
                    ahead.append(regather)
                    behind.append(())
                seconds = piece.backward_s - (piece.weight_s if kind == "I" else 0.0)
                steps.append((piece, seconds, piece.backward_comm, ""))
                ahead.append(() if piece.recompute else regather)
            behind.append(piece.reduce if action in self._final else ())
        piped = self.workload.groups > 1
        begins = 0 if self.workload.splits or (piped and action.stage) else 1 if piped else None
        self._pieces(group, action, steps, ahead, arrival, behind, begins)

    def _pieces(
        self, group: int, action: Action, steps: Sequence[tuple[Piece, float, tuple[Flow, ...], str]], ahead: Sequence[tuple[Flow, ...]],
        arrival: int, behind: Sequence[tuple[Flow, ...]] = (), begins: int | None = None, there: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """Compute `steps`, (piece, seconds, collectives, what else it is), each with what goes ahead of it and what goes behind: the first
        `begins` flows (None: all) at once, the others when all steps are done. `there`: tasks that each waits for as well."""
        if not self.apart and not any(ahead) and not any(behind) and not any(task >= 0 for task in there):
            by_stream: dict[tuple[str, tuple[tuple[str, float], ...]], float] = {}
            for _, _, flows, _ in steps:
                for flow in flows:
                    by_stream[flow.stream, flow.links] = by_stream.get((flow.stream, flow.links), 0.0) + flow.seconds
            merged = tuple(Flow(seconds, links, stream) for (stream, links), seconds in by_stream.items())
            steps = [(steps[0][0], sum(seconds for _, seconds, _, _ in steps), merged, "")] if steps else []
            ahead = [()]
        waits: tuple[int, ...] = (self._last[group], arrival)
        reducing: list[tuple[Piece, tuple[Flow, ...], int]] = []  # what is left of `behind`, and what of it has begun
        fetched = [-1] * (len(steps) + 1)
        if steps:
            fetched[0] = self._async(group, ahead[0], waits, "gather", action, steps[0][0].name)
        for index, (piece, seconds, flows, what) in enumerate(steps):
            before: tuple[int, ...] = (*waits, fetched[index], *there[index : index + 1])
            kind: EventKind = "recompute" if what == "recompute" else _KIND[action.kind]
            if index + 1 < len(steps):
                fetched[index + 1] = self._async(group, ahead[index + 1], before, "gather", action, steps[index + 1][0].name)
            label = piece.name if self.apart and len(steps) > 1 else str(action)
            task = self.tasks.add(seconds, before, computes=group)
            self._name(task, group, "compute", kind, label, action.stage, action.microbatch)
            self.thread[group].append(task)
            for flow in flows:
                task = self._flow(group, flow, (task,), "collective", f"{label} {flow.stream}", action, felt_by=-1)
                self.thread[group].append(task)
            waits = (task,)
            self._last[group] = task
            if behind and behind[index]:
                begun = self._async(group, behind[index][:begins], (task,), "reduce", action, piece.name)
                reducing.append((piece, () if begins is None else behind[index][begins:], begun))
        for piece, flows, begun in reducing:
            self._async(group, flows, (self._last[group], begun), "reduce", action, piece.name)
        if not steps:  # a stage that only hands on
            task = self.tasks.add(0.0, waits, computes=group)
            self.thread[group].append(task)
            self._last[group] = task

    def _async(self, group: int, flows: tuple[Flow, ...], before: tuple[int, ...], kind: EventKind, action: Action, what: str) -> int:
        """Flows one after the other, beside computing; returns the last of them, or -1."""
        task = -1
        for index, flow in enumerate(flows):
            task = self._flow(group, flow, before if index == 0 else (task,), kind, f"{kind} {what}", action, felt_by=group)
        if kind == "reduce" and task >= 0:
            self._reduced[group].append(task)
        return task

    def _flow(self, group: int, flow: Flow, before: tuple[int, ...], kind: EventKind, label: str, action: Action, felt_by: int) -> int:
        key = group, flow.stream
        task = self.tasks.add(flow.seconds, (*before, self._stream.get(key, -1)), flow.links, felt_by=felt_by)
        self._stream[key] = task
        self._name(task, group, flow.stream, kind, label, action.stage, action.microbatch)
        return task

    def _send(self, group: int, other: int, flow: Flow | None, action: Action) -> int:
        """Hand on what `action` made to the stage next to it; returns the task after which it is there."""
        task = self._last[group]
        if flow is None or group == other:
            return task
        named = Flow(flow.seconds, flow.links, f"to group {other}")
        return self._flow(group, named, (task,), "transfer", str(action), action, felt_by=other)

    def _optimizer(self, group: int) -> None:
        seconds = sum(piece.optimizer_s for stage in self.workload.stages if stage.group == group for piece in stage.pieces)
        task = self.tasks.add(seconds, (self._last[group], *self._reduced[group]), computes=group)
        self._name(task, group, "compute", "optimizer", "optimizer", -1, -1)
        self.thread[group].append(task)

    def _name(self, task: int, group: int, stream: str, kind: EventKind, text: str, stage: int, microbatch: int) -> None:
        self.labels[task] = group, _Label(stream, kind, text, stage, microbatch)

    # ---- what came of it --------------------------------------------------------------------------------------------------------

    def times(self, step_s: float) -> tuple[GroupTime, ...]:
        """Where each group's step went, once the tasks have run."""
        return tuple(self._times(group, step_s) for group in range(self.workload.groups))

    def _times(self, group: int, step_s: float) -> GroupTime:
        start_s, end_s, work_s, computes = self.tasks.start_s, self.tasks.end_s, self.tasks.work_s, self.tasks.computes
        *thread, optimizer = self.thread[group]
        compute_s = communication_s = idle_s = now = 0.0
        for task in thread:
            if (gap := start_s[task] - now) > 0.0:
                arrival = self.arrivals.get(task, -1)
                waited = min(gap, max(0.0, end_s[arrival] - now)) if arrival >= 0 else 0.0
                idle_s += waited
                communication_s += gap - waited
            took = end_s[task] - start_s[task]
            computed = min(took, work_s[task]) if computes[task] >= 0 else 0.0
            compute_s += computed
            communication_s += took - computed
            now = end_s[task]
        communication_s += start_s[optimizer] - now
        idle_s += step_s - end_s[optimizer]
        return GroupTime(compute_s, end_s[optimizer] - start_s[optimizer], communication_s, idle_s)

    def events(self) -> tuple[Event, ...]:
        start_s, end_s = self.tasks.start_s, self.tasks.end_s
        found = [
            Event(group, label.stream, start_s[task], end_s[task], label.kind, label.text, label.stage, label.microbatch)
            for task, (group, label) in self.labels.items()
            if end_s[task] > start_s[task]
        ]
        return tuple(sorted(found, key=lambda event: (event.start_s, event.group)))
