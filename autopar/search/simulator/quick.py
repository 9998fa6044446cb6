"""The simulator for the inner loop of a search: stages as sums, links to themselves, no events.

    quick("1f1b", 4, stages, microbatches=32).step_s

Says what `autopar.search.simulator.simulate.run(as_workload(...))` says, to the last digit but rounding, in a fraction of the time: actions
are laid out once for each (schedule, groups, stages, microbatches) in an order in which each comes after what it needs, and one pass over
them adds up the times. That is exact as long as transfers do not share links and cost computing nothing; where they do, the simulator
proper is the judge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from autopar.ir.pipelining.schedules import named
from autopar.search.simulator.workload import Flow, Piece, Stage, Workload


@dataclass(frozen=True, slots=True)
class StageTime:
    """A stage in sums, on one rank. Of one microbatch: `forward_s`; `backward_s`, of which `weight_s` are gradients of weights;
    `receive_s` from the stage before and `returns_s` of gradients back to it. Once a step: `before_s` ahead of its first forward pass
    (with several groups from the start of the step on), `after_s` behind its last backward pass. `fixed_bytes` all the time, `live_bytes`
    for each microbatch between its forward and its backward pass, `workspace_bytes` while a forward pass or one for gradients of inputs
    runs."""

    forward_s: float
    backward_s: float
    weight_s: float = 0.0
    before_s: float = 0.0
    after_s: float = 0.0
    receive_s: float = 0.0
    returns_s: float = 0.0
    fixed_bytes: float = 0.0
    live_bytes: float = 0.0
    workspace_bytes: float = 0.0


class Quick(NamedTuple):
    """`bubble`: idle over computing time of all groups; `communication_s`: exposed within a group, of the group that has most;
    `memory_bytes`: peak by group."""

    step_s: float
    bubble: float
    communication_s: float
    memory_bytes: tuple[float, ...]


_WEIGHTS = 3  # position of the seconds of `W`; what passes there is what a backward pass keeps anyway


class _Action(NamedTuple):
    group: int
    stage: int
    what: int
    """Position of its seconds among those of a stage: forward, backward, input gradients, gradients of weights."""
    reads: int
    """Where the time stands at which what it reads from another stage is there; 0 always is 0."""
    writes: int
    """Where to note when the stage next to it has what it makes; -1 for nowhere."""
    stream: int
    """The stream that brings it there; -1 where that stage is on the same group."""
    sent: int
    """Position of the seconds of the transfer, among all stages' `receive_s` and then `returns_s`."""
    live: int
    """+1 where activations appear, -1 where they go."""
    end: int
    """+1 for a stage's first forward action, -1 for the last that makes gradients, else 0."""


class _Layout(NamedTuple):
    actions: tuple[_Action, ...]
    slots: int
    streams: int
    group_of: tuple[int, ...]


