"""Local implementations of operations whose ranks cannot just run the operator on their parts.

A `Split` names its `implementation`; it is called as `fn(args, kwargs, context)`, where `args` and `kwargs` are those of the
operation on this rank (`autopar.ir.rules.local_args`), with tensors. Some talk to the other ranks of the axes that chose them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autopar.ir.rules.local_context import AxisContext, LocalContext
from autopar.runtime.operators import local_classes
from autopar.runtime.operators.experts import experts
from autopar.runtime.operators.experts_even import experts_even
from autopar.runtime.operators.local_reduce import all_gather, all_reduce, refuse_outside, wide
from autopar.runtime.operators.ring_attention import causal_queries, ring_attention

__all__ = ["LOCAL_OPS", "AxisContext", "LocalContext"]

Kwargs = Mapping[str, Any]


# ---- views ----------------------------------------------------------------------------------------------------------------------


def squeeze_part(args: Sequence[Any], kwargs: Kwargs, context: LocalContext) -> Tensor:
    """`squeeze(x, dims)`: drops the dims that are of size 1 in the whole; a part of a longer dim stays, even of size 1."""
    x, dims = _named(args, kwargs, ("x", "dim"), (None,))
    whole = context.operand_shapes[0]
    chosen = range(len(whole)) if dims is None else {dim % len(whole) for dim in ([dims] if isinstance(dims, int) else dims)}
    result: Tensor = x.reshape([size for dim, size in enumerate(x.shape) if dim not in chosen or whole[dim] != 1])
    return result


# ---- the mean over a part -------------------------------------------------------------------------------------------------------


def mean_of_part(args: Sequence[Any], kwargs: Kwargs, context: LocalContext) -> Tensor:
    """`mean(x, dim, keepdim, dtype)`: the sum of the part over the global count, a term of the mean."""
    shape = context.operand_shapes[0]
    x, dims, keepdim, dtype = _named(args, kwargs, ("x", "dim", "keepdim", "dtype"), (None, False, None))
    over = [dims] if isinstance(dims, int) else list(dims or range(len(shape)))
    count = 1
    for dim in over:
        count *= shape[dim]
    summed: Tensor = torch.sum(x, over, keepdim, dtype=dtype)
    return summed / count


# ---- vocabulary -----------------------------------------------------------------------------------------------------------------


def vocab_embedding(args: Sequence[Any], kwargs: Kwargs, context: LocalContext) -> Tensor:
    """`embedding(weight (v_local, h), ids (...), padding_idx)`: rows of this rank's range, zero for all others (Megatron-LM, section 3)."""
    weight, ids = args[0], args[1]
    padding = args[2] if len(args) > 2 else kwargs.get("padding_idx", -1)
    start, length = context.part(context.operand_shapes[0][0])
    assert weight.shape[0] == length
    refuse_outside(ids, context.operand_shapes[0][0], "embedding: an id is outside the vocabulary")
    if not length:  # fewer rows than ranks: nothing to look up, and a gradient of no elements
        nothing: Tensor = weight.sum().expand((*ids.shape, weight.shape[1]))
        return nothing
    local = ids - start
    outside = (local < 0) | (local >= length)
    padding_here = padding - start if start <= padding < start + length else -1
    rows: Tensor = torch.ops.aten.embedding.default(weight, local.masked_fill(outside, 0), padding_here)
    return rows.masked_fill(outside.unsqueeze(-1), 0)


