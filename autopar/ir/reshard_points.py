"""Where a value's change of placement is shared by several readers: identity operations `autopar.reshard`.

The rule. A value (input, parameter, buffer, constant or result) read by two or more different operations has its readers grouped by
`target`. A group of two or more reads the value through one `autopar.reshard(value)`, placed directly before the group's first reader;
a group of one reads the value itself. So the all-gather in front of q, k and v is decided, paid and run once, while the residual
addition, another target, keeps reading the value as it was made.
"""

from __future__ import annotations

from dataclasses import replace

from autopar.ir.graph import Arg, Graph, Op, Ref, Value

RESHARD = "autopar.reshard"


def add_reshard_points(graph: Graph) -> Graph:
    """`graph` with an `autopar.reshard` in front of each group of readers."""
    groups: dict[tuple[str, str], list[int]] = {}
    for index, op in enumerate(graph.ops):
        for name in dict.fromkeys(op.operands):
            groups.setdefault((name, op.target), []).append(index)
    points: dict[int, list[tuple[str, list[int]]]] = {}
    for (name, _), readers in groups.items():
        if len(readers) > 1:
            points.setdefault(readers[0], []).append((name, readers))

    taken = set(graph.values) | {op.name for op in graph.ops}
    values: dict[str, Value] = dict(graph.values)
    stands_for: dict[int, dict[str, str]] = {}
    ops: list[Op] = []
    count = 0
    for index, op in enumerate(graph.ops):
        for name, readers in points.get(index, ()):
            while f"reshard_{count}" in taken:
                count += 1
            point = f"reshard_{count}"
            count += 1
            value = values[name]
            values[point] = Value(point, value.shape, value.dtype, value.requires_grad)
            ops.append(Op(point, RESHARD, (Ref(name),), (), (point,), op.module, op.source))
            for reader in readers:
                stands_for.setdefault(reader, {})[name] = point
        ops.append(_reading(op, stands_for[index]) if index in stands_for else op)
    return replace(graph, ops=tuple(ops), values=values)


def _reading(op: Op, stands_for: dict[str, str]) -> Op:
    def new(arg: Arg) -> Arg:
        if isinstance(arg, Ref):
            return Ref(stands_for.get(arg.name, arg.name))
        return tuple(new(item) for item in arg) if isinstance(arg, tuple) else arg

    return replace(op, args=tuple(new(arg) for arg in op.args), kwargs=tuple((key, new(arg)) for key, arg in op.kwargs))
