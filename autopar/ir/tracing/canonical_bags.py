"""Embedding bags as a look-up and a sum, whose rows, columns and bags all split.

`embedding_bag` finds its bags by offsets into one row of ids, which say nothing of their own part to a rank. A look-up and a sum over
every bag do: where all bags are equally long, along a dim of their own; else each looked-up row is added to its bag's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from autopar.ir.graph import Arg, Op, Ref, Symbol, Value
from autopar.ir.tracing.rewriter import Rewriter

SUM, MEAN, MAX = 0, 1, 2
"""Values of the argument `mode`."""


class _Writer:
    """Writes operations in the place of `op`, named after its first result; `dtype` is that result's."""

    def __init__(self, rewriter: Rewriter, op: Op) -> None:
        self.rewriter, self.op = rewriter, op
        self.result = op.outputs[0]
        self.shape, self.dtype = rewriter.values[self.result].shape, rewriter.values[self.result].dtype

    def put(self, what: str, target: str, *args: Arg, shape: tuple[int, ...], of: str = "", kwargs: Mapping[str, Arg] | None = None) -> Ref:
        """The first result of a new operation, `{result}.{what}`, or the result itself where `what` is empty."""
        name = f"{self.result}.{what}" if what else self.result
        self.rewriter.values[name] = Value(name, shape, of or self.dtype)
        named = f"{self.op.name}.{what}" if what else self.op.name
        op = replace(self.op, name=named, target=f"aten.{target}", args=args, kwargs=tuple((kwargs or {}).items()), outputs=(name,))
        self.rewriter.ops.append(op)
        return Ref(name)


def bag(rewriter: Rewriter, op: Op, read: set[str]) -> bool:
    """`embedding_bag(weight (v, h), ids (n,), offsets, scale_grad_by_freq, mode, sparse, factors (n,), include_last_offset, padding_idx)
    -> (bags, h)` and three results for its own backward pass. What scales gradients by frequency or makes sparse ones stays as it is,
    and so does the largest element of bags that differ in length, or some of whose ids do not count."""
    weight, ids, offsets = op.args[:3]
    mode, factors, padding = op.arg(4, "mode", SUM), op.arg(6, "per_sample_weights"), op.arg(8, "padding_idx", -1)
    assert isinstance(weight, Ref) and isinstance(ids, Ref) and isinstance(offsets, Ref)
    if op.arg(3, "scale_grad_by_freq", False) or op.arg(5, "sparse", False) or any(name in read for name in op.outputs[1:]):
        return False
    write = _Writer(rewriter, op)
    count, width = write.shape
    total = rewriter.values[ids.name].numel
    counted = isinstance(padding, int) and padding >= 0
    length = total // count if count and _even(rewriter, offsets.name, count, total) else 0
    if mode == MAX and (not length or counted):
        return False
    for name in op.outputs[1:]:
        del rewriter.values[name]
    kind = rewriter.values[ids.name].dtype
    lead = (count, length) if length else (total,)
    ids = write.put("ids", "view.default", ids, lead, shape=lead, of=kind)
    rows = write.put("rows", "embedding.default", weight, ids, shape=(*lead, width))
    if factors is not None:
        factors = write.put("factors", "view.default", factors, (*lead, 1), shape=(*lead, 1))
        rows = write.put("scaled", "mul.Tensor", rows, factors, shape=(*lead, width))
    ones = None  # per looked-up row: 1, or 0 where it is padding
    if counted:
        kept = write.put("kept", "ne.Scalar", ids, padding, shape=lead, of="bool")
        ones = write.put("ones", "_to_copy.default", kept, shape=lead, kwargs={"dtype": Symbol(f"torch.{write.dtype}")})
        column = write.put("column", "view.default", ones, (*lead, 1), shape=(*lead, 1))
        rows = write.put("counted", "mul.Tensor", rows, column, shape=(*lead, width))
    if length:
        _along_bags(write, rows, ones, mode, count)
    else:
        _by_bag(write, rows, ones, mode, offsets, total)
    return True


def _along_bags(write: _Writer, rows: Ref, ones: Ref | None, mode: Arg, count: int) -> None:
    """`rows`: `(bags, length, h)`."""
    if mode == MAX:
        write.rewriter.values[f"{write.result}.place"] = Value(f"{write.result}.place", write.shape, "int64")
        best = replace(write.op, target="aten.max.dim", args=(rows, 1), kwargs=(), outputs=(write.result, f"{write.result}.place"))
        write.rewriter.ops.append(best)
    elif mode == MEAN and ones is None:
        write.put("", "mean.dim", rows, (1,), shape=write.shape)
    elif mode == MEAN:
        total = write.put("total", "sum.dim_IntList", rows, (1,), shape=write.shape)
        _divided(write, total, write.put("count", "sum.dim_IntList", ones, (1,), True, shape=(count, 1)))
    else:
        write.put("", "sum.dim_IntList", rows, (1,), shape=write.shape)


def _by_bag(write: _Writer, rows: Ref, ones: Ref | None, mode: Arg, offsets: Ref, total: int) -> None:
    """`rows`: `(ids, h)`. Id `i` is in the last bag that begins at `i` or before, as many as the offsets that are not beyond it."""
    count = write.shape[0]
    places = write.put("places", "arange.start_step", 0, total, 1, shape=(total,), of="int64", kwargs={"dtype": Symbol("torch.int64")})
    begun = write.put("begun", "bucketize.Tensor", places, offsets, shape=(total,), of="int64", kwargs={"right": True})
    bags = write.put("bags", "sub.Tensor", begun, 1, shape=(total,), of="int64")

    def added(what: str, source: Ref, shape: tuple[int, ...]) -> Ref:
        dtype = {"dtype": Symbol(f"torch.{write.dtype}")}
        zeros = write.put(f"{what or 'sum'}.zeros", "full.default", shape, 0, shape=shape, kwargs=dtype)
        return write.put(what, "index_add.default", zeros, 0, bags, source, shape=shape)

    if mode == SUM:
        added("", rows, write.shape)
        return
    if ones is None:
        ones = write.put("ones", "full.default", (total,), 1, shape=(total,), kwargs={"dtype": Symbol(f"torch.{write.dtype}")})
    number = added("count", ones, (count,))
    _divided(write, added("total", rows, write.shape), write.put("number", "view.default", number, (count, 1), shape=(count, 1)))


def _divided(write: _Writer, total: Ref, count: Ref) -> None:
    """The mean of every bag; an empty one's is zero."""
    least = write.put("least", "clamp_min.default", count, 1, shape=(write.shape[0], 1))
    write.put("", "div.Tensor", total, least, shape=write.shape)


def _even(rewriter: Rewriter, name: str, count: int, total: int) -> bool:
    """Whether offsets are `0, n, 2 n, ...` for bags of equal length `n`."""
    op = rewriter.graph.producers.get(name)
    if op is None or not total or total % count:
        return False
    step = total // count
    return op.target == "aten.arange.start_step" and op.args[:3] == (0, total, step)


FORMS = {"aten.embedding_bag.padding_idx": bag, "aten.embedding_bag.default": bag}