class _VocabCrossEntropy(torch.autograd.Function):
    """Rows are whole on every rank, classes are split. Two all-reduces of one and two (with smoothing three) numbers a row forward,
    none backward. With `lse` the logarithm of the sum of exponentials of a row, `x_t` its target's logit and `mean` its mean:
    `loss = (1 - smoothing) (lse - x_t) + smoothing (lse - mean)`.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, start: int, classes: int, ignore_index: int, smoothing: float, axes: Sequence[AxisContext]
    ) -> tuple[Tensor, Tensor]:
        x = wide(logits)
        valid = target != ignore_index
        refuse_outside(target.masked_fill(~valid, 0), classes, "cross entropy: a target is outside the classes")
        local = target - start
        inside = (local >= 0) & (local < x.shape[1]) & valid
        local = local.masked_fill(~inside, 0).unsqueeze(1)
        own, picked = _of_part(x, local, inside)
        # The normaliser of all classes from those of the parts, as if each part were one class.
        largest = all_reduce(own, "max", axes)
        parts = [(own - largest).exp_(), picked]
        if smoothing:
            parts.append(x.sum(1))
        sums = all_reduce(torch.stack(parts), "sum", axes)
        lse = sums[0].log() + largest
        loss = lse - sums[1]
        if smoothing:
            loss = (1 - smoothing) * loss + smoothing * (lse - sums[2] / classes)
        weight = valid.sum().to(logits.dtype)
        ctx.save_for_backward(logits, lse, local, inside, valid)
        ctx.classes, ctx.smoothing = classes, smoothing
        ctx.mark_non_differentiable(weight)
        return loss.masked_fill(~valid, 0).sum().to(logits.dtype), weight

    @staticmethod
    def backward(ctx: Any, loss_gradient: Tensor, weight_gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, lse, local, inside, valid = ctx.saved_tensors
        gradient = (wide(logits) - lse.unsqueeze(1)).exp_()
        if ctx.smoothing:
            gradient -= ctx.smoothing / ctx.classes
        if gradient.shape[1]:
            hit = inside.to(gradient.dtype).unsqueeze(1) * (1 - ctx.smoothing)
            gradient.scatter_add_(1, local, -hit)
        gradient *= (valid * loss_gradient.to(gradient.dtype)).unsqueeze(1)
        return gradient.to(logits.dtype), None, None, None, None, None, None


def _of_part(x: Tensor, local: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Of this rank's classes `x (m, v_local)`: the logarithm of each row's sum of exponentials `(m,)`, and the target's number, else 0.

    One kernel makes the log-softmax of the part, and the number at the largest place says by how much it was shifted: a third of the
    passes over `x` that maximum, difference, exponential and sum take one by one.
    """
    if x.shape[1] == 0:  # fewer classes than ranks
        return x.new_full(x.shape[:1], -torch.inf), x.new_zeros(x.shape[:1])
    largest, place = x.max(1, keepdim=True)
    own = (largest - x.log_softmax(1).gather(1, place)).squeeze(1)
    own = own.masked_fill(largest.squeeze(1).isneginf(), -torch.inf)
    return own, x.gather(1, local).squeeze(1).masked_fill(~inside, 0)


def vocab_cross_entropy(args: Sequence[Any], kwargs: Kwargs, context: LocalContext) -> tuple[Tensor, Tensor]:
    """`autopar.cross_entropy(logits (m, v_local), target (m,), ignore_index, label_smoothing)`: loss and weight, complete on every rank."""
    logits, target, ignore_index, smoothing = _named(args, kwargs, ("logits", "target", "ignore_index", "label_smoothing"), (-100, 0.0))
    classes = context.operand_shapes[0][1]
    start, length = context.part(classes)
    assert logits.shape[1] == length
    loss, weight = _VocabCrossEntropy.apply(logits, target, start, classes, ignore_index, smoothing, context.axes)  # type: ignore[no-untyped-call]
    return loss, weight


# ---- batch norm -----------------------------------------------------------------------------------------------------------------


