"""Routed experts with a capacity: tokens sent to them in parts of a fixed size (`autopar.ir.experts`, splits `n+e/1.25`).

Every rank sets aside `capacity` times the mean of rows for each expert, `ceil(capacity * tokens * k / experts)`, and sends these places,
full or not, by all-to-alls of equal parts. No counts are exchanged and the host waits for nothing. Rows beyond the capacity of an expert
are dropped: they add nothing to their token. First choices take places before second ones, and earlier tokens before later ones
(Lepikhin et al. 2020, "GShard", algorithm 1). Where nothing is dropped the numbers are those of one device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

import torch
from torch import Tensor

from autopar.ir import experts as routed
from autopar.ir.rules.expert_operators import Sorted, run_body
from autopar.ir.rules.local_context import AxisContext, LocalContext
from autopar.ir.rules.operators import operator
from autopar.runtime.operators.experts import Way, move


class _Fill(torch.autograd.Function):
    """`x (n, ...)`, `place (n, k)` -> `(count, ...)`: row `n` at each of its places, zero elsewhere; place `count` is none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(place)
        out = x.new_zeros((count + 1, *x.shape[1:]))
        for slot in place.unbind(1):
            out[slot] = x
        return out[:count]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        return _taken(gradients[0], place), None, None


class _Take(torch.autograd.Function):
    """`rows (count, ...)`, `place (n, k)` -> `(n, ...)`: the sum of the rows at its places; the transpose of `_Fill`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.count = rows.shape[0]
        return _taken(rows, place)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        out = gradients[0].new_zeros((ctx.count + 1, *gradients[0].shape[1:]))
        for slot in place.unbind(1):
            out[slot] = gradients[0]
        return out[: ctx.count], None


def _taken(rows: Tensor, place: Tensor) -> Tensor:
    rows = torch.cat([rows, rows.new_zeros((1, *rows.shape[1:]))])
    return rows[place].sum(1)


def _fill(x: Tensor, place: Tensor, count: int) -> Tensor:
    rows: Tensor = _Fill.apply(x, place, count)  # type: ignore[no-untyped-call]
    return rows


def places(ids: Tensor, experts: int, capacity: int) -> Tensor:
    """For `ids (n, k)` where each row goes among `experts * capacity` places, those of one expert together; the number of all places where
    the expert has none left, or is none."""
    ordered = ids.t().reshape(-1)  # first choices of all tokens, then second ones
    ordered = torch.where((ordered >= 0) & (ordered < experts), ordered, experts)
    expert, order = torch.sort(ordered, stable=True)
    starts = torch.searchsorted(expert, torch.arange(experts + 1, device=ids.device))
    number = torch.arange(expert.shape[0], device=ids.device) - starts[expert]
    free = (number < capacity) & (expert < experts)
    place = torch.where(free, expert * capacity + number, experts * capacity)
    return torch.empty_like(place).index_copy_(0, order, place).view(ids.shape[1], ids.shape[0]).t()


def experts_even(args: Sequence[Any], kwargs: Mapping[str, Any], context: LocalContext) -> Tensor:
    """`autopar.experts(x (n_local, h), ids (n_local, k), weights (n_local, k) or None, [tensors (e_local, ...)], body)`."""
    x, ids, weights, tensors, body = args[:5]
    count = context.operand_shapes[2 if weights is None else 3][0]
    allowed = float(context.axes[0].split.partition("/")[2])
    most = context.first_shapes[0][0]  # alike on all ranks
    capacity = max(1, ceil(allowed * most * ids.shape[1] / count))
    place = places(ids, count, capacity)
    inputs = [_fill(x, place, count * capacity).view(count, capacity, -1)]
    if weights is not None:
        inputs.append(_fill(weights.reshape(-1), place.reshape(-1, 1), count * capacity).view(count, capacity, 1))
    given = _over(list(context.axes), inputs, tensors, body)
    summed: Tensor = _Take.apply(given.reshape(count * capacity, -1), place)  # type: ignore[no-untyped-call]
    return summed


def _over(axes: list[AxisContext], inputs: list[Tensor], tensors: Sequence[Tensor], body: str) -> Tensor:
    """What the experts of the ranks of `axes` give for the places `(experts, places, ...)`; the last axis holds neighbouring experts."""
    count, own = inputs[0].shape[:2]
    if not axes:
        assert all(item.shape[0] == count for item in tensors)
        expert = torch.arange(count, device=inputs[0].device).repeat_interleave(own)
        ends = torch.arange(own, count * own + 1, own, device=expert.device, dtype=torch.int32)
        values = {routed.X: inputs[0].flatten(0, 1)}
        if len(inputs) > 1:
            values[routed.WEIGHT] = inputs[1].flatten()
        rows = run_body(routed.read(body), values, Sorted(expert, (own,) * count, ends), tensors, operator)
        return rows.view(count, own, -1)
    axis, *inner = axes
    way = Way((count // axis.size,) * axis.size, (count // axis.size,) * axis.size, axis.group)

    def there(x: Tensor) -> Tensor:
        x = move(x, way).view(axis.size, count // axis.size, *x.shape[1:])
        return x.transpose(0, 1).flatten(1, 2)

    given = _over(inner, [there(x) for x in inputs], tensors, body)
    given = given.view(count // axis.size, axis.size, own, -1).transpose(0, 1)
    return move(given.flatten(0, 1), way)
