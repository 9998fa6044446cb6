"""What a plan decides, unfolded: the `Split`s of every operation and the storage of every parameter, per mesh axis.

`expand_stages`, for every plan, and `expand`, for those without stages and microbatches, are the only doors from a plan file to anything
that runs: what they let through is sound for the graph at hand. They check the decisions alone; the prices in a plan are for the reader.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches

from autopar.errors import PlanError, PlanMismatchError
from autopar.ir import folded_names, units
from autopar.ir.conversion import State
from autopar.ir.experts import with_capacity
from autopar.ir.graph import Graph, Op
from autopar.ir.pipelining import schedules
from autopar.ir.pipelining.microbatch import Microbatched, microbatched
from autopar.ir.pipelining.stages import Stage, cut, is_loss
from autopar.ir.placement import Placement, R, parse
from autopar.ir.plan import OpPlan, ParameterPlan, PipelinePlan, Plan, SegmentPlan
from autopar.ir.rules import splits
from autopar.ir.rules.split import Split

Choice = tuple[Split, ...]
"""One split per mesh axis."""


@dataclass(frozen=True, slots=True)
class Storage:
    """Where a parameter lives: `stored` per axis, and `gather`: `"never"`, `"step"` or `"use"` (see `ParameterPlan`)."""

    stored: State
    gather: str


@dataclass(frozen=True, slots=True)
class Assignment:
    """`axes` and `mesh` (sizes) in mesh order; `choices` by operation name; `storage` by fully-qualified parameter name."""

    axes: tuple[str, ...]
    mesh: tuple[int, ...]
    choices: dict[str, Choice]
    storage: dict[str, Storage]

    def operand_states(self, op: Op) -> tuple[State, ...]:
        """The state in which `op` wants each of `op.operands`."""
        choice = self.choices[op.name]
        return tuple(tuple(split.inputs[slot] for split in choice) for slot in range(len(op.operands)))

    def output_states(self, op: Op) -> tuple[State, ...]:
        """The state in which `op` leaves each of `op.outputs`."""
        choice = self.choices[op.name]
        return tuple(tuple(split.outputs[slot] for split in choice) for slot in range(len(op.outputs)))

    def states(self, graph: Graph) -> dict[str, State]:
        """The state in which every value is defined: operations' results as computed, parameters as stored, all else whole."""
        whole = (R,) * len(self.mesh)
        found: dict[str, State] = dict.fromkeys(graph.source_kind, whole)
        found |= {item.value: self.storage[item.fqn].stored for item in graph.parameters}
        for op in graph.ops:
            found |= zip(op.outputs, self.output_states(op), strict=True)
        return found


@dataclass(frozen=True, slots=True)
class Expanded:
    """What a plan decides for a graph: the body of one microbatch in `microbatched`, its `stages` (one without a pipeline), and for each
    the `assignments` on the mesh of its group."""

    microbatched: Microbatched
    stages: tuple[Stage, ...]
    assignments: tuple[Assignment, ...]


def expand(plan: Plan, graph: Graph) -> Assignment:
    """The decisions of `plan`, which has no pipeline and one microbatch, for every operation and parameter of `graph`.

    Raises `PlanMismatchError` where the plan was made for another graph, and `PlanError` naming the place where it was edited into
    something that cannot run: unknown split names or axes, sizes that do not divide, placements that conflict, names twice or not at all.
    """
    if plan.pipeline is not None or plan.microbatches > 1:
        raise PlanError("the plan has microbatches or stages; its decisions are for their graphs, see `expand_stages`")
    return expand_stages(plan, graph).assignments[0]


