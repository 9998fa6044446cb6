"""Losses as operations that split along the batch: row by row or element by element, then a sum or a mean of its own.

A mean over rows that do not all count (ignored targets, class weights) couples the rows by its divisor. Here the divisor is a value of
its own, made of targets and weights alone: terms of it are summed over ranks, and known before the first of several microbatches.
What follows equals what torch computes to rounding; `aten`'s own kernels for the mean of element-wise losses do the same two steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod

from autopar.ir.graph import Arg, Op, Ref, Symbol, Value
from autopar.ir.rules.families.losses import LOSSES, NONE, SUM
from autopar.ir.tracing.rewriter import Rewriter

_CLASSES = frozenset({"int64", "int32", "uint8"})
_SWAPS = frozenset({"aten.transpose.int", "aten.permute.default"})


class _Writer:
    """Writes the operations that take the place of `op`, named after its result."""

    def __init__(self, rewriter: Rewriter, op: Op) -> None:
        self.rewriter, self.op = rewriter, op
        (self.loss,) = op.outputs
        self.dtype = rewriter.values[self.loss].dtype

    def put(self, what: str, target: str, *args: Arg, shape: tuple[int, ...], of: str = "", kwargs: Mapping[str, Arg] | None = None) -> Ref:
        """A new operation; its result is called `{loss}.{what}`, or is the loss itself where `what` is empty. `of`: its
        dtype where it is not the loss's."""
        name = f"{self.loss}.{what}" if what else self.loss
        self.rewriter.values[name] = Value(name, shape, of or self.dtype)
        op = replace(self.op, name=f"{self.op.name}.{what}" if what else self.op.name, outputs=(name,))
        self.rewriter.ops.append(replace(op, target=target, args=args, kwargs=tuple((kwargs or {}).items())))
        return Ref(name)

    def shape(self, ref: Arg) -> tuple[int, ...]:
        assert isinstance(ref, Ref)
        return self.rewriter.values[ref.name].shape


def elementwise(rewriter: Rewriter, op: Op, read: set[str]) -> bool:
    """`mse_loss(x, y, reduction)` and its kin: without reduction, then `mean` or `sum`."""
    position, rows = LOSSES[op.target]
    reduction = op.arg(position, "reduction", 1)
    if reduction == NONE:
        return False
    write = _Writer(rewriter, op)
    shape = rows([write.shape(Ref(name)) for name in op.operands])
    args, kwargs = list(op.args), dict(op.kwargs)
    if position < len(args):
        args[position] = NONE
    else:
        kwargs["reduction"] = NONE
    each = write.put("rows", op.target, *args, shape=shape, kwargs=kwargs)
    write.put("", "aten.sum.default" if reduction == SUM else "aten.mean.default", each, shape=())
    return True


def cross_entropy(rewriter: Rewriter, op: Op, read: set[str]) -> bool:
    """`cross_entropy_loss(x, target, weight, reduction, ignore_index, label_smoothing)`.

    - Classes as targets, a mean or a sum, no class weights, `x`: `(m, v)`:
      `autopar.cross_entropy(x, target, ignore_index, label_smoothing) -> (loss_sum, weight_sum)`, and their quotient for a mean.
      `loss_sum`: the sum of the losses of the rows whose target is not `ignore_index`; `weight_sum`: the number of such rows, in the
      dtype of the loss. The same for `x`: `(n, v, ...)` where the model has just moved the classes there from the end.
    - Other classes as targets: a loss for each row, summed, over the sum of the weights of the targets.
    - Probabilities as targets: a loss for each row, then the sum or the mean.
    """
    x, target, weight = op.args[0], op.args[1], op.arg(2, "weight")
    reduction, ignored, smoothing = op.arg(3, "reduction", 1), op.arg(4, "ignore_index", -100), op.arg(5, "label_smoothing", 0.0)
    assert isinstance(x, Ref) and isinstance(target, Ref)
    write = _Writer(rewriter, op)
    shape, rows = write.shape(x), write.shape(target)
    if reduction == NONE or len(shape) < 2:
        return False
    if rewriter.values[target.name].dtype not in _CLASSES:
        each = write.put("rows", op.target, x, target, weight, NONE, -100, smoothing, shape=(shape[0], *shape[2:]))
        write.put("", "aten.sum.default" if reduction == SUM else "aten.mean.default", each, shape=())
        return True
    moved = len(shape) > 2 and any(done.target in _SWAPS and x.name in done.outputs for done in rewriter.ops)
    if weight is None and (len(shape) == 2 or moved):
        if moved:
            back = write.put("last", "aten.permute.default", x, (0, *range(2, len(shape)), 1), shape=(*rows, shape[1]))
            x = write.put("x", "aten.view.default", back, (prod(rows), shape[1]), shape=(prod(rows), shape[1]))
            kind = rewriter.values[target.name].dtype
            target = write.put("target", "aten.view.default", target, (prod(rows),), shape=(prod(rows),), of=kind)
        _of_rows(write, x, target, reduction, ignored, smoothing)
        return True
    each = write.put("rows", op.target, x, target, weight, NONE, ignored, smoothing, shape=rows)
    _summed(write, each, target, weight, reduction, ignored)
    return True


