"""What a plan with stages says, gathered for reading: the stages, what crosses from one to the next, recomputation, the candidates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby

from autopar.ir import units
from autopar.ir.folded_names import first, pattern
from autopar.ir.plan import Candidate, GroupPlan, OpPlan, Plan, SegmentPlan

RECEIVE, SEND = "autopar.receive", "autopar.send"


def ranks_words(group: GroupPlan) -> str:
    """`0-3`, or `4` for one rank."""
    size = math.prod(group.mesh.values())
    return str(group.first_rank) if size == 1 else f"{group.first_rank}-{group.first_rank + size - 1}"


def sizes_words(mesh: dict[str, int]) -> str:
    """`dp 2 x tp 4`; axes of one rank are left out, `one rank` where that is all."""
    return " x ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1) or "one rank"


def numbers_words(noun: str, numbers: list[int]) -> str:
    """`stage 1`, `stages 0-2, 4`. `numbers` ascend."""
    if len(numbers) == 1:
        return f"{noun} {numbers[0]}"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return f"{noun}s " + ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


@dataclass(frozen=True, slots=True)
class StageRow:
    """One stage: `forward_s` and `backward_s` are of one microbatch, with the collectives that computing waits for and with what is
    computed again. `recomputed` of `repeats` of its layers compute their forward pass twice. `memory_bytes`: peak of its ranks, where the
    plan says it. `sends`: names of the values that go to the next stage, `sends_bytes` of one microbatch in `transfer_s`."""

    number: int
    name: str
    group: int
    ranks: str
    mesh: str
    forward_s: float
    backward_s: float
    recomputed: int
    repeats: int
    memory_bytes: int | None
    sends: tuple[str, ...]
    sends_bytes: int
    transfer_s: float


def stage_rows(plan: Plan) -> list[StageRow]:
    """One row a stage, in order; none without a pipeline."""
    if plan.pipeline is None:
        return []
    by_stage = segments_by_stage(plan)
    rows = []
    for number, stage in enumerate(plan.pipeline.stages):
        group, segments = plan.groups[stage.group], by_stage.get(number, [])
        following = plan.pipeline.stages[number + 1] if number + 1 < len(plan.pipeline.stages) else None
        repeated = [segment for segment in segments if segment.count > 1 or segment.recompute]
        forward_s, backward_s = stage_seconds(segments)
        memory = plan.predicted.stage_memory_bytes
        rows.append(
            StageRow(
                number=number,
                name=stage.name,
                group=stage.group,
                ranks=ranks_words(group),
                mesh=sizes_words(group.mesh),
                forward_s=forward_s,
                backward_s=backward_s,
                recomputed=sum(segment.recompute for segment in repeated),
                repeats=sum(segment.count for segment in repeated),
                memory_bytes=memory[stage.group] if memory else None,
                sends=tuple(_value(op) for segment in segments for op in segment.ops if op.target == SEND),
                sends_bytes=stage.sends_bytes,
                transfer_s=following.receives_s if following else 0.0,
            )
        )
    return rows


FEW_STAGES = 12
"""So many are told one by one; of more, those that are alike and follow each other are told in one row."""


def alike_stages(rows: list[StageRow], full: bool = False) -> list[list[StageRow]]:
    """`rows` in runs to be told together: as long, on groups of ranks in their order, and sending as much. `full`: each alone."""
    runs: list[list[StageRow]] = []
    for row in rows:
        last = runs[-1] if runs else []
        step = row.group - last[-1].group if last else 0
        joins = len(rows) > FEW_STAGES and not full and abs(step) == 1 and _told(row) == _told(last[-1])
        if joins and (len(last) < 2 or last[-1].group - last[-2].group == step):
            last.append(row)
        else:
            runs.append([row])
    return runs


def _told(row: StageRow) -> tuple[object, ...]:
    """What stages told in one row have in common."""
    seconds = (row.forward_s, row.backward_s, row.transfer_s)
    return (*map(units.seconds, seconds), row.mesh, row.recomputed, row.repeats, row.sends_bytes)


def segments_by_stage(plan: Plan) -> dict[int, list[SegmentPlan]]:
    return {stage: list(found) for stage, found in groupby(plan.segments, key=lambda segment: segment.stage)}


def stage_seconds(segments: list[SegmentPlan]) -> tuple[float, float]:
    """Forward and backward time of one microbatch: computing, what it waits for, and in the backward pass what is computed again."""
    forward = backward = 0.0
    for segment in segments:
        cost = segment.cost
        once = cost.forward_s + sum(cost.forward_comm_s.values())
        forward += segment.count * once
        backward += segment.count * (cost.backward_s + sum(cost.backward_comm_s.values())) + segment.recompute * once
    return forward, backward


def _value(op: OpPlan) -> str:
    """The value that a `receive_x` or `send_x` is of."""
    return op.name.removeprefix("receive_").removeprefix("send_")


@dataclass(frozen=True, slots=True)
class Crossing:
    """A value that a cut has to send: made in `stages[0]` by an operation of `module`, read in `stages[-1]`, handed on by those between."""

    value: str
    module: str
    stages: tuple[int, ...]


def crossings(plan: Plan) -> list[Crossing]:
    """Every value that goes from one stage to others, in the order of the stages that make them."""
    made: list[tuple[str, str, list[int]]] = []
    travelling: dict[str, list[int]] = {}
    for stage, segments in sorted(segments_by_stage(plan).items()):
        ops = [op for segment in segments for op in segment.ops]
        received = {_value(op) for op in ops if op.target == RECEIVE}
        for value in received & travelling.keys():
            travelling[value].append(stage)
        for op in ops:
            if op.target == SEND and (value := _value(op)) not in received:
                travelling[value] = [stage]
                made.append((value, _maker(value, segments), travelling[value]))
    return [Crossing(value, module, tuple(stages)) for value, module, stages in made]


def _maker(value: str, segments: list[SegmentPlan]) -> str:
    """The module of the operation that makes `value`, as far as the plan lists it: of repeats it lists the first, and all are named."""
    listed = [(segment, op) for segment in segments for op in segment.ops if op.target not in (RECEIVE, SEND)]
    for _, op in listed:
        if op.name == value:
            return op.module
    for segment, op in reversed(listed):
        if segment.count > 1 and pattern(op.name) == pattern(value):
            return ranged(op.module, segment)
    return ""


def ranged(module: str, segment: SegmentPlan) -> str:
    """`module` with the range of its segment's name in the place of the first repeat's number."""
    start = first(segment.name)
    return segment.name + module[len(start) :] if module == start or module.startswith(start + ".") else module


def crossing_words(item: Crossing) -> str:
    """`add_14 of model.layers.3: made in stage 0 and needed up to stage 2; stage 1 hands it on`."""
    last, between = item.stages[-1], list(item.stages[1:-1])
    words = f"made in stage {item.stages[0]}"
    if len(item.stages) > 1:
        words += f" and {'needed up to' if between else 'read in'} stage {last}"
    if between:
        words += f"; {numbers_words('stage', between)} {'hands' if len(between) == 1 else 'hand'} it on"
    return f"{item.value}{f' of {item.module}' if item.module else ''}: {words}"


def recompute_words(plan: Plan) -> str:
    """`12 of 32 model.layers.{0-31}`, per segment that recomputes; under a pipeline, whose stages say it each, in all."""
    found = [item for item in plan.segments if item.recompute]
    if plan.pipeline is None or not found:
        return ", ".join(f"{item.recompute} of {item.count} {item.name}" for item in found)
    rows = stage_rows(plan)
    return f"{sum(row.recomputed for row in rows)} of {sum(row.repeats for row in rows)} repeats"


def schedule_words(plan: Plan) -> str:
    """`1f1b: 4 stages on 4 groups of ranks, 8 microbatches`."""
    assert plan.pipeline is not None
    stages, groups = len(plan.pipeline.stages), len(plan.pipeline.groups)
    each = f", {stages // groups} on each" if stages > groups and stages % groups == 0 else ""
    return (
        f"{plan.pipeline.schedule}: {units.times(stages, 'stage')} on {units.times(groups, 'group')} of ranks{each}, "
        f"{_microbatches(plan.microbatches)}"
    )


def _microbatches(count: int) -> str:
    return f"{count:,} microbatch" if count == 1 else f"{count:,} microbatches"


def accumulation_words(plan: Plan) -> str:
    """`8 microbatches, one after the other: their gradients add up, and are reduced once`; empty where the batch is not cut."""
    return f"{_microbatches(plan.microbatches)} a step, whose gradients add up" if plan.microbatches > 1 else ""


def is_chosen(plan: Plan, item: Candidate) -> bool:
    """Whether `plan` is this candidate."""
    return item.cost_s is not None and item.groups == len(plan.groups)


def candidate_words(plan: Plan, item: Candidate) -> str:
    """What is to say of a candidate besides its numbers: that it is the plan, why there is none, or by how much it is slower."""
    if is_chosen(plan, item):
        return "chosen" + (f"; {item.why}" if item.why else "")
    if item.cost_s is None:
        return item.why or "none"
    words = []
    if item.memory_bytes is not None and item.memory_bytes > plan.predicted.memory_limit_bytes:
        words.append("does not fit")
    if plan.cost_s > 0 and abs(change := item.cost_s / plan.cost_s - 1) >= 1e-4:
        words.append(f"{units.percent(abs(change))} {'slower' if change > 0 else 'faster'}")
    return "; ".join([*words, *([item.why] if item.why else [])])