def expand_stages(plan: Plan, graph: Graph) -> Expanded:
    """The decisions of `plan`, any plan, for every operation and parameter of every stage of `graph`.

    Raises as `expand` does, and `PlanError` where the batch cannot be divided as the plan says, where the stages do not tile the
    operations of one microbatch or lie on other groups of ranks than the schedule puts them on, and where rows are for no stage.
    """
    graph = with_capacity(graph, plan.expert_capacity)
    _check_model(plan, graph)
    if graph.rules != (rules := plan.given_rules):
        graph = replace(graph, rules=rules)
    parts = microbatched(graph, plan.microbatches)
    body = parts.body
    meshes = [plan.mesh]
    starts: tuple[int, ...] = (0,)
    if plan.pipeline is not None:
        _check_pipeline(plan.pipeline, plan.microbatches, body)
        meshes = [plan.pipeline.groups[stage.group].mesh for stage in plan.pipeline.stages]
        starts = tuple(stage.start for stage in plan.pipeline.stages)
    count = len(starts)
    for kind, name, number in (
        *(("segment", item.name, item.stage) for item in plan.segments),
        *(("parameter", item.name, item.stage) for item in plan.parameters),
    ):
        if number >= count:
            raise PlanError(f"{kind} `{name}` is for stage {number}, but the plan has {count} stage{'s' * (count > 1)}, counted from 0")
    stages = cut(body, starts)
    assignments = []
    for stage, mesh in zip(stages, meshes, strict=True):
        if not 1 <= len(mesh) <= 2:
            raise PlanError(f"mesh {dict(mesh)} has {len(mesh)} axes; a plan has one or two{', besides pp,' if count > 1 else ''}")
        segments = [item for item in plan.segments if item.stage == stage.index]
        rows = [item for item in plan.parameters if item.stage == stage.index]
        axes, sizes = tuple(mesh), tuple(mesh.values())
        choices = _choices(segments, stage, axes, sizes)
        assignments.append(Assignment(axes, sizes, choices, _storage(rows, stage, axes)))
    return Expanded(parts, stages, tuple(assignments))


def _check_model(plan: Plan, graph: Graph) -> None:
    if plan.model.fingerprint != graph.fingerprint():
        numel = sum(graph.values[item.value].numel for item in graph.parameters)
        raise PlanMismatchError(
            f"the plan is for `{plan.model.name}` ({plan.model.operations} operations, {plan.model.parameters} parameters, "
            f"{'training' if plan.model.training else 'evaluation'} mode, fingerprint {plan.model.fingerprint[:12]}), but the model given "
            f"is `{graph.name}` ({len(graph.ops)} operations, {numel} parameters, "
            f"{'training' if graph.training else 'evaluation'} mode, fingerprint {graph.fingerprint()[:12]}): "
            f"same code, configuration, input shapes and mode are needed{_other_inputs(plan, graph)}; plan again for this model"
        )


def _other_inputs(plan: Plan, graph: Graph) -> str:
    """`; input `x` is 32 x 8 int64 in the plan and 16 x 8 int64 here`, for the first input that differs."""
    planned = {item.path: f"{units.shape(item.shape)} {item.dtype}" for item in plan.inputs}
    given = {item.path: f"{units.shape(graph.values[item.value].shape)} {graph.values[item.value].dtype}" for item in graph.inputs}
    path = next((path for path in [*planned, *given] if planned.get(path) != given.get(path)), None)
    return (
        "" if path is None else f"; input `{path}` is {planned.get(path, 'not there')} in the plan and {given.get(path, 'not there')} here"
    )


