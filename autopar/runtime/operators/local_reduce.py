"""Small reductions over the ranks of an axis, for local implementations: an operator that `torch.compile` does not look into."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.ir.rules.local_context import AxisContext
from autopar.runtime.collectives import resolve


def _reduce(x: Tensor, op: str, group: str) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM, group=resolve(group))
    return out


_library = torch.library.Library("autopar", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("local_reduce(Tensor x, str op, str group) -> Tensor")  # type: ignore[no-untyped-call]
for _key in ("CPU", "CUDA"):
    _library.impl("local_reduce", _reduce, _key)  # type: ignore[no-untyped-call]


@torch.library.register_fake("autopar::local_reduce", lib=_library)  # type: ignore[untyped-decorator]
def _reduce_fake(x: Tensor, op: str, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def all_reduce(x: Tensor, op: str, axes: Sequence[AxisContext]) -> Tensor:
    """The sum or maximum of `x` over the ranks of all `axes`. Carries no gradient."""
    for axis in axes:
        x = torch.ops.autopar.local_reduce.default(x, op, axis.group)
    return x


def all_gather(x: Tensor, axis: AxisContext) -> Tensor:
    """`(size, *x.shape)`: the `x` of every rank of `axis`. For small `x`: it is sent as a sum in which the others are zero."""
    rows = x.new_zeros((axis.size, *x.shape))
    rows[axis.index] = x
    return all_reduce(rows, "sum", (axis,))


def wide(x: Tensor) -> Tensor:
    """`x` in the dtype in which sums over it are kept."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def refuse_outside(index: Tensor, size: int, message: str) -> None:
    """Raise where one device would: no rank owns an index outside `[0, size)`, and all of them would quietly take zeros for it."""
    torch.ops.aten._assert_async.msg(((index >= 0) & (index < size)).all(), message)
