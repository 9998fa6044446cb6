"""What a plan decides, unfolded: the `Split`s of every operation and the storage of every parameter, per mesh axis.

`expand` is the only door from a plan file to anything that runs: what it lets through is sound for the graph at hand. It checks the
decisions alone; the prices in a plan are for the reader.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from autopar.errors import PlanError, PlanMismatchError
from autopar.ir import folded_names
from autopar.ir.conversion import State
from autopar.ir.graph import Graph, Op
from autopar.ir.placement import Placement, R, parse
from autopar.ir.plan import OpPlan, ParameterPlan, Plan, SegmentPlan
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


def expand(plan: Plan, graph: Graph) -> Assignment:
    """The decisions of `plan` for every operation and parameter of `graph`.

    Raises `PlanMismatchError` where the plan was made for another graph, and `PlanError` naming the place where it was edited into
    something that cannot run: unknown split names or axes, sizes that do not divide, placements that conflict, names twice or not at all.
    """
    axes, mesh = tuple(plan.mesh), tuple(plan.mesh.values())
    if not 1 <= len(axes) <= 2:
        raise PlanError(f"mesh {dict(plan.mesh)} has {len(axes)} axes; a plan has one or two")
    if plan.model.fingerprint != graph.fingerprint():
        numel = sum(graph.values[item.value].numel for item in graph.parameters)
        raise PlanMismatchError(
            f"the plan is for `{plan.model.name}` ({plan.model.operations} operations, {plan.model.parameters} parameters, "
            f"{'training' if plan.model.training else 'evaluation'} mode, fingerprint {plan.model.fingerprint[:12]}), but the model given "
            f"is `{graph.name}` ({len(graph.ops)} operations, {numel} parameters, "
            f"{'training' if graph.training else 'evaluation'} mode, fingerprint {graph.fingerprint()[:12]}): "
            "same code, configuration, input shapes and mode are needed; plan again for this model"
        )
    return Assignment(axes, mesh, _choices(plan, graph, axes, mesh), _storage(plan, graph, axes, mesh))


def _choices(plan: Plan, graph: Graph, axes: tuple[str, ...], mesh: tuple[int, ...]) -> dict[str, Choice]:
    found: dict[str, Choice] = {}
    position = 0
    for segment in plan.segments:
        position = _segment_end(segment, position, graph)
        for offset, row in enumerate(segment.ops):
            checked: dict[tuple[object, ...], Choice] = {}
            for repeat in range(segment.count):
                op = graph.ops[segment.start + repeat * segment.length + offset]
                if op.target != row.target or (repeat == 0 and op.name != row.name):
                    raise PlanMismatchError(
                        f"segment `{segment.name}`, repeat {repeat}: the plan has `{row.name}` ({row.target}) where the model has "
                        f"`{op.name}` ({op.target}); plan again for this model"
                    )
                options = splits(graph, op)
                key = (id(options), *(graph.values[name].shape for name in (*op.operands, *op.outputs)))
                if key not in checked:
                    checked[key] = _choice(row, op, options, graph, axes, mesh)
                found[op.name] = checked[key]
    if position != len(graph.ops):
        raise PlanError(f"the segments end at operation {position}, but the model has {len(graph.ops)}")
    return found


def _segment_end(segment: SegmentPlan, position: int, graph: Graph) -> int:
    end = segment.start + segment.length * segment.count
    if segment.start != position or end > len(graph.ops) or len(segment.ops) != segment.length:
        raise PlanError(
            f"segment `{segment.name}` says start {segment.start}, length {segment.length}, count {segment.count} with {len(segment.ops)} "
            f"operations listed; it must start at {position}, list `length` operations and end by {len(graph.ops)}"
        )
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


def _storage(plan: Plan, graph: Graph, axes: tuple[str, ...], mesh: tuple[int, ...]) -> dict[str, Storage]:
    values = {item.fqn: graph.values[item.value] for item in graph.parameters}
    found: dict[str, Storage] = {}
    for row in plan.parameters:
        try:
            names = folded_names.expand(row.name)
        except ValueError as error:
            raise PlanError(f"parameter `{row.name}`: {error}") from None
        for fqn in names:
            if fqn not in values:
                near = get_close_matches(fqn, values, 1)
                raise PlanError(f"the model has no parameter `{fqn}`{f'; did you mean `{near[0]}`?' if near else ''}")
            if fqn in found:
                raise PlanError(f"parameter `{fqn}` is planned twice; name it once")
            found[fqn] = _stored(row, fqn, values[fqn].shape, axes)
    if missing := [fqn for fqn in values if fqn not in found]:
        raise PlanError(f"the plan has no row for parameter `{missing[0]}`{f' and {len(missing) - 1} others' if len(missing) > 1 else ''}")
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
