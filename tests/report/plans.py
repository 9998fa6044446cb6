"""Random sound plans for hypothesis: nothing but the laws of the format holds in them."""

from __future__ import annotations

from hypothesis import strategies as st

from autopar.ir.graph import DTYPE_BYTES
from autopar.ir.plan import (
    Alternative,
    Axes,
    ClusterInfo,
    CollectivePlan,
    InputPlan,
    ModelInfo,
    OpPlan,
    OutputPlan,
    ParameterPlan,
    Plan,
    Predicted,
    SegmentPlan,
)

_SIZES = st.integers(0, 2**63 - 1)
_SECONDS = st.floats(0, 1e300, allow_nan=False)
# Any text that UTF-8 can hold: names come from users' code.
_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
_WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="{}"), min_size=1, max_size=12)
_DTYPES = st.sampled_from(sorted(DTYPE_BYTES))
_SHAPES = st.lists(st.integers(1, 512), max_size=3).map(tuple)


@st.composite
def _axes(draw: st.DrawFn, mesh: dict[str, int], dims: int, kinds: tuple[str, ...] = ("R", "R/P", "P(sum)")) -> Axes:
    choices = [*kinds, *(f"S({dim})" for dim in range(dims))]
    return {axis: draw(st.sampled_from(choices)) for axis in mesh}


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """A sound plan with a few of everything."""
    mesh = dict(zip(("dp", "tp"), draw(st.tuples(st.integers(1, 8), st.integers(1, 8))), strict=True))

    def tensors(kind: type[InputPlan] | type[OutputPlan]) -> tuple[InputPlan | OutputPlan, ...]:
        paths = draw(st.lists(_TEXT, max_size=2, unique=True))
        shapes = [draw(_SHAPES) for _ in paths]
        return tuple(
            kind(path=path, shape=shape, dtype=draw(_DTYPES), placement=draw(_axes(mesh, len(shape))))
            for path, shape in zip(paths, shapes, strict=True)
        )

    def parameter(name: str) -> ParameterPlan:
        shape = draw(_SHAPES)
        alternative = st.builds(
            Alternative, stored=_axes(mesh, len(shape), ("R",)), cost_s=st.none() | _SECONDS, memory_bytes=st.none() | _SIZES, why=_TEXT
        )
        return ParameterPlan(
            name=name,
            shape=shape,
            dtype=draw(_DTYPES),
            trainable=draw(st.booleans()),
            stored=draw(_axes(mesh, len(shape), ("R",))),
            gather=draw(st.sampled_from(["never", "step", "use"])),
            used=draw(_axes(mesh, len(shape))),
            alternatives=tuple(draw(st.lists(alternative, max_size=2))),
        )

    names = iter(draw(st.lists(_WORDS, max_size=6, unique=True)))
    segments: list[SegmentPlan] = []
    start = 0
    while batch := [name for name, _ in zip(names, range(draw(st.integers(1, 3))), strict=False)]:
        count = draw(st.integers(1, 40))
        ops = tuple(
            OpPlan(
                name=name,
                target=draw(st.sampled_from(["aten.linear.default", "autopar.reshard", "aten.add.Tensor", "odd"])),
                module=draw(_TEXT),
                split={axis: draw(_WORDS) for axis in mesh},
                output=draw(_axes(mesh, 3)),
            )
            for name in batch
        )
        segments.append(SegmentPlan(name=draw(_WORDS), start=start, length=len(ops), count=count, ops=ops))
        start += len(ops) * count
    collective = st.builds(
        CollectivePlan,
        kind=st.sampled_from(["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]),
        axis=st.sampled_from(sorted(mesh)),
        phase=st.sampled_from(["forward", "backward", "gradient"]),
        value=_TEXT,
        op=_TEXT,
        bytes=_SIZES,
        count=st.integers(1, 1000),
        time_s=_SECONDS,
        exposed_s=_SECONDS,
    )
    memory = draw(st.dictionaries(st.sampled_from(["parameters", "gradients", "optimizer", "activations", "buffers"]), _SIZES))
    limit = draw(_SIZES)
    cost, bound = sorted(draw(st.tuples(_SECONDS, _SECONDS)), reverse=True)
    ranges = draw(st.lists(st.integers(1, 40).map(lambda last: f"h.{{0-{last}}}.w"), max_size=2, unique=True))
    return Plan(
        name=draw(_TEXT),
        model=ModelInfo(name=draw(_TEXT), fingerprint=draw(_TEXT), training=draw(st.booleans()), parameters=draw(_SIZES), operations=start),
        cluster=ClusterInfo(
            name=draw(_TEXT),
            device=draw(_TEXT),
            devices_per_node=draw(st.integers(1, 8)),
            nodes=draw(st.integers(1, 8)),
            memory_bytes=draw(_SIZES),
        ),
        mesh=mesh,
        inputs=tensors(InputPlan),
        outputs=tensors(OutputPlan),
        pins=draw(st.dictionaries(_TEXT, _TEXT, max_size=2)),
        predicted=Predicted(
            cost_s=cost,
            lower_bound_s=bound,
            compute_s=draw(_SECONDS),
            communication_s=draw(_SECONDS),
            memory_bytes=memory,
            memory_limit_bytes=limit,
            fits=sum(memory.values()) <= limit,
            optimizer=draw(_TEXT),
            effort=draw(_TEXT),
        ),
        replicated=tuple(draw(st.lists(_TEXT, max_size=2))),
        notes=tuple(draw(st.lists(_TEXT, max_size=2))),
        parameters=tuple(map(parameter, [*draw(st.lists(_WORDS, max_size=3, unique=True)), *ranges])),
        segments=tuple(segments),
        collectives=tuple(draw(st.lists(collective, max_size=3))),
    )
