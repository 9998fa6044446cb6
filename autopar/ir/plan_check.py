"""What must hold in a sound plan beyond the types of its fields. Needs no model; `Plan.load` runs it on every file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

from autopar.errors import RuleError
from autopar.ir import folded_names
from autopar.ir.graph import DTYPE_BYTES
from autopar.ir.pipelining.schedules import MOST_ACTIONS, SCHEDULES
from autopar.ir.placement import Placement, parse
from autopar.ir.precision import problems
from autopar.ir.rules import notation
from autopar.ir.rules.given import read_split

if TYPE_CHECKING:
    from autopar.ir.plan import Axes, InputPlan, OutputPlan, ParameterPlan, PipelinePlan, Plan

MAX_RANKS = 2**20
MAX_MICROBATCHES = 2**16
MAX_OPERATIONS = 10_000_000  # unfolded; no traced model has as many
MAX_DIMS = 64  # torch's own limit on the dims of a tensor


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong at `path` in a plan; `message` says what and the remedy."""

    path: tuple[str | int, ...]
    message: str


def check(plan: Plan) -> list[Problem]:
    """Everything in `plan` that contradicts itself, in file order; empty for a sound plan."""
    parts = (_mesh, _precision, _pipeline, _tensors, _predicted, _rules, _parameters, _segments, _collectives)
    return [problem for part in parts for problem in part(plan)]


def _mesh(plan: Plan) -> Iterator[Problem]:
    yield from _axis_sizes(plan.mesh, "mesh")
    if len(plan.mesh) <= 8 and plan.world_size > MAX_RANKS:
        yield Problem(("mesh",), f"has {plan.world_size} ranks; at most {MAX_RANKS}")
    if plan.microbatches > MAX_MICROBATCHES:
        yield Problem(("microbatches",), f"is {plan.microbatches}; at most {MAX_MICROBATCHES}")


def _precision(plan: Plan) -> Iterator[Problem]:
    for field, why in problems(plan.precision) if plan.precision else ():
        yield Problem(("precision", field), why)


def _axis_sizes(mesh: dict[str, int], *path: str | int) -> Iterator[Problem]:
    if not mesh:
        yield Problem(path, 'has no axis; write at least one, such as {"dp": 1}')
    for axis, size in mesh.items():
        if not axis.isidentifier():
            yield Problem((*path, axis), f"`{axis[:40]}` is no name for an axis; use letters, digits and `_`")
        if size > MAX_RANKS:
            yield Problem((*path, axis), f"{size} ranks on one axis; at most {MAX_RANKS}")
    if len(mesh) > 8:
        yield Problem(path, f"has {len(mesh)} axes; at most 8")


def _pipeline(plan: Plan) -> Iterator[Problem]:
    if (pipeline := plan.pipeline) is None:
        return
    yield from _groups(plan, pipeline)
    yield from _stages(plan, pipeline)
    yield from _schedule(plan, pipeline)


def _groups(plan: Plan, pipeline: PipelinePlan) -> Iterator[Problem]:
    """The groups tile the ranks, and the plan's mesh says of them what it can."""
    if not pipeline.groups:
        yield Problem(("pipeline", "groups"), "lists no group; write at least one")
        return
    rank = 0
    for index, group in enumerate(pipeline.groups):
        here = ("pipeline", "groups", index)
        if group.first_rank != rank:
            yield Problem((*here, "first_rank"), f"is {group.first_rank}, and the groups before it end at {rank}; groups follow each other")
        rank = group.first_rank + math.prod(group.mesh.values())
        yield from _axis_sizes(group.mesh, *here, "mesh")
        if "pp" in group.mesh:
            yield Problem((*here, "mesh", "pp"), "stages are no axis of a group; `pp` stands in the plan's mesh")
    count, meshes = len(pipeline.groups), [group.mesh for group in pipeline.groups]
    shared = meshes[0] if all(list(mesh.items()) == list(meshes[0].items()) for mesh in meshes) else {}
    if list(plan.mesh.items()) != list({"pp": count, **shared}.items()):
        why = "and their common mesh" if shared else "alone, since their meshes differ"
        yield Problem(("mesh",), f"is {_sizes(plan.mesh)}; with {count} groups it is pp {count} {why}: {_sizes({'pp': count, **shared})}")