def _check_pipeline(pipeline: PipelinePlan, microbatches: int, body: Graph) -> None:
    """Groups in rank order; stages that tile the body's operations, each on the group where the schedule runs it; a loss to start from."""
    schedule, groups, stages = schedules.named(pipeline.schedule), len(pipeline.groups), len(pipeline.stages)
    if not groups or not stages or stages % groups:
        raise PlanError(f"{stages} stages on {groups} groups of ranks: every group runs equally many, at least one")
    schedule.orders(groups, stages // groups, microbatches)
    rank = 0
    for number, group in enumerate(pipeline.groups):
        if group.first_rank != rank:
            raise PlanError(
                f"group {number} starts at rank {group.first_rank}; the groups before it end at {rank}, and groups follow each other"
            )
        rank += math.prod(group.mesh.values())
    position = 0
    for number, stage in enumerate(pipeline.stages):
        if stage.start != position or stage.stop <= stage.start or stage.stop > len(body.ops):
            raise PlanError(
                f"stage {number} (`{stage.name}`) says start {stage.start} and stop {stage.stop}; it must start at {position}, "
                f"hold an operation and end by {len(body.ops)}, the number of operations of one microbatch"
            )
        position = stage.stop
        if stage.group != (group_number := schedule.group_of(number, groups)):
            raise PlanError(
                f"stage {number} (`{stage.name}`) is on group {stage.group}, but schedule {schedule.name} runs it on {group_number}"
            )
    if position != len(body.ops):
        raise PlanError(f"the stages end at operation {position}, but one microbatch has {len(body.ops)}; the last stage ends there")
    if stages > 1 and not any(is_loss(body.values[item.value]) for item in body.outputs):
        raise PlanError(
            "a pipeline needs a model that returns its loss (a floating-point scalar), because its last stage starts the backward pass; "
            "return the loss from `forward`, or plan without stages"
        )


def _choices(segments: Sequence[SegmentPlan], stage: Stage, axes: tuple[str, ...], mesh: tuple[int, ...]) -> dict[str, Choice]:
    found: dict[str, Choice] = {}
    position = 0
    graph = stage.graph
    for segment in segments:
        position = _segment_end(segment, position, graph)
        for offset, row in enumerate(segment.ops):
            checked: dict[tuple[object, ...], Choice] = {}
            for repeat in range(segment.count):
                op = graph.ops[segment.start + repeat * segment.length + offset]
                if op.target != row.target or (repeat == 0 and op.name != row.name):
                    raise PlanMismatchError(
                        f"segment `{segment.name}`{_of(stage)}, repeat {repeat}: the plan has `{row.name}` ({row.target}) where the model "
                        f"has `{op.name}` ({op.target}); plan again for this model"
                    )
                options = splits(graph, op)
                key = (id(options), *(graph.values[name].shape for name in (*op.operands, *op.outputs)))
                if key not in checked:
                    checked[key] = _choice(row, op, options, graph, axes, mesh)
                found[op.name] = checked[key]
    if position != len(graph.ops):
        has = f"stage {stage.index}" if stage.count > 1 else "the model"
        raise PlanError(f"the segments{_of(stage)} end at operation {position}, but {has} has {len(graph.ops)}")
    return found


def _of(stage: Stage) -> str:
    """` of stage 1`, where there are several."""
    return f" of stage {stage.index}" if stage.count > 1 else ""


def _segment_end(segment: SegmentPlan, position: int, graph: Graph) -> int:
    end = segment.start + segment.length * segment.count
    if segment.start != position or end > len(graph.ops) or len(segment.ops) != segment.length:
        raise PlanError(
            f"segment `{segment.name}` says start {segment.start}, length {segment.length}, count {segment.count} with {len(segment.ops)} "
            f"operations listed; it must start at {position}, list `length` operations and end by {len(graph.ops)}"
        )
    if segment.recompute > segment.count:
        raise PlanError(f"segment `{segment.name}` recomputes {segment.recompute} of its {segment.count} repeats; at most all")
    return end


def _choice(row: OpPlan, op: Op, options: tuple[Split, ...], graph: Graph, axes: tuple[str, ...], mesh: tuple[int, ...]) -> Choice:
    where = f"{op.module or 'the model'}: operation `{op.name}` ({op.target})"
    names = _per_axis(row.split, axes, where)
    by_name = {split.name: split for split in options}
    for axis, name in zip(axes, names, strict=True):
        if name not in by_name:
            raise PlanError(f"{where}: there is no split `{name}` for axis `{axis}`; known: {', '.join(by_name)}")
    choice = tuple(by_name[name] for name in names)
    if why := conflict(graph, op, choice, axes, mesh):
        raise PlanError(f"{where}: {why}")
    return choice


def _per_axis(given: Mapping[str, str], axes: tuple[str, ...], where: str) -> tuple[str, ...]:
    if set(given) != set(axes):
        raise PlanError(f"{where}: axes {list(given)} are given, the mesh has {list(axes)}; name each axis once")
    return tuple(given[axis] for axis in axes)


def conflict(graph: Graph, op: Op, choice: Choice, axes: tuple[str, ...], mesh: tuple[int, ...]) -> str | None:
    """Why `op` cannot run with these splits on a mesh of these sizes, or None if it can."""
    for index, (split, axis) in enumerate(zip(choice, axes, strict=True)):
        parts = 1
        for other, size in zip(choice[: index + 1], mesh, strict=False):
            parts *= size if other.name == split.name else 1
        if split.size and not split.uneven and split.size % parts:
            return f"`{split.name}` has {split.size} elements, which {parts} ranks (axis `{axis}`) cannot share evenly; use `replicate`"
    talking = [split.implementation for split in choice if split.implementation]
    if len(talking) == 2 and talking[0] != talking[1]:
        return f"`{talking[0]}` and `{talking[1]}` cannot run together; use `replicate` on one axis"
    for names, field in ((op.operands, "inputs"), (op.outputs, "outputs")):
        for slot, name in enumerate(names):
            state: State = tuple(getattr(split, field)[slot] for split in choice)
            if why := state_conflict(state, graph.values[name].shape):
                return f"value `{name}`: {why}"
    return None


def state_conflict(state: State, shape: tuple[int, ...]) -> str | None:
    """Why a value of this global shape cannot lie in `state`, or None if it can."""
    for placement in state:
        if placement.is_shard and placement.dim >= len(shape):
            return f"{placement} needs dim {placement.dim}, but its shape is {list(shape)}"
        if placement.is_shard and placement.blocks > 1 and shape[placement.dim] % placement.blocks:
            return f"{placement} needs dim {placement.dim} of {shape[placement.dim]} in {placement.blocks} equal blocks"
    if len(state) == 2 and state[0].is_shard and state[1].is_shard and state[0].dim == state[1].dim and state[0].blocks != state[1].blocks:
        return f"{state[0]} and {state[1]} split dim {state[0].dim} in different blocks"
    return None


def _storage(rows: Sequence[ParameterPlan], stage: Stage, axes: tuple[str, ...]) -> dict[str, Storage]:
    graph = stage.graph
    values = {item.fqn: graph.values[item.value] for item in graph.parameters}
    owner = f"stage {stage.index}" if stage.count > 1 else "the model"
    found: dict[str, Storage] = {}
    for row in rows:
        try:
            names = folded_names.expand(row.name)
        except ValueError as error:
            raise PlanError(f"parameter `{row.name}`: {error}") from None
        for fqn in names:
            if fqn not in values:
                near = get_close_matches(fqn, values, 1)
                raise PlanError(f"{owner} has no parameter `{fqn}`{f'; did you mean `{near[0]}`?' if near else ''}")
            if fqn in found:
                raise PlanError(f"parameter `{fqn}` is planned twice{_of(stage)}; name it once")
            found[fqn] = _stored(row, fqn, values[fqn].shape, axes)
    if missing := [fqn for fqn in values if fqn not in found]:
        others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise PlanError(f"the plan has no row for parameter `{missing[0]}`{_of(stage)}{others}")
    return found


def _stored(row: ParameterPlan, fqn: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> Storage:
    where = f"parameter `{fqn}`"
    if row.shape != shape:
        raise PlanMismatchError(f"{where}: the plan has shape {list(row.shape)}, the model {list(shape)}; plan again for this model")
    placements: list[Placement] = []
    for text in _per_axis(row.stored, axes, where):
        try:
            placements.append(parse(text))
        except ValueError as error:
            raise PlanError(f"{where}: {error}") from None
        if not placements[-1].is_shard and placements[-1] != R:
            raise PlanError(f"{where}: a parameter is stored as S(dim) or R, not as {text}")
    if why := state_conflict(tuple(placements), shape):
        raise PlanError(f"{where}: {why}")
    return Storage(tuple(placements), row.gather)