def _of_rows(write: _Writer, x: Ref, target: Ref, reduction: Arg, ignored: Arg, smoothing: Arg) -> None:
    loss, op = write.loss, write.op
    total, count = loss if reduction == SUM else f"{loss}.sum", f"{loss}.count"
    scalar = write.rewriter.values[loss]
    write.rewriter.values |= {name: replace(scalar, name=name) for name in (total, count)}
    args = (x, target, ignored, smoothing)
    whole = replace(op, name=f"{op.name}.sum", target="autopar.cross_entropy", args=args, kwargs=(), outputs=(total, count))
    write.rewriter.ops.append(whole)
    if reduction != SUM:
        write.put("", "aten.div.Tensor", Ref(total), Ref(count), shape=())


def nll(rewriter: Rewriter, op: Op, read: set[str]) -> bool:
    """`nll_loss(x, target, weight, reduction, ignore_index)` and its forms with space: a loss for each row, summed, over the sum of the
    weights of the targets."""
    x, target, weight = op.args[0], op.args[1], op.arg(2, "weight")
    reduction, ignored = op.arg(3, "reduction", 1), op.arg(4, "ignore_index", -100)
    assert isinstance(target, Ref)
    write = _Writer(rewriter, op)
    if reduction == NONE or len(write.shape(x)) < 2:
        return False
    each = write.put("rows", op.target, x, target, weight, NONE, ignored, shape=write.shape(target))
    _summed(write, each, target, weight, reduction, ignored)
    return True


def _summed(write: _Writer, each: Ref, target: Ref, weight: Arg, reduction: Arg, ignored: Arg) -> None:
    """The sum of the rows `each`, and for a mean the sum of the weights of their targets (else their number) and the quotient."""
    if reduction == SUM:
        write.put("", "aten.sum.default", each, shape=())
        return
    rows, kind = write.shape(target), write.rewriter.values[target.name].dtype
    total = write.put("sum", "aten.sum.default", each, shape=())
    counts = write.put("valid", "aten.ne.Scalar", target, ignored, shape=rows, of="bool")
    if weight is None:
        count = write.put("count", "aten.sum.default", counts, shape=(), kwargs={"dtype": Symbol(f"torch.{write.dtype}")})
    else:
        known = write.put("class", "aten.where.ScalarOther", counts, target, 0, shape=rows, of=kind)
        weights = write.put("weights", "aten.index.Tensor", weight, (known,), shape=rows)
        counted = write.put("counted", "aten.where.ScalarOther", counts, weights, 0, shape=rows)
        count = write.put("count", "aten.sum.default", counted, shape=())
    write.put("", "aten.div.Tensor", total, count, shape=())


def broadcast(rewriter: Rewriter, op: Op, read: set[str]) -> bool:
    """`broadcast_tensors([x, y, ...])`: an `expand` each, which is gone where the shape is that already."""
    (tensors,) = op.args
    assert isinstance(tensors, tuple)
    for index, (tensor, name) in enumerate(zip(tensors, op.outputs, strict=True)):
        shape = rewriter.values[name].shape
        expand = replace(op, name=f"{op.name}.{index}", target="aten.expand.default", args=(tensor, shape), outputs=(name,))
        rewriter.ops.append(expand)
    return True


FORMS: dict[str, Callable[[Rewriter, Op, set[str]], bool]] = {
    **dict.fromkeys(LOSSES, elementwise),
    **dict.fromkeys(("aten.nll_loss.default", "aten.nll_loss_nd.default", "aten.nll_loss2d.default"), nll),
    "aten.cross_entropy_loss.default": cross_entropy,
    "aten.broadcast_tensors.default": broadcast,
}
"""What takes an operation's place: functions that write it and say whether they did."""