def quick(schedule: str, groups: int, stages: Sequence[StageTime], microbatches: int) -> Quick:
    """One step of `stages` in order. Raises `PlanError` where the schedule cannot have these numbers."""
    layout = _layout(schedule, groups, len(stages) // groups, microbatches)
    seconds = [(stage.forward_s, stage.backward_s, stage.backward_s - stage.weight_s, stage.weight_s) for stage in stages]
    moving = [stage.receive_s for stage in stages] + [stage.returns_s for stage in stages]
    sizes, passing = [stage.live_bytes for stage in stages], [stage.workspace_bytes for stage in stages]
    there = [0.0] * layout.slots
    stream = [0.0] * layout.streams
    clock, computed, idle, held, most, behind, gathered = ([0.0] * groups for _ in range(7))
    before = []  # by stage: when what is gathered once a step is there
    for one, group in zip(stages, layout.group_of, strict=True):
        gathered[group] += one.before_s
        before.append(gathered[group])
    for group, stage, what, reads, writes, channel, sent, live, end in layout.actions:
        now = clock[group]
        arrived = there[reads]
        if arrived > now:
            idle[group] += arrived - now
            now = arrived
        if end == 1:
            now = max(now, before[stage]) if groups > 1 else now + stages[stage].before_s
        took = seconds[stage][what]
        computed[group] += took
        clock[group] = now = now + took
        if writes >= 0:
            if channel >= 0:
                if stream[channel] > now:
                    now = stream[channel]
                stream[channel] = now = now + moving[sent]
            there[writes] = now
        if live > 0:
            held[group] += sizes[stage]
        if what != _WEIGHTS and held[group] + passing[stage] > most[group]:
            most[group] = held[group] + passing[stage]
        if live < 0:
            held[group] -= sizes[stage]
        if end == -1:
            behind[group] = max(behind[group], clock[group]) + stages[stage].after_s
    ends = [max(now, after) for now, after in zip(clock, behind, strict=True)]
    step_s = max(ends)
    waited = [idle[group] + step_s - ends[group] for group in range(groups)]
    for one, group in zip(stages, layout.group_of, strict=True):
        most[group] += one.fixed_bytes
    total = sum(computed)
    return Quick(
        step_s,
        sum(waited) / total if total else 0.0,
        max(step_s - waited[group] - computed[group] for group in range(groups)),
        tuple(most),
    )


@lru_cache(maxsize=256)
def _layout(schedule: str, groups: int, per_group: int, microbatches: int) -> _Layout:
    row = named(schedule)
    orders = row.orders(groups, per_group, microbatches)
    count = groups * per_group
    group_of = tuple(row.group_of(stage, groups) for stage in range(count))
    streams: dict[tuple[int, int], int] = {}
    position = [0] * groups
    done = {("F", -1, microbatch) for microbatch in range(microbatches)} | {("B", count, microbatch) for microbatch in range(microbatches)}
    last = {action.stage: action for order in orders for action in order if action.kind in "BW"}
    found: list[_Action] = []
    moved = True
    while moved:
        moved = False
        for group, order in enumerate(orders):
            while position[group] < len(order):
                action = order[position[group]]
                kind, stage, microbatch = action
                forward = kind == "F"
                if kind != "W" and (("F", stage - 1, microbatch) if forward else ("B", stage + 1, microbatch)) not in done:
                    break
                if kind != "W":
                    done.add(("F" if forward else "B", stage, microbatch))
                other = stage + 1 if forward else stage - 1
                hands_on = kind != "W" and 0 <= other < count
                # Slot 0 is time 0; then what forward passes read, then what backward passes read.
                slot = 1 + stage * microbatches + microbatch
                beyond = 1 + other * microbatches + microbatch
                back = count * microbatches
                reads = (
                    0 if kind == "W" or (forward and not stage) or (not forward and stage + 1 == count) else slot + (0 if forward else back)
                )
                pair = group, group_of[other] if hands_on else -1
                stream = streams.setdefault(pair, len(streams)) if hands_on and pair[0] != pair[1] else -1
                found.append(
                    _Action(
                        group, stage, "FBIW".index(kind), reads, beyond + (0 if forward else back) if hands_on else -1, stream,
                        other if forward else count + stage, (kind == "F") - (kind in "BW"),
                        1 if forward and microbatch == 0 else -1 if last[stage] == action else 0,
                    )
                )  # fmt: skip
                position[group] += 1
                moved = True
    return _Layout(tuple(found), 1 + 2 * count * microbatches, len(streams), group_of)


def as_workload(schedule: str, groups: int, stages: Sequence[StageTime], microbatches: int) -> Workload:
    """The same step for the simulator proper, which gives events and memory over time."""
    row = named(schedule)
    orders = row.orders(groups, len(stages) // groups, microbatches)
    found: list[Stage] = []
    for index, stage in enumerate(stages):
        group = row.group_of(index, groups)
        piece = Piece(
            f"stage {index}", stage.forward_s, stage.backward_s, stage.weight_s, step_gather=_flow("before", stage.before_s),
            reduce=_flow("after", stage.after_s), activation_bytes=stage.live_bytes, parameter_bytes=stage.fixed_bytes,
            workspace_bytes=stage.workspace_bytes, backward_workspace_bytes=stage.workspace_bytes,
            input_workspace_bytes=stage.workspace_bytes,
        )  # fmt: skip
        apart = found and found[-1].group != group
        receive, returns = (Flow(stage.receive_s), Flow(stage.returns_s)) if apart else (None, None)
        found.append(Stage(piece.name, group, (piece,), receive, returns))
    return Workload(tuple(found), orders)


def _flow(stream: str, seconds: float) -> tuple[Flow, ...]:
    return (Flow(seconds, (), stream),) if seconds else ()
