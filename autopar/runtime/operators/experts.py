"""Routed experts whose tensors are split over mesh axes (`autopar.ir.experts`, splits `e` and `n+e`).

On an axis with split `e` every rank has all tokens and computes the rows of its own experts; what the ranks have are terms of a sum.
On an axis with split `n+e` every rank has its own tokens: it sends each once to every rank that holds an expert of it, together with
the weights of the experts there, and gets back the sum of what these experts give for it (Lepikhin et al. 2020, "GShard"; sending a
token once a rank and not once an expert as DeepSeek-AI 2024, "DeepSeek-V3", section 3.2.2). Nothing is dropped. How many tokens go where
is known only when they do: counts are exchanged first, and the host waits for them. With two such axes tokens travel over one and then
over the other. The backward pass takes the same ways back; gradients of the tensors come out complete on the rank that holds them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.ir.placement import chunk
from autopar.ir.rules.expert_operators import collect, experts_of, spread
from autopar.ir.rules.local_context import AxisContext, LocalContext
from autopar.ir.rules.operators import operator
from autopar.runtime.collectives import resolve

NOWHERE = -1
"""The id of no expert."""


@dataclass(frozen=True, slots=True)
class Way:
    """Rows on their way over the ranks of a group: how many this rank sends to each and gets from each."""

    sent: tuple[int, ...]
    received: tuple[int, ...]
    group: str

    def back(self) -> Way:
        return Way(self.received, self.sent, self.group)

    def move(self, rows: Tensor) -> Tensor:
        """Rows `(sum(sent), ...)` in the order of where they go -> rows `(sum(received), ...)` in the order of where they are from."""
        out = rows.new_empty((sum(self.received), *rows.shape[1:]))
        dist.all_to_all_single(out, rows.contiguous(), list(self.received), list(self.sent), group=resolve(self.group))
        return out


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, way: Way) -> Tensor:
        ctx.way = way
        return way.move(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.way.back().move(gradients[0]), None


def move(rows: Tensor, way: Way) -> Tensor:
    moved: Tensor = _Move.apply(rows, way)  # type: ignore[no-untyped-call]
    return moved


@lru_cache(maxsize=1024)
def owners(count: int, sizes: tuple[int, ...], position: int) -> tuple[int, ...]:
    """For each of `count` experts, cut over axes of `sizes` one within the other, the index of its rank on the axis at `position`."""

    def index_of(expert: int) -> int:
        start, length = 0, count
        for axis, size in enumerate(sizes[: position + 1]):
            step = -(-length // size)
            index = (expert - start) // step
            if axis == position:
                return index
            offset, length = chunk(length, size, index)
            start += offset
        raise AssertionError("the axis is one of those before")

    return tuple(map(index_of, range(count)))


@torch.compiler.disable  # type: ignore[untyped-decorator]  # sizes that depend on data
def experts(args: Sequence[Any], kwargs: Mapping[str, Any], context: LocalContext) -> Tensor:
    """`autopar.experts(x (n_local, h), ids (n_local, k), weights (n_local, k) or None, [tensors (e_local, ...)], body)`."""
    x, ids, weights, tensors, body = args[:5]
    first = 2 if weights is None else 3
    count = context.operand_shapes[first][0]
    sizes = tuple(axis.size for axis in context.axes)
    owner = [torch.tensor(owners(count, sizes, position), device=ids.device) for position in range(len(sizes))]
    ids = torch.where((ids >= 0) & (ids < count), ids, NOWHERE)
    for axis, own in zip(context.axes, owner, strict=True):
        if not exchanges(axis):
            ids = ids.masked_fill(own[ids] != axis.index, NOWHERE)
    way = [(axis, own) for axis, own in zip(context.axes, owner, strict=True) if exchanges(axis)]
    return _over(way, x, ids, weights, tensors, body, context)


def exchanges(axis: AxisContext) -> bool:
    """Whether the ranks of the axis have different tokens."""
    return axis.split.startswith("n+e")


def _over(
    axes: list[tuple[AxisContext, Tensor]], x: Tensor, ids: Tensor, weights: Tensor | None, tensors: Sequence[Tensor], body: str,
    context: LocalContext,
) -> Tensor:  # fmt: skip
    """The sums of all experts on the ranks of `axes`, over which tokens are still to be sent."""
    if not axes:
        start, length = context.part(context.operand_shapes[2 if weights is None else 3][0])
        assert all(item.shape[0] == length for item in tensors)
        return experts_of(x, ids, weights, tensors, body, operator, start)
    (axis, owner), *inner = axes
    tokens, slots = ids.shape[0], min(ids.shape[1], axis.size)
    ranks = owner[ids].masked_fill(ids == NOWHERE, NOWHERE)
    there = torch.stack([(ranks == rank).any(1) for rank in range(axis.size)])  # (ranks, tokens)
    rank, token = there.nonzero(as_tuple=True)
    place = token * slots + there.cumsum(0)[rank, token] - 1
    way = _way(there.sum(1), axis)
    sent = ids[token].masked_fill(ranks[token] != rank[:, None], NOWHERE)
    received = way.move(sent)
    rows = move(spread(x, token, place, slots), way)
    their_weights = None if weights is None else move(spread(weights, token, place, slots), way)
    given = _over(inner, rows, received, their_weights, tensors, body, context)
    return collect(move(given, way.back()), token, place, tokens, slots)


def _way(counts: Tensor, axis: AxisContext) -> Way:
    """What goes to and comes from every rank of `axis`, of which this rank sends `counts`. The host waits for it."""
    theirs = torch.empty_like(counts)
    dist.all_to_all_single(theirs, counts.contiguous(), group=resolve(axis.group))
    sent, received = torch.stack((counts, theirs)).tolist()
    return Way(tuple(sent), tuple(received), axis.group)
