"""Stages that are alike: equal graphs but for names, so that what was decided for one can be taken over for another."""

from __future__ import annotations

from collections.abc import Hashable

from autopar.ir.graph import Arg, Graph, Ref


def form(graph: Graph) -> Hashable:
    """Equal for graphs that differ in nothing but names of values, operations, modules and parameters.

    Values are numbered in the order in which they are first met, so equal forms have equal operations, wiring and results in order."""
    kinds = graph.source_kind
    numbers: dict[str, int] = {}
    rows: list[Hashable] = []

    def number(name: str) -> int:
        found = numbers.get(name)
        if found is None:
            found = numbers[name] = len(numbers)
            value = graph.values[name]
            rows.append((kinds.get(name, ""), value.shape, value.dtype, value.requires_grad))
        return found

    def canonical(arg: Arg) -> Hashable:
        if isinstance(arg, Ref):
            return ("value", number(arg.name))
        if isinstance(arg, tuple):
            return tuple([canonical(item) for item in arg])
        return (type(arg).__name__, arg)

    for op in graph.ops:
        args = tuple([canonical(arg) for arg in op.args]), tuple([(key, canonical(arg)) for key, arg in op.kwargs])
        rows.append((op.target, args, tuple([number(name) for name in op.outputs])))
    rows.append(tuple([number(item.value) for item in graph.outputs]))
    rows.append(tuple([(number(item.value), number(item.updated)) for item in graph.buffers if item.updated is not None]))
    # The order of parameters is that of their nodes.
    rows.append(tuple([numbers.get(item.value, -1) for item in graph.parameters]))
    return tuple(rows), graph.training
