"""Softmax, its normaliser, and losses over classes of which every rank holds a part: a row sends a number or two, classes stay in place.

Each is called as a local implementation (`autopar.runtime.operators.local_ops`). What a rank has no class for is a term of zero, so that
picking a class (`gather`, `nll_loss`) talks to nobody and gives terms of a sum.
After Shoeybi et al. 2019 (Megatron-LM), section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autopar.ir.rules.local_context import AxisContext, LocalContext
from autopar.runtime.operators.local_reduce import all_reduce, refuse_outside, wide

Kwargs = Mapping[str, Any]
Axes = Sequence[AxisContext]


def _largest(x: Tensor, dim: int, axes: Axes) -> Tensor:
    """The maximum over `dim`, kept with size 1, of all ranks."""
    empty = x.shape[dim] == 0  # fewer classes than ranks
    own = x.new_full((*x.shape[:dim], 1, *x.shape[dim + 1 :]), -torch.inf) if empty else x.amax(dim, keepdim=True)
    return all_reduce(own, "max", axes)


class _Softmax(torch.autograd.Function):
    """`x (..., v_local, ...)`. Two all-reduces of a number a row forward, one backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, log: bool, axes: Axes) -> Tensor:
        full = wide(x)
        shifted = full - _largest(full, dim, axes)
        exponentials = shifted.exp()
        total = all_reduce(exponentials.sum(dim, keepdim=True), "sum", axes)
        y = (shifted - total.log() if log else exponentials / total).to(x.dtype)
        ctx.save_for_backward(y)
        ctx.dim, ctx.log, ctx.axes = dim, log, axes
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (y,) = ctx.saved_tensors
        g, full = wide(gradient), wide(y)
        if ctx.log:
            found = g - full.exp() * all_reduce(g.sum(ctx.dim, keepdim=True), "sum", ctx.axes)
        else:
            found = full * (g - all_reduce((g * full).sum(ctx.dim, keepdim=True), "sum", ctx.axes))
        return found.to(gradient.dtype), None, None, None


class _LogSumExp(torch.autograd.Function):
    """`x (..., v_local, ...)` to `(..., 1, ...)`, complete on every rank. Two all-reduces of a number a row forward, none backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, axes: Axes) -> Tensor:
        full = wide(x)
        largest = _largest(full, dim, axes)
        largest = largest.masked_fill(largest.isinf(), 0)
        total = all_reduce((full - largest).exp_().sum(dim, keepdim=True), "sum", axes)
        y = total.log() + largest
        ctx.save_for_backward(x, y)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, y = ctx.saved_tensors
        share = (wide(x) - y).exp_().masked_fill_(y.isneginf(), 0)
        return (share * wide(gradient)).to(x.dtype), None, None


def split_softmax(args: Sequence[Any], kwargs: Kwargs, context: LocalContext) -> Tensor:
    """`softmax(x, dim, dtype)`, `log_softmax`, and the forms `_softmax(x, dim, half_to_float)`."""
    x, dim = args[0], args[1] % args[0].dim()
    third = args[2] if len(args) > 2 else kwargs.get("dtype")
    if third is True:
        x = x.float()
    elif isinstance(third, torch.dtype):
        x = x.to(third)
    result: Tensor = _Softmax.apply(x, dim, "log_softmax" in context.target, context.axes)  # type: ignore[no-untyped-call]
    return result


def split_logsumexp(args: Sequence[Any], kwargs: Kwargs, context: LocalContext) -> Tensor:
    """`logsumexp(x, dim, keepdim)` over the one dim that is split."""
    x, dims = args[0], args[1]
    dim = (dims if isinstance(dims, int) else dims[0]) % x.dim()
    keepdim = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
    result: Tensor = _LogSumExp.apply(x, dim, context.axes)  # type: ignore[no-untyped-call]
    return result if keepdim else result.squeeze(dim)


class _Amax(torch.autograd.Function):
    """`x (..., v_local, ...)` to `(..., 1, ...)`. The gradient is shared by all that are the largest, as torch has it, and by the first of
    them alone where `places`, that one's index `(..., 1, ...)`, is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, largest: Tensor, places: Tensor | None, start: int, axes: Axes) -> Tensor:
        ctx.save_for_backward(x, largest, places)
        ctx.dim, ctx.start, ctx.axes = dim, start, axes
        return largest.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, largest, places = ctx.saved_tensors
        if places is None:
            share = (x == largest).to(gradient.dtype)
            share = share / all_reduce(share.sum(ctx.dim, keepdim=True), "sum", ctx.axes)
        else:
            share = (_places(x, ctx.dim, ctx.start) == places).to(gradient.dtype)
        return (share * gradient, *(None,) * 5)


def split_amax(args: Sequence[Any], kwargs: Kwargs, context: LocalContext) -> Tensor:
    """`amax(x, dim, keepdim)` over the one dim that is split."""
    x, dims = args[0], args[1] if len(args) > 1 else kwargs.get("dim", ())
    dim = (dims if isinstance(dims, int) else (*dims, 0)[0]) % x.dim()
    keepdim = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
    largest = _largest(x.detach(), dim, context.axes)
    result: Tensor = _Amax.apply(x, dim, largest, None, 0, context.axes)  # type: ignore[no-untyped-call]
    return result if keepdim else result.squeeze(dim)


