"""Where a value's change of placement is shared by several readers: identity operations `autopar.reshard`.

The rule. A value (input, parameter, buffer, constant or result) has its readers grouped by operator and by layer. Each group of two or
more operations reads the value through one `autopar.reshard(value)` of its own, placed directly before the group's first reader; a
group of one reads the value itself. So the all-gather in front of q, k and v is decided, paid and run once, while the residual
addition, another operator, keeps reading the value as it was made.

"By layer" keeps repeated layers equal to each other, operation by operation: what every layer reads (rotary embeddings, a mask) gets a
reshard in each layer that reads it twice, instead of one in the first layer that all others hang on. A layer is one of several siblings
in the tree of modules (`layers.0`, `layers.1`, ..., or several calls of one module) of which two do the same operations on the same
shapes and one works on what the other gives. The outermost such siblings count. Siblings that work side by side (experts, heads) are no
layers, so they share their reshard. Operations outside of all layers are one group.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from autopar.ir.graph import Arg, Graph, Op, Ref, Value

RESHARD = "autopar.reshard"


def add_reshard_points(graph: Graph) -> Graph:
    """`graph` with an `autopar.reshard` in front of each group of readers. Modules may carry call numbers (`layer@1`)."""
    layer = layer_of(graph)
    groups: dict[tuple[str, str, int], list[int]] = {}
    for index, op in enumerate(graph.ops):
        for name in dict.fromkeys(op.operands):
            groups.setdefault((name, op.target, layer[index]), []).append(index)
    points: dict[int, list[tuple[str, list[int]]]] = {}
    for (name, _, _), readers in groups.items():
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
        if type(arg) is Ref:
            return Ref(stands_for.get(arg.name, arg.name))
        return tuple([new(item) for item in arg]) if type(arg) is tuple else arg

    args, kwargs = tuple([new(arg) for arg in op.args]), tuple([(key, new(arg)) for key, arg in op.kwargs])
    return Op(op.name, op.target, args, kwargs, op.outputs, op.module, op.source)


def layer_of(graph: Graph) -> list[int]:
    """For each operation the number of the layer it stands in, 0 outside of all layers."""
    ops = graph.ops
    paths = [op.module.split(".") for op in ops]
    does: list[tuple[object, ...]] = [(op.target, *(graph.values[name].shape for name in op.outputs)) for op in ops]
    layer = [0] * len(ops)
    count = 0

    def visit(inside: Sequence[int], depth: int) -> None:
        nonlocal count
        children: dict[str, list[int]] = {}
        for index in inside:
            if len(paths[index]) > depth:
                children.setdefault(paths[index][depth], []).append(index)
        families: dict[str, list[str]] = {}
        for name in children:
            families.setdefault(re.sub(r"^\d+(@\d+)?$", "#", name).partition("@")[0], []).append(name)
        for names in families.values():
            if len(names) > 1 and _are_layers([children[name] for name in names], ops, does):
                for name in names:
                    count += 1
                    for index in children[name]:
                        layer[index] = count
            else:
                for name in names:
                    visit(children[name], depth + 1)

    visit(range(len(ops)), 0)
    return layer


def _are_layers(siblings: list[list[int]], ops: tuple[Op, ...], does: list[tuple[object, ...]]) -> bool:
    """Whether two of the siblings do the same, and the second of them works on what the first gives, maybe by way of others."""
    first_of: dict[tuple[tuple[object, ...], ...], list[int]] = {}
    for sibling in siblings:
        work = tuple([does[index] for index in sibling])
        if (first := first_of.setdefault(work, sibling)) is sibling:
            continue
        mine, seconds = set(first), set(sibling)
        reached: set[str] = set()
        for index in range(first[0], sibling[-1] + 1):
            if index in mine or not reached.isdisjoint(ops[index].operands):
                if index in seconds:
                    return True
                reached.update(ops[index].outputs)
        return False
    return False
