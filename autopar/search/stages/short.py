"""A model with its repeats cut short: what prices of stages are taken from, so that they cost the same at any depth.

Of a segment's repeats the first ones stay; who read a repeat that is gone reads the last one that stays, in the same place. Repeats are
equal, and in a long row all but those near the ends are decided alike, so an operation of a repeat that is gone is priced as that of one
in the middle of those that stay.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from autopar.ir.fold import fold
from autopar.ir.graph import Arg, Graph, Op, Ref

KEPT = 4
"""Repeats that stay: both ends, and two between them that are like those between."""
_LIKE = 2  # which of these stands for those that are gone


@dataclass(frozen=True, slots=True)
class Short:
    """`graph`, the shortened model; `like`: for every operation of the whole model, by position, the name of the one that it is priced
    as."""

    graph: Graph
    like: tuple[str, ...]


def shortened(graph: Graph) -> Short:
    """`graph` with at most `KEPT` repeats of every segment."""
    ops: list[Op] = []
    like: list[str] = []
    instead: dict[str, str] = {}
    for segment in fold(graph):
        for repeat in range(segment.count):
            start = segment.start + repeat * segment.length
            body = graph.ops[start : start + segment.length]
            if segment.count <= KEPT or repeat < KEPT:
                ops += [_reading(op, instead) for op in body]
            else:
                last = graph.ops[segment.start + (KEPT - 1) * segment.length :][: segment.length]
                for gone, stays in zip(body, last, strict=True):
                    instead |= zip(gone.outputs, stays.outputs, strict=True)
            place = repeat
            if segment.count > KEPT:
                place = KEPT - 1 if repeat == segment.count - 1 else min(repeat, _LIKE)
            priced = segment.start + place * segment.length
            like += [op.name for op in graph.ops[priced : priced + segment.length]]
    if not instead:
        return Short(graph, tuple(like))
    read = {name for op in ops for name in op.operands}
    made = {name for op in ops for name in op.outputs}
    outputs = tuple(item for item in graph.outputs if item.value in made or item.value in graph.source_kind)
    read |= {item.value for item in outputs}
    buffers = tuple(item for item in graph.buffers if item.value in read and (item.updated is None or item.updated in made))
    parameters = tuple(item for item in graph.parameters if item.value in read)
    constants = tuple(item for item in graph.constants if item.value in read)
    sources = {item.value for items in (graph.inputs, parameters, buffers, constants) for item in items}
    values = {name: value for name, value in graph.values.items() if name in made or name in sources}
    short = replace(
        graph, values=values, parameters=parameters, buffers=buffers, constants=constants, ops=tuple(ops), outputs=outputs
    )  # fmt: skip
    return Short(short, tuple(like))


def _reading(op: Op, instead: dict[str, str]) -> Op:
    if not any(name in instead for name in op.operands):
        return op

    def new(arg: Arg) -> Arg:
        if isinstance(arg, Ref):
            return Ref(instead.get(arg.name, arg.name))
        return tuple([new(item) for item in arg]) if isinstance(arg, tuple) else arg

    return replace(op, args=tuple([new(arg) for arg in op.args]), kwargs=tuple([(key, new(arg)) for key, arg in op.kwargs]))
