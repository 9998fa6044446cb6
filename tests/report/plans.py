"""Random sound plans for hypothesis: nothing but the laws of the format holds in them."""

from __future__ import annotations

import math

from hypothesis import strategies as st

from autopar.ir import plan as ir
from autopar.ir.graph import DTYPE_BYTES
from autopar.ir.pipelining.schedules import SCHEDULES

_SIZES = st.integers(0, 2**63 - 1)
_SECONDS = st.floats(0, 1e300, allow_nan=False)
# Any text that UTF-8 can hold: names come from users' code.
_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
_WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="{}"), min_size=1, max_size=12)
_DTYPES = st.sampled_from(sorted(DTYPE_BYTES))
_SHAPES = st.lists(st.integers(1, 512), max_size=3).map(tuple)


@st.composite
def _axes(draw: st.DrawFn, mesh: dict[str, int], dims: int, kinds: tuple[str, ...] = ("R", "R/P", "P(sum)")) -> ir.Axes:
    choices = [*kinds, *(f"S({dim})" for dim in range(dims))]
    return {axis: draw(st.sampled_from(choices)) for axis in mesh}


@st.composite
def _segments(draw: st.DrawFn, stage: int, mesh: dict[str, int], least: int) -> tuple[ir.SegmentPlan, ...]:
    """A few segments of one stage, or none where `least` is 0. Names of operations are unique in a stage."""
    names = iter(draw(st.lists(_WORDS, min_size=least, max_size=6, unique=True)))
    by_axis = st.dictionaries(st.sampled_from(sorted(mesh)), _SECONDS, max_size=2)
    segments: list[ir.SegmentPlan] = []
    start = 0
    while batch := [name for name, _ in zip(names, range(draw(st.integers(1, 3))), strict=False)]:
        count = draw(st.integers(1, 40))
        ops = tuple(
            ir.OpPlan(
                name=name,
                target=draw(st.sampled_from(["aten.linear.default", "autopar.reshard", "aten.add.Tensor", "autopar.send", "odd"])),
                module=draw(_TEXT),
                split={axis: draw(_WORDS) for axis in mesh},
                output=draw(_axes(mesh, 3)),
            )
            for name in batch
        )
        cost = draw(
            st.just(ir.SegmentCost())
            | st.builds(
                ir.SegmentCost, forward_s=_SECONDS, backward_s=_SECONDS, forward_comm_s=by_axis, reduce_s=by_axis, activation_bytes=_SIZES
            )
        )
        recompute = draw(st.integers(0, count))
        segments.append(
            ir.SegmentPlan(
                stage=stage, name=draw(_WORDS), start=start, length=len(ops), count=count, recompute=recompute, cost=cost, ops=ops
            )
        )  # fmt: skip
        start += len(ops) * count
    return tuple(segments)


@st.composite
def _pipelines(draw: st.DrawFn) -> tuple[str, list[dict[str, int]], list[int]]:
    """A schedule, the meshes of its groups, and the group of each stage."""
    schedule = SCHEDULES[draw(st.sampled_from(sorted(SCHEDULES)))]
    groups = draw(st.integers(1, 3))
    sizes = st.tuples(st.integers(1, 4), st.integers(1, 4)).map(lambda pair: {"dp": pair[0], "tp": pair[1]})
    meshes = [draw(sizes)] * groups if draw(st.booleans()) else [draw(sizes) for _ in range(groups)]
    stages = groups * (schedule.stages_per_group or draw(st.integers(1, 2)))
    return schedule.name, meshes, [schedule.group_of(stage, groups) for stage in range(stages)]