def _sizes(mesh: dict[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in mesh.items())[:80] or "empty"


def _stages(plan: Plan, pipeline: PipelinePlan) -> Iterator[Problem]:
    """The stages tile the operations of one microbatch."""
    if not pipeline.stages:
        yield Problem(("pipeline", "stages"), "lists no stage; write at least one")
        return
    position = 0
    for index, stage in enumerate(pipeline.stages):
        here = ("pipeline", "stages", index)
        if stage.start != position:
            yield Problem((*here, "start"), f"is {stage.start}, and the stages before it end at {position}; stages follow each other")
        if stage.stop <= stage.start:
            yield Problem((*here, "stop"), f"is {stage.stop}, and the stage starts at {stage.start}; a stage has at least one operation")
        position = stage.stop
        if stage.group >= len(pipeline.groups):
            yield Problem((*here, "group"), f"is {stage.group}, and the last group is {len(pipeline.groups) - 1} (they count from 0)")
    if plan.microbatches == 1 and position != plan.model.operations:  # with more, a part of the model runs before the stages
        where = ("pipeline", "stages", len(pipeline.stages) - 1, "stop")
        yield Problem(where, f"is {position}, and `model.operations` is {plan.model.operations}; the stages hold all operations")


def _schedule(plan: Plan, pipeline: PipelinePlan) -> Iterator[Problem]:
    """A schedule that is known and takes so many stages and microbatches, and every stage in the group where it places it."""
    here, name = ("pipeline", "schedule"), pipeline.schedule
    groups, stages = len(pipeline.groups), len(pipeline.stages)
    if not groups or not stages:
        return
    if name not in SCHEDULES:
        near = get_close_matches(name, SCHEDULES, 1)
        hint = f"did you mean `{near[0]}`? " if near else ""
        yield Problem(here, f"`{name[:40]}` is no schedule; {hint}there are {', '.join(SCHEDULES)}")
        return
    schedule = SCHEDULES[name]
    wanted = schedule.stages_per_group
    if stages % groups or (wanted is not None and stages != wanted * groups):
        takes = "a multiple of that many" if wanted is None else f"{wanted * groups}"
        yield Problem(here, f"`{name}` on {groups} groups of ranks takes {takes} stages, and the plan has {stages}")
        return
    if 3 * stages * plan.microbatches > MOST_ACTIONS:
        yield Problem(("microbatches",), f"{plan.microbatches} microbatches through {stages} stages are more than can be scheduled")
    for index, stage in enumerate(pipeline.stages):
        if (group := schedule.group_of(index, groups)) != stage.group:
            where = ("pipeline", "stages", index, "group")
            yield Problem(where, f"is {stage.group}, and `{name}` runs stage {index} on group {group}")


def _stage_mesh(plan: Plan, stage: int) -> dict[str, int] | None:
    """The mesh of `stage`; `None` where the plan has no such stage, or none of its group: that is told elsewhere."""
    if plan.pipeline is None:
        return plan.mesh if stage == 0 else None
    stages, groups = plan.pipeline.stages, plan.pipeline.groups
    return groups[stages[stage].group].mesh if stage < len(stages) and stages[stage].group < len(groups) else None


def _stage(plan: Plan, stage: int, *path: str | int) -> Iterator[Problem]:
    """A stage that the plan has."""
    count = len(plan.pipeline.stages) if plan.pipeline else 1
    if stage >= count:
        has = f"the last stage is {count - 1} (they count from 0)" if plan.pipeline else "the plan has no `pipeline`"
        yield Problem((*path, "stage"), f"is {stage}, and {has}")


def _axes(mesh: dict[str, int] | None, axes: Axes, *path: str | int) -> Iterator[Problem]:
    """The axes of `mesh`, all of them, in mesh order."""
    if mesh is not None and list(axes) != list(mesh):
        wanted, found = ", ".join(mesh), ", ".join(axes) or "none"
        yield Problem(path, f"has the axes {found[:80]} and must have those of the mesh in its order: {wanted[:80]}")


def _placements(mesh: dict[str, int] | None, axes: Axes, shape: tuple[int, ...] | None, *path: str | int) -> Iterator[Problem]:
    """Placements that can be read and that fit `shape` (`None` where the plan does not say the shape)."""
    yield from _axes(mesh, axes, *path)
    for axis, text in axes.items():
        try:
            placement = parse(text)
        except ValueError as error:
            yield Problem((*path, axis), _short(str(error)))
            continue
        if str(placement) != text:
            yield Problem((*path, axis), f"write `{placement}` for `{text[:40]}`")
        elif placement.is_shard:
            yield from _fits(placement, shape, (*path, axis))


def _short(text: str) -> str:
    return text if len(text) <= 160 else text[:60] + " ... " + text[-80:]


def _fits(placement: Placement, shape: tuple[int, ...] | None, path: tuple[str | int, ...]) -> Iterator[Problem]:
    dims = MAX_DIMS if shape is None else len(shape)
    if placement.dim >= dims:
        yield Problem(path, f"`{placement}` splits dim {placement.dim} of a tensor with {dims} dims (they count from 0)")
    elif shape is not None and shape[placement.dim] % placement.blocks:
        yield Problem(path, f"`{placement}`: {shape[placement.dim]} elements do not divide in {placement.blocks} equal blocks")


def _dtype(dtype: str, path: tuple[str | int, ...]) -> Iterator[Problem]:
    if dtype not in DTYPE_BYTES:
        yield Problem(path, f"`{dtype[:40]}` is not a dtype; known: {', '.join(DTYPE_BYTES)}")


def _tensors(plan: Plan) -> Iterator[Problem]:
    fields: list[tuple[str, tuple[InputPlan | OutputPlan, ...]]] = [("inputs", plan.inputs), ("outputs", plan.outputs)]
    for field, tensors in fields:
        paths: set[tuple[int, str]] = set()
        for index, tensor in enumerate(tensors):
            yield from _stage(plan, tensor.stage, field, index)
            if (tensor.stage, tensor.path) in paths:
                yield Problem((field, index, "path"), f"`{tensor.path[:80]}` is listed twice; keep one")
            paths.add((tensor.stage, tensor.path))
            yield from _dtype(tensor.dtype, (field, index, "dtype"))
            yield from _placements(_stage_mesh(plan, tensor.stage), tensor.placement, tensor.shape, field, index, "placement")


def _parameters(plan: Plan) -> Iterator[Problem]:
    names: set[tuple[int, str]] = set()
    for index, parameter in enumerate(plan.parameters):
        here = ("parameters", index)
        yield from _stage(plan, parameter.stage, *here)
        if (parameter.stage, parameter.name) in names:
            yield Problem((*here, "name"), f"`{parameter.name[:80]}` is listed twice; keep one")
        names.add((parameter.stage, parameter.name))
        yield from _parameter(plan, parameter, index)


def _parameter(plan: Plan, parameter: ParameterPlan, index: int) -> Iterator[Problem]:
    try:
        folded_names.ranges(parameter.name)
    except ValueError as error:
        yield Problem(("parameters", index, "name"), _short(str(error)))
    yield from _dtype(parameter.dtype, ("parameters", index, "dtype"))
    shape, mesh = parameter.shape, _stage_mesh(plan, parameter.stage)
    stored = [((), parameter.stored), *((("alternatives", i), item.stored) for i, item in enumerate(parameter.alternatives))]
    for path, axes in stored:
        yield from _placements(mesh, axes, shape, "parameters", index, *path, "stored")
        for axis, text in axes.items():
            if text in ("R/P", "P(sum)"):
                yield Problem(
                    ("parameters", index, *path, "stored", axis), f"a parameter is stored whole or split, not `{text}`: write R or S(dim)"
                )
    yield from _placements(mesh, parameter.used, shape, "parameters", index, "used")


def _segments(plan: Plan) -> Iterator[Problem]:
    """In the order of the stages, and those of one stage after each other from its first operation."""
    stage = position = 0
    names: set[tuple[int, str]] = set()
    for index, segment in enumerate(plan.segments):
        here: tuple[str | int, ...] = ("segments", index)
        yield from _stage(plan, segment.stage, *here)
        if segment.stage != stage:
            yield from _stage_end(plan, stage, position, *here)
            if segment.stage != stage + 1:
                yield Problem((*here, "stage"), f"is {segment.stage} after {stage}; every stage has segments, in the order of the stages")
            stage, position = segment.stage, 0
        if segment.start != position:
            yield Problem((*here, "start"), f"is {segment.start}, and the segments before it end at {position}; segments follow each other")
        position = segment.start + segment.length * segment.count
        if len(segment.ops) != segment.length:
            yield Problem((*here, "ops"), f"lists {len(segment.ops)} operations, and `length` is {segment.length}")
        if segment.recompute > segment.count:
            yield Problem((*here, "recompute"), f"is {segment.recompute}, and `count` is {segment.count}; at most all repeats recompute")
        mesh = _stage_mesh(plan, segment.stage)
        if segment.cost.weight_s > segment.cost.backward_s:
            yield Problem((*here, "cost", "weight_s"), f"is {segment.cost.weight_s}, a part of `backward_s` {segment.cost.backward_s}")
        for field, value in segment.cost:
            yield from _known_axes(mesh, value, *here, "cost", field) if isinstance(value, dict) else ()
        for number, op in enumerate(segment.ops):
            path = (*here, "ops", number)
            if (stage, op.name) in names:
                yield Problem((*path, "name"), f"`{op.name[:80]}` is listed twice; keep one")
            names.add((stage, op.name))
            yield from _axes(mesh, op.split, *path, "split")
            for axis, split in op.split.items():
                if not split:
                    yield Problem((*path, "split", axis), "is empty; write the name of a split, such as `replicate`")
            yield from _placements(mesh, op.output, None, *path, "output")
    yield from _stage_end(plan, stage, position, "segments")
    if (total := sum(segment.length * segment.count for segment in plan.segments)) > MAX_OPERATIONS:
        yield Problem(("segments",), f"stand for {total} operations; at most {MAX_OPERATIONS}")
    if plan.pipeline and plan.pipeline.stages and stage != len(plan.pipeline.stages) - 1:
        yield Problem(("segments",), f"end with stage {stage}, and the last stage is {len(plan.pipeline.stages) - 1}")


def _stage_end(plan: Plan, stage: int, position: int, *path: str | int) -> Iterator[Problem]:
    """The segments of the only stage end at `position`: all operations. How many the graph of one of several stages has, the model says:
    a pipeline adds operations that send and receive, and moves masks and the like to where they are read."""
    if plan.pipeline is None and plan.microbatches == 1 and position != plan.model.operations:
        yield Problem(path, f"cover {position} operations, and `model.operations` is {plan.model.operations}")


def _known_axes(mesh: dict[str, int] | None, axes: Iterable[str], *path: str | int) -> Iterator[Problem]:
    for axis in axes:
        if mesh is not None and axis not in mesh:
            yield Problem((*path, axis), f"`{axis[:40]}` is not an axis of the mesh; it has {', '.join(mesh)[:80]}")


def _collectives(plan: Plan) -> Iterator[Problem]:
    for index, collective in enumerate(plan.collectives):
        yield from _stage(plan, collective.stage, "collectives", index)
        mesh = _stage_mesh(plan, collective.stage)
        if mesh is not None and collective.axis not in mesh:
            wanted = ", ".join(mesh)
            yield Problem(("collectives", index, "axis"), f"`{collective.axis[:40]}` is not an axis of the mesh; it has {wanted[:80]}")


def _rules(plan: Plan) -> Iterator[Problem]:
    for index, rule in enumerate(plan.rules):
        for field, texts, read in (("notation", (rule.notation,), notation.read), ("splits", rule.splits, read_split)):
            for text in filter(None, texts):
                try:
                    read(text)
                except RuleError as error:
                    yield Problem(("rules", index, field), str(error))


def _predicted(plan: Plan) -> Iterator[Problem]:
    predicted = plan.predicted
    # The bound comes from a float sum in another order than the cost; beyond rounding it may not pass it.
    if predicted.fits and predicted.lower_bound_s > predicted.cost_s * (1 + 1e-9):
        yield Problem(("predicted", "lower_bound_s"), f"{predicted.lower_bound_s} exceeds the cost {predicted.cost_s}; a bound is below it")
    for field, numbers in (("stage_memory_bytes", predicted.stage_memory_bytes), ("resident_bytes", predicted.resident_bytes)):
        if numbers and len(numbers) != len(plan.groups):
            yield Problem(("predicted", field), f"has {len(numbers)} numbers, and there are {len(plan.groups)} groups of ranks")
    total = sum(predicted.memory_bytes.values())
    if predicted.fits != (total <= predicted.memory_limit_bytes):
        verdict = "fits" if predicted.fits else "does not fit"
        limit = predicted.memory_limit_bytes
        yield Problem(("predicted", "fits"), f"says that the plan {verdict}, with {total} bytes of memory under a limit of {limit}")
