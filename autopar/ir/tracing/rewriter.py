"""`Rewriter`: a graph read from front to back while a new one is written, for passes that put other operations in place of some."""

from __future__ import annotations

from dataclasses import replace

from autopar.ir.graph import Arg, Graph, Op, Output, Ref


class Rewriter:
    """Builds a new list of operations while reading an old one; `stands_for` maps names of old values to what replaces them."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.values = dict(graph.values)
        self.ops: list[Op] = []
        self.stands_for: dict[str, str] = {}

    def resolved(self, arg: Arg) -> Arg:
        if isinstance(arg, Ref):
            name = self.stands_for.get(arg.name)
            return arg if name is None else Ref(name)
        if isinstance(arg, tuple):
            return tuple(self.resolved(item) for item in arg)
        return arg

    def read(self, op: Op) -> Op:
        """`op` with replaced values in its arguments."""
        if not self.stands_for or self.stands_for.keys().isdisjoint(op.operands):
            return op
        return replace(
            op, args=tuple([self.resolved(arg) for arg in op.args]), kwargs=tuple((key, self.resolved(arg)) for key, arg in op.kwargs)
        )

    def drop(self, op: Op, instead: str) -> None:
        """Leave `op` out; readers of its only result read `instead`."""
        (name,) = op.outputs
        self.stands_for[name] = instead
        del self.values[name]

    def done(self) -> Graph:
        graph, stands_for = self.graph, self.stands_for
        outputs = tuple(Output(stands_for.get(item.value, item.value), item.path) for item in graph.outputs)
        buffers = tuple(
            replace(item, updated=stands_for.get(item.updated, item.updated)) if item.updated is not None else item
            for item in graph.buffers
        )
        return replace(graph, values=self.values, ops=tuple(self.ops), outputs=outputs, buffers=buffers)