@st.composite
def plans(draw: st.DrawFn) -> ir.Plan:
    """A sound plan with a few of everything, with a pipeline or without."""
    schedule, meshes, placed = draw(_pipelines() | st.tuples(st.just(""), st.just([]), st.just([0])))
    if not schedule:
        meshes = [dict(zip(("dp", "tp"), draw(st.tuples(st.integers(1, 8), st.integers(1, 8))), strict=True))]
    stages = [meshes[group] for group in placed]
    numbers = st.integers(0, len(stages) - 1)
    microbatches = draw(st.integers(1, 8))

    def tensors(kind: type[ir.InputPlan] | type[ir.OutputPlan]) -> tuple[ir.InputPlan | ir.OutputPlan, ...]:
        paths = draw(st.lists(_TEXT, max_size=2, unique=True))
        rows = [(path, draw(_SHAPES), draw(numbers)) for path in paths]
        return tuple(
            kind(path=path, stage=stage, shape=shape, dtype=draw(_DTYPES), placement=draw(_axes(stages[stage], len(shape))))
            for path, shape, stage in rows
        )

    def parameter(name: str) -> ir.ParameterPlan:
        shape, stage = draw(_SHAPES), draw(numbers)
        mesh = stages[stage]
        alternative = st.builds(
            ir.Alternative, stored=_axes(mesh, len(shape), ("R",)), cost_s=st.none() | _SECONDS, memory_bytes=st.none() | _SIZES, why=_TEXT
        )
        return ir.ParameterPlan(
            stage=stage,
            name=name,
            shape=shape,
            dtype=draw(_DTYPES),
            trainable=draw(st.booleans()),
            stored=draw(_axes(mesh, len(shape), ("R",))),
            gather=draw(st.sampled_from(["never", "step", "use"])),
            used=draw(_axes(mesh, len(shape))),
            alternatives=tuple(draw(st.lists(alternative, max_size=2))),
        )

    segments: list[ir.SegmentPlan] = []
    rows: list[ir.StagePlan] = []
    position = 0
    for number, mesh in enumerate(stages):
        found = draw(_segments(number, mesh, 1 if schedule else 0))
        segments += found
        listed = sum(segment.length * segment.count for segment in found)
        own = draw(st.integers(1, listed)) if schedule else listed
        rows.append(
            ir.StagePlan(
                name=draw(_TEXT), start=position, stop=position + own, group=placed[number], sends_bytes=draw(_SIZES),
                receives_s=draw(_SECONDS), returns_s=draw(_SECONDS),
            )
        )  # fmt: skip
        position += own
    collective = numbers.flatmap(
        lambda stage: st.builds(
            ir.CollectivePlan,
            stage=st.just(stage),
            kind=st.sampled_from(["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]),
            axis=st.sampled_from(sorted(stages[stage])),
            phase=st.sampled_from(["forward", "backward", "gradient"]),
            value=_TEXT,
            op=_TEXT,
            bytes=_SIZES,
            count=st.integers(1, 1000),
            time_s=_SECONDS,
            exposed_s=_SECONDS,
        )
    )
    candidate = st.builds(
        ir.Candidate, groups=st.integers(1, 4), what=_TEXT, cost_s=st.none() | _SECONDS, bubble=st.none() | _SECONDS,
        communication_s=st.none() | _SECONDS, memory_bytes=st.none() | _SIZES, why=_TEXT,
    )  # fmt: skip
    memory = draw(st.dictionaries(st.sampled_from(["parameters", "gradients", "optimizer", "activations", "buffers"]), _SIZES))
    limit = draw(_SIZES)
    cost, bound = sorted(draw(st.tuples(_SECONDS, _SECONDS)), reverse=True)
    ranges = draw(st.lists(st.integers(1, 40).map(lambda last: f"h.{{0-{last}}}.w"), max_size=2, unique=True))
    shared = meshes[0] if all(mesh == meshes[0] for mesh in meshes) else {}
    first_ranks = [sum(math.prod(mesh.values()) for mesh in meshes[:group]) for group in range(len(meshes))]
    pipeline = ir.PipelinePlan(
        schedule=schedule,
        groups=tuple(ir.GroupPlan(first_rank=rank, mesh=mesh) for rank, mesh in zip(first_ranks, meshes, strict=True)),
        stages=tuple(rows),
    )
    return ir.Plan(
        name=draw(_TEXT),
        model=ir.ModelInfo(
            name=draw(_TEXT), fingerprint=draw(_TEXT), training=draw(st.booleans()), parameters=draw(_SIZES), operations=position
        ),
        cluster=ir.ClusterInfo(
            name=draw(_TEXT),
            device=draw(_TEXT),
            devices_per_node=draw(st.integers(1, 8)),
            nodes=draw(st.integers(1, 8)),
            memory_bytes=draw(_SIZES),
        ),
        mesh={"pp": len(meshes), **shared} if schedule else meshes[0],
        microbatches=microbatches,
        pipeline=pipeline if schedule else None,
        inputs=tensors(ir.InputPlan),
        outputs=tensors(ir.OutputPlan),
        pins=draw(st.dictionaries(_TEXT, _TEXT, max_size=2)),
        predicted=ir.Predicted(
            cost_s=cost,
            lower_bound_s=bound,
            compute_s=draw(_SECONDS),
            communication_s=draw(_SECONDS),
            memory_bytes=memory,
            memory_limit_bytes=limit,
            fits=sum(memory.values()) <= limit,
            optimizer=draw(_TEXT),
            effort=draw(_TEXT),
            step_s=draw(_SECONDS),
            bubble=draw(_SECONDS),
            stage_memory_bytes=draw(st.just(()) | st.tuples(*[_SIZES] * len(meshes))),
        ),
        replicated=tuple(draw(st.lists(_TEXT, max_size=2))),
        notes=tuple(draw(st.lists(_TEXT, max_size=2))),
        candidates=tuple(draw(st.lists(candidate, max_size=2))),
        parameters=tuple(map(parameter, [*draw(st.lists(_WORDS, max_size=3, unique=True)), *ranges])),
        segments=tuple(segments),
        collectives=tuple(draw(st.lists(collective, max_size=3))),
    )