class _SyncBatchNorm(torch.autograd.Function):
    """Batch norm over the ranks of `axes`. Statistics are combined pairwise from each part's mean and sum of squares about it (Chan,
    Golub and LeVeque 1979), which loses no digits. Gradients of weight and bias are complete on every rank."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, axes: Sequence[AxisContext]
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        full = wide(x)
        over = [dim for dim in range(x.dim()) if dim != 1]
        count = x.numel() // x.shape[1]
        mean = full.mean(over)
        squares = (full - _channel(mean, x)).square_().sum(over)
        for axis in axes:
            means, sums = all_gather(torch.stack((mean, squares)), axis).unbind(1)
            mean = means.mean(0)
            squares = sums.sum(0) + count * (means - mean).square().sum(0)
            count *= axis.size
        invstd = (squares / count + eps).rsqrt()
        scale = invstd if weight is None else invstd * weight.to(invstd.dtype)
        y = (full - _channel(mean, x)) * _channel(scale, x)
        if bias is not None:
            y = y + _channel(bias.to(y.dtype), x)
        ctx.save_for_backward(x, weight, mean, invstd)
        ctx.axes, ctx.count, ctx.has_bias = axes, count, bias is not None
        variance = squares / max(count - 1, 1)
        ctx.mark_non_differentiable(mean, variance)
        return y.to(x.dtype), mean, variance, count

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd = ctx.saved_tensors
        over = [dim for dim in range(x.dim()) if dim != 1]
        g = wide(gradient)
        normal = (wide(x) - _channel(mean, x)) * _channel(invstd, x)
        sums = all_reduce(torch.stack((g.sum(over), (g * normal).sum(over))), "sum", ctx.axes)
        scale = invstd if weight is None else invstd * weight.to(invstd.dtype)
        inner = g - _channel(sums[0] / ctx.count, x) - normal * _channel(sums[1] / ctx.count, x)
        weight_gradient = None if weight is None else sums[1].to(weight.dtype)
        bias_gradient = sums[0].to(weight.dtype if weight is not None else x.dtype) if ctx.has_bias else None
        return (inner * _channel(scale, x)).to(x.dtype), weight_gradient, bias_gradient, None, None


def _channel(values: Tensor, x: Tensor) -> Tensor:
    """`values (c,)` shaped to broadcast over `x (n, c, ...)`."""
    return values.view(1, -1, *(1,) * (x.dim() - 2))


def sync_batch_norm(args: Sequence[Any], kwargs: Kwargs, context: LocalContext) -> tuple[Tensor, Tensor, Tensor]:
    """`autopar.batch_norm(x (n_local, c, ...), weight, bias, running_mean, running_var, momentum, eps)` with the statistics of the whole
    batch; the running variance is fed the unbiased one, as torch does."""
    names = ("x", "weight", "bias", "running_mean", "running_var", "momentum", "eps")
    x, weight, bias, old_mean, old_var, momentum, eps = _named(args, kwargs, names, ())
    y, mean, variance, _ = _SyncBatchNorm.apply(x, weight, bias, eps, context.axes)  # type: ignore[no-untyped-call]
    new_mean = old_mean.detach() * (1 - momentum) + mean.to(old_mean.dtype) * momentum
    new_var = old_var.detach() * (1 - momentum) + variance.to(old_var.dtype) * momentum
    return y, new_mean, new_var


def _named(args: Sequence[Any], kwargs: Kwargs, names: tuple[str, ...], defaults: tuple[Any, ...]) -> tuple[Any, ...]:
    """All arguments by position, from positions, keywords and the defaults of the last ones."""
    known = dict(zip(names[len(names) - len(defaults) :], defaults, strict=True)) | dict(kwargs) | dict(zip(names, args, strict=False))
    return tuple(known[name] for name in names)


LOCAL_OPS: dict[str, Callable[[Sequence[Any], Kwargs, LocalContext], Any]] = {
    "squeeze_part": squeeze_part,
    "mean_of_part": mean_of_part,
    "vocab_embedding": vocab_embedding,
    "vocab_cross_entropy": vocab_cross_entropy,
    "sync_batch_norm": sync_batch_norm,
    "split_softmax": local_classes.split_softmax,
    "split_logsumexp": local_classes.split_logsumexp,
    "split_amax": local_classes.split_amax,
    "split_max": local_classes.split_max,
    "split_argmax": local_classes.split_argmax,
    "split_gather": local_classes.split_gather,
    "split_nll": local_classes.split_nll,
    "split_cross_entropy": local_classes.split_cross_entropy,
    "causal_queries": causal_queries,
    "ring_attention": ring_attention,
    "causal_ring_attention": ring_attention,
    "experts": experts,
    "experts_even": experts_even,
}
"""Local implementations by the names that splits use."""
