"""One element of every row, `x[arange(n), index]`, said so that the rows are seen to be independent.

Indexed by a tensor of positions, a dim is needed whole, since any position may be in it. Here the positions of the first dim are just
all of them in order, which its `arange` tells: as a `gather` along the second dim the rows split, over ranks and over microbatches.
Classification by the last token of a sequence is written like this.
"""

from __future__ import annotations

from dataclasses import replace

from autopar.ir.graph import Arg, Graph, Op, Ref, Symbol, Value
from autopar.ir.tracing.rewriter import Rewriter

_INTEGERS = frozenset({"int64", "int32", "int16", "uint8"})


def pick(rewriter: Rewriter, op: Op, read: set[str]) -> bool:
    """`index(x (n, m, ...), [arange(n), index (n,)]) -> (n, ...)`. Indices may count from the end, as `index` allows; such that are
    outside of the dim are still refused when it runs."""
    x, places = op.args[0], op.args[1]
    if not isinstance(x, Ref) or not isinstance(places, tuple) or len(places) != 2:
        return False
    rows, index = places
    if not isinstance(rows, Ref) or not isinstance(index, Ref):
        return False
    shape, given = rewriter.values[x.name].shape, rewriter.values[index.name]
    count = shape[0]
    if given.shape != (count,) or given.dtype not in _INTEGERS or not counts_up(rewriter.graph, rows.name, count):
        return False
    (result,) = op.outputs
    dtype = rewriter.values[result].dtype

    def put(what: str, target: str, *args: Arg, shape: tuple[int, ...], dtype: str, kwargs: tuple[tuple[str, Arg], ...] = ()) -> Ref:
        name = f"{result}.{what}" if what else result
        if what:
            rewriter.values[name] = Value(name, shape, dtype)
        named = op.name if not what else f"{op.name}.{what}"
        rewriter.ops.append(replace(op, name=named, target=target, args=args, kwargs=kwargs, outputs=(name,)))
        return Ref(name)

    if given.dtype != "int64":
        index = put("wide", "aten._to_copy.default", index, shape=(count,), dtype="int64", kwargs=(("dtype", Symbol("torch.int64")),))
    below = put("below", "aten.lt.Scalar", index, 0, shape=(count,), dtype="bool")
    around = put("around", "aten.add.Tensor", index, shape[1], shape=(count,), dtype="int64")
    place = put("place", "aten.where.self", below, around, index, shape=(count,), dtype="int64")
    column = put(
        "column", "aten.view.default", place, (count, *(1,) * (len(shape) - 1)), shape=(count, *(1,) * (len(shape) - 1)), dtype="int64"
    )
    wanted = (count, 1, *shape[2:])
    if len(shape) > 2:
        column = put("wanted", "aten.expand.default", column, wanted, shape=wanted, dtype="int64")
    found = put("found", "aten.gather.default", x, 1, column, shape=wanted, dtype=dtype)
    put("", "aten.view.default", found, (count, *shape[2:]), shape=(count, *shape[2:]), dtype=dtype)
    return True


def counts_up(graph: Graph, name: str, count: int) -> bool:
    """Whether the value is `0, 1, ..., count - 1`."""
    op = graph.producers.get(name)
    if op is None or graph.values[name].dtype not in _INTEGERS:
        return False
    numbers = tuple(arg for arg in op.args)
    return (op.target, numbers) in (
        ("aten.arange.default", (count,)),
        ("aten.arange.start", (0, count)),
        ("aten.arange.start_step", (0, count)),
        ("aten.arange.start_step", (0, count, 1)),
    )


FORMS = {"aten.index.Tensor": pick}