def split_max(args: Sequence[Any], kwargs: Kwargs, context: LocalContext) -> tuple[Tensor, Tensor]:
    """`max(x, dim, keepdim) -> values, indices`: of equal largest numbers the first."""
    x, dim = args[0], args[1] % args[0].dim()
    keepdim = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
    largest = _largest(x.detach(), dim, context.axes)
    places = _first(x.detach(), dim, largest, context)
    start, _ = context.part(context.operand_shapes[0][dim])
    values: Tensor = _Amax.apply(x, dim, largest, places, start, context.axes)  # type: ignore[no-untyped-call]
    return (values, places) if keepdim else (values.squeeze(dim), places.squeeze(dim))


@torch.no_grad()
def split_argmax(args: Sequence[Any], kwargs: Kwargs, context: LocalContext) -> Tensor:
    """`argmax(x, dim, keepdim)`: of equal largest numbers the first. Two all-reduces of a number a row."""
    x, dim = args[0], args[1] if len(args) > 1 else kwargs.get("dim")
    dim = 0 if dim is None else dim % x.dim()  # none is given only where there is one
    keepdim = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
    found = _first(x, dim, _largest(x, dim, context.axes), context)
    return found if keepdim else found.squeeze(dim)


def _first(x: Tensor, dim: int, largest: Tensor, context: LocalContext) -> Tensor:
    """Where along `dim` of the whole the `largest` number of each row stands first, on all ranks."""
    size = context.operand_shapes[0][dim]
    # A NaN is the largest of all, as it is to torch, and equal to nothing.
    own = torch.where((x == largest) | x.isnan(), _places(x, dim, context.part(size)[0]), size)
    first = own.amin(dim, keepdim=True) if x.shape[dim] else torch.full_like(largest, size, dtype=torch.int64)
    return -all_reduce(-first, "max", context.axes)


def _places(x: Tensor, dim: int, start: int) -> Tensor:
    """Positions along `dim` of the whole, shaped to broadcast over this rank's part `x`, which begins at `start`."""
    return torch.arange(start, start + x.shape[dim], device=x.device).view(-1, *(1,) * (x.dim() - 1 - dim))


def _own(index: Tensor, classes: int, context: LocalContext) -> tuple[Tensor, Tensor]:
    """`index` from the first of this rank's classes on, 0 where it is another rank's; and where it is this rank's."""
    start, length = context.part(classes)
    local = index - start
    inside = (local >= 0) & (local < length)
    return local.masked_fill(~inside, 0), inside


def split_gather(args: Sequence[Any], kwargs: Kwargs, context: LocalContext) -> Tensor:
    """`gather(x, dim, index)`, `x` split along `dim`: what this rank holds of it, and zeros."""
    x, dim, index = args[0], args[1] % args[0].dim(), args[2]
    size = context.operand_shapes[0][dim]
    refuse_outside(index, size, "gather: an index is outside the dim")
    local, inside = _own(index, size, context)
    return _picked(x, dim, local, inside)


def _picked(x: Tensor, dim: int, local: Tensor, inside: Tensor) -> Tensor:
    if not x.shape[dim]:
        return x.sum().expand(local.shape)
    return x.gather(dim, local).masked_fill(~inside, 0)


def split_nll(args: Sequence[Any], kwargs: Kwargs, context: LocalContext) -> Tensor:
    """`nll_loss(x (n, v_local, ...), target (n, ...), weight (v_local,), NONE, ignore_index)`: the rows whose class this rank has."""
    x, target = args[0], args[1]
    weight = args[2] if len(args) > 2 else kwargs.get("weight")
    ignored = args[4] if len(args) > 4 else kwargs.get("ignore_index", -100)
    return -_of_classes(x, target, weight, ignored, context)[0]


def _of_classes(x: Tensor, target: Tensor, weight: Tensor | None, ignored: int, context: LocalContext) -> tuple[Tensor, Tensor]:
    """`x` of each row's target, times that class's weight, a term; and which rows count."""
    classes, valid = context.operand_shapes[0][1], target != ignored
    refuse_outside(target.masked_fill(~valid, 0), classes, "nll loss: a target is outside the classes")
    local, inside = _own(target, classes, context)
    inside = inside & valid
    local = local.masked_fill(~inside, 0)
    picked = _picked(x, 1, local.unsqueeze(1), inside.unsqueeze(1)).squeeze(1)
    if weight is not None and weight.shape[0]:
        picked = picked * weight[local]
    return picked, valid


def split_cross_entropy(args: Sequence[Any], kwargs: Kwargs, context: LocalContext) -> Tensor:
    """`cross_entropy_loss(x (n, v_local, ...), target, weight (v_local,), NONE, ignore_index, label_smoothing)`: terms of each row's loss.
    `target`: classes `(n, ...)`, or this rank's part of probabilities `(n, v_local, ...)`."""
    names = ("x", "target", "weight", "reduction", "ignore_index", "label_smoothing")
    given = {"weight": None, "ignore_index": -100, "label_smoothing": 0.0} | dict(kwargs) | dict(zip(names, args, strict=False))
    x, target, weight, smoothing = given["x"], given["target"], given["weight"], given["label_smoothing"]
    classes = context.operand_shapes[0][1]
    logs: Tensor = _Softmax.apply(x, 1, True, context.axes)  # type: ignore[no-untyped-call]
    weighted = logs if weight is None else logs * weight.view(-1, *(1,) * (x.dim() - 2))
    if target.is_floating_point():
        spread: Tensor = target * (1 - smoothing) + smoothing / classes
        return -(weighted * spread).sum(1)
    picked, valid = _of_classes(logs, target, weight, given["ignore_index"], context)
    if smoothing:
        picked = (1 - smoothing) * picked + smoothing / classes * weighted.sum(1).masked_fill(~valid, 0)
    return -picked
