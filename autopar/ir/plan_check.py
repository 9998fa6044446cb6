"""What must hold in a sound plan beyond the types of its fields. Needs no model; `Plan.load` runs it on every file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autopar.ir import folded_names
from autopar.ir.graph import DTYPE_BYTES
from autopar.ir.placement import Placement, parse

if TYPE_CHECKING:
    from autopar.ir.plan import Axes, InputPlan, OutputPlan, ParameterPlan, Plan

MAX_RANKS = 2**20
MAX_DIMS = 64  # torch's own limit on the dims of a tensor


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong at `path` in a plan; `message` says what and the remedy."""

    path: tuple[str | int, ...]
    message: str


def check(plan: Plan) -> list[Problem]:
    """Everything in `plan` that contradicts itself, in file order; empty for a sound plan."""
    return [problem for part in (_mesh, _tensors, _parameters, _segments, _collectives, _predicted) for problem in part(plan)]


def _mesh(plan: Plan) -> Iterator[Problem]:
    if not plan.mesh:
        yield Problem(("mesh",), 'has no axis; write at least one, such as {"dp": 1}')
    for axis, size in plan.mesh.items():
        if not axis.isidentifier():
            yield Problem(("mesh", axis), f"`{axis[:40]}` is no name for an axis; use letters, digits and `_`")
        if size > MAX_RANKS:
            yield Problem(("mesh", axis), f"{size} ranks on one axis; at most {MAX_RANKS}")
    if len(plan.mesh) > 8:
        yield Problem(("mesh",), f"has {len(plan.mesh)} axes; at most 8")
    elif plan.world_size > MAX_RANKS:
        yield Problem(("mesh",), f"has {plan.world_size} ranks; at most {MAX_RANKS}")


def _axes(plan: Plan, axes: Axes, *path: str | int) -> Iterator[Problem]:
    """The axes of the mesh, all of them, in mesh order."""
    if list(axes) != list(plan.mesh):
        wanted, found = ", ".join(plan.mesh), ", ".join(axes) or "none"
        yield Problem(path, f"has the axes {found[:80]} and must have those of the mesh in its order: {wanted[:80]}")


def _placements(plan: Plan, axes: Axes, shape: tuple[int, ...] | None, *path: str | int) -> Iterator[Problem]:
    """Placements that can be read and that fit `shape` (`None` where the plan does not say the shape)."""
    yield from _axes(plan, axes, *path)
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
        paths: set[str] = set()
        for index, tensor in enumerate(tensors):
            if tensor.path in paths:
                yield Problem((field, index, "path"), f"`{tensor.path[:80]}` is listed twice; keep one")
            paths.add(tensor.path)
            yield from _dtype(tensor.dtype, (field, index, "dtype"))
            yield from _placements(plan, tensor.placement, tensor.shape, field, index, "placement")


def _parameters(plan: Plan) -> Iterator[Problem]:
    names: set[str] = set()
    for index, parameter in enumerate(plan.parameters):
        here = ("parameters", index)
        if parameter.name in names:
            yield Problem((*here, "name"), f"`{parameter.name[:80]}` is listed twice; keep one")
        names.add(parameter.name)
        yield from _parameter(plan, parameter, index)


def _parameter(plan: Plan, parameter: ParameterPlan, index: int) -> Iterator[Problem]:
    try:
        folded_names.ranges(parameter.name)
    except ValueError as error:
        yield Problem(("parameters", index, "name"), _short(str(error)))
    yield from _dtype(parameter.dtype, ("parameters", index, "dtype"))
    shape = parameter.shape
    stored = [((), parameter.stored), *((("alternatives", i), item.stored) for i, item in enumerate(parameter.alternatives))]
    for path, axes in stored:
        yield from _placements(plan, axes, shape, "parameters", index, *path, "stored")
        for axis, text in axes.items():
            if text in ("R/P", "P(sum)"):
                yield Problem(
                    ("parameters", index, *path, "stored", axis), f"a parameter is stored whole or split, not `{text}`: write R or S(dim)"
                )
    yield from _placements(plan, parameter.used, shape, "parameters", index, "used")


def _segments(plan: Plan) -> Iterator[Problem]:
    position = 0
    names: set[str] = set()
    for index, segment in enumerate(plan.segments):
        here: tuple[str | int, ...] = ("segments", index)
        if segment.start != position:
            yield Problem((*here, "start"), f"is {segment.start}, and the segments before it end at {position}; segments follow each other")
        position = segment.start + segment.length * segment.count
        if len(segment.ops) != segment.length:
            yield Problem((*here, "ops"), f"lists {len(segment.ops)} operations, and `length` is {segment.length}")
        for number, op in enumerate(segment.ops):
            path = (*here, "ops", number)
            if op.name in names:
                yield Problem((*path, "name"), f"`{op.name[:80]}` is listed twice; keep one")
            names.add(op.name)
            yield from _axes(plan, op.split, *path, "split")
            for axis, split in op.split.items():
                if not split:
                    yield Problem((*path, "split", axis), "is empty; write the name of a split, such as `replicate`")
            yield from _placements(plan, op.output, None, *path, "output")
    if position != plan.model.operations:
        yield Problem(("segments",), f"cover {position} operations, and `model.operations` is {plan.model.operations}")


def _collectives(plan: Plan) -> Iterator[Problem]:
    for index, collective in enumerate(plan.collectives):
        if collective.axis not in plan.mesh:
            wanted = ", ".join(plan.mesh)
            yield Problem(("collectives", index, "axis"), f"`{collective.axis[:40]}` is not an axis of the mesh; it has {wanted[:80]}")


def _predicted(plan: Plan) -> Iterator[Problem]:
    predicted = plan.predicted
    # The bound comes from a float sum in another order than the cost; beyond rounding it may not pass it.
    if predicted.fits and predicted.lower_bound_s > predicted.cost_s * (1 + 1e-9):
        yield Problem(("predicted", "lower_bound_s"), f"{predicted.lower_bound_s} exceeds the cost {predicted.cost_s}; a bound is below it")
    total = sum(predicted.memory_bytes.values())
    if predicted.fits != (total <= predicted.memory_limit_bytes):
        verdict = "fits" if predicted.fits else "does not fit"
        limit = predicted.memory_limit_bytes
        yield Problem(("predicted", "fits"), f"says that the plan {verdict}, with {total} bytes of memory under a limit of {limit}")
