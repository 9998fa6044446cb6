"""Collectives on the ranks of one mesh axis, as operators that PyTorch can trace.

Each takes and returns *local* tensors and names its process group, so that a traced program stays plain data. They know how
`autopar.ir.placement` cuts dims: in parts of `torch.chunk`'s sizes, the last ones smaller or empty, in one or more blocks. Parts of
unequal size are padded to the largest for the wire and cut again behind it; equal parts along the leading dim travel without a copy.

These operators carry no gradient of their own: which collective is the transpose of which depends on what the ranks do with the
value, and only `autopar.runtime.convert` knows that.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

# Private in PyTorch; should it move: any map from a group's name to the group will do.
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

from autopar.ir.placement import chunk

resolve: Callable[[str], dist.ProcessGroup] = _resolve_process_group  # type: ignore[assignment]


# ---- parts: how a tensor is cut and joined ------------------------------------------------------------------------------------


def _split_dim(x: Tensor, dim: int, sizes: tuple[int, ...]) -> Tensor:
    """`x.unflatten(dim, sizes)`, which PyTorch does not annotate."""
    result: Tensor = x.unflatten(dim, sizes)  # type: ignore[no-untyped-call]
    return result


def part(x: Tensor, dim: int, blocks: int, parts: int, index: int) -> Tensor:
    """Part `index` of `parts` of the whole `x` along `dim`, a view where `blocks` is 1, else a copy."""
    size = x.shape[dim] // blocks
    start, length = chunk(size, parts, index)
    if blocks == 1:
        return x.narrow(dim, start, length)
    return _split_dim(x, dim, (blocks, size)).narrow(dim + 1, start, length).flatten(dim, dim + 1)


def pad_part(x: Tensor, dim: int, blocks: int, size: int, parts: int, index: int) -> Tensor:
    """The whole of `size` along `dim` that has `x` as part `index` of `parts` and zeros elsewhere."""
    start, length = chunk(size // blocks, parts, index)
    whole = x.new_zeros((*x.shape[:dim], size, *x.shape[dim + 1 :]))
    if blocks == 1:
        whole.narrow(dim, start, length).copy_(x)
    else:
        inner = _split_dim(whole, dim, (blocks, size // blocks)).narrow(dim + 1, start, length)
        inner.copy_(_split_dim(x, dim, (blocks, length)))
    return whole


def largest(size: int, blocks: int, parts: int) -> int:
    """Length of the largest part of one block."""
    return -(-(size // blocks) // parts)


def stretch(x: Tensor, dim: int, blocks: int, to: int) -> Tensor:
    """`x` with each block along `dim` padded by zeros to `to`."""
    length = x.shape[dim] // blocks
    if length == to:
        return x
    shape = (*x.shape[:dim], blocks, to, *x.shape[dim + 1 :])
    out = x.new_zeros(shape)
    if length:
        out.narrow(dim + 1, 0, length).copy_(_split_dim(x, dim, (blocks, length)))
    return out.flatten(dim, dim + 1)


def shrink(x: Tensor, dim: int, blocks: int, length: int) -> Tensor:
    """Undo `stretch`: keep the first `length` of each block along `dim`."""
    padded = x.shape[dim] // blocks
    if length == padded:
        return x
    if blocks == 1:
        return x.narrow(dim, 0, length)
    return _split_dim(x, dim, (blocks, padded)).narrow(dim + 1, 0, length).flatten(dim, dim + 1)


def cut(x: Tensor, dim: int, blocks: int, parts: int) -> Tensor:
    """All parts of the whole `x`, stacked in a new leading dim `(parts, ...)`, each padded to the largest."""
    length = largest(x.shape[dim], blocks, parts)
    x = stretch(x, dim, blocks, length * parts)
    if blocks == 1:
        return _split_dim(x, dim, (parts, length)).movedim(dim, 0)
    return _split_dim(x, dim, (blocks, parts, length)).movedim(dim + 1, 0).flatten(dim + 1, dim + 2)


def join(x: Tensor, dim: int, blocks: int, size: int) -> Tensor:
    """Undo `cut`: from stacked parts `(parts, ...)` the whole of `size` along `dim`."""
    if blocks == 1:
        whole = x.movedim(0, dim).flatten(dim, dim + 1)
    else:
        whole = _split_dim(x, dim + 1, (blocks, -1)).movedim(0, dim + 1).flatten(dim, dim + 2)
    return shrink(whole, dim, blocks, size // blocks)


def join_into(out: Tensor, x: Tensor, dim: int, blocks: int) -> None:
    """`join` the stacked parts `x` into the whole `out`, with one copy where the parts are equal."""
    size, parts = out.shape[dim], x.shape[0]
    if blocks == 1 and size == parts * x.shape[dim + 1]:
        _split_dim(out, dim, (parts, -1)).copy_(x.movedim(0, dim))
    else:
        out.copy_(join(x, dim, blocks, size))


# ---- the wire: contiguous tensors, equal parts ----------------------------------------------------------------------------------


def _is_gloo(group: dist.ProcessGroup) -> bool:
    return bool(dist.get_backend(group) == "gloo")


def _wire(x: Tensor) -> Tensor:
    """`x` as the backends can move it: contiguous, and bytes instead of bool."""
    x = x.contiguous()
    return x.view(torch.uint8) if x.dtype == torch.bool else x


def gather_into(out: Tensor, x: Tensor, group: dist.ProcessGroup, async_op: bool = False) -> dist.Work | None:
    """`out (n, ...)` = the `x (...)` of all `n` ranks, both contiguous."""
    work: dist.Work | None = dist.all_gather_single(out.view(-1), x.view(-1), group=group, async_op=async_op)
    return work


class _Then:
    """A collective in flight that needs `finish` once it has arrived."""

    def __init__(self, work: dist.Work, finish: Callable[[], object]) -> None:
        self.work, self.finish = work, finish

    def wait(self) -> None:
        self.work.wait()
        self.finish()


def reduce_scatter_into(out: Tensor, x: Tensor, group: dist.ProcessGroup, async_op: bool = False) -> dist.Work | _Then | None:
    """`out (...)` = this rank's row of the sum of the `x (n, ...)` of all `n` ranks, both contiguous.

    Gloo's own reduce-scatter is an all-reduce of everything (PyTorch 2.13); exchanging the rows and adding them here moves half.
    """
    if not _is_gloo(group):
        direct: dist.Work | None = dist.reduce_scatter_single(out.view(-1), x.view(-1), group=group, async_op=async_op)
        return direct
    received = torch.empty_like(x)
    work = dist.all_to_all_single(received.view(-1), x.view(-1), group=group, async_op=async_op)
    flat = out.view(-1)
    rows = received.view(group.size(), -1)
    if work is None:
        torch.sum(rows, 0, out=flat)
        return None
    return _Then(work, lambda: torch.sum(rows, 0, out=flat))


# ---- the operators --------------------------------------------------------------------------------------------------------------


def _all_reduce(x: Tensor, group: str) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=resolve(group))
    return out


def _all_gather(x: Tensor, dim: int, blocks: int, size: int, group: str) -> Tensor:
    process_group = resolve(group)
    parts = process_group.size()
    x = stretch(x, dim, blocks, largest(size, blocks, parts))
    wire = _wire(x)
    out = wire.new_empty((parts, *x.shape))
    gather_into(out, wire, process_group)
    return join(out.view(x.dtype), dim, blocks, size).contiguous()


def _reduce_scatter(x: Tensor, dim: int, blocks: int, group: str) -> Tensor:
    process_group = resolve(group)
    length = chunk(x.shape[dim] // blocks, process_group.size(), process_group.rank())[1]
    stacked = cut(x, dim, blocks, process_group.size()).contiguous()
    out = stacked.new_empty(stacked.shape[1:])
    reduce_scatter_into(out, stacked, process_group)
    return shrink(out, dim, blocks, length).contiguous()


def _all_to_all(x: Tensor, dim: int, blocks: int, to_dim: int, to_blocks: int, size: int, group: str) -> Tensor:
    process_group = resolve(group)
    parts = process_group.size()
    length = chunk(x.shape[to_dim] // to_blocks, parts, process_group.rank())[1]
    x = stretch(x, dim, blocks, largest(size, blocks, parts))
    stacked = cut(x, to_dim, to_blocks, parts)
    wire = _wire(stacked)
    out = torch.empty_like(wire)
    dist.all_to_all_single(out.view(-1), wire.view(-1), group=process_group)
    whole = join(out.view(x.dtype), dim, blocks, size)
    return shrink(whole, to_dim, to_blocks, length).contiguous()


_library = torch.library.Library("autopar", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("all_reduce(Tensor x, str group) -> Tensor")  # type: ignore[no-untyped-call]
_library.define("all_gather(Tensor x, int dim, int blocks, int size, str group) -> Tensor")  # type: ignore[no-untyped-call]
_library.define("reduce_scatter(Tensor x, int dim, int blocks, str group) -> Tensor")  # type: ignore[no-untyped-call]
_library.define("all_to_all(Tensor x, int dim, int blocks, int to_dim, int to_blocks, int size, str group) -> Tensor")  # type: ignore[no-untyped-call]
for _name, _function in (
    ("all_reduce", _all_reduce),
    ("all_gather", _all_gather),
    ("reduce_scatter", _reduce_scatter),
    ("all_to_all", _all_to_all),
):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _function, _key)  # type: ignore[no-untyped-call]


def _resized(x: Tensor, dim: int, size: int) -> Tensor:
    return x.new_empty((*x.shape[:dim], size, *x.shape[dim + 1 :]))


@torch.library.register_fake("autopar::all_reduce", lib=_library)  # type: ignore[untyped-decorator]
def _all_reduce_fake(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("autopar::all_gather", lib=_library)  # type: ignore[untyped-decorator]
def _all_gather_fake(x: Tensor, dim: int, blocks: int, size: int, group: str) -> Tensor:
    return _resized(x, dim, size)


@torch.library.register_fake("autopar::reduce_scatter", lib=_library)  # type: ignore[untyped-decorator]
def _reduce_scatter_fake(x: Tensor, dim: int, blocks: int, group: str) -> Tensor:
    process_group = resolve(group)
    return _resized(x, dim, blocks * chunk(x.shape[dim] // blocks, process_group.size(), process_group.rank())[1])


@torch.library.register_fake("autopar::all_to_all", lib=_library)  # type: ignore[untyped-decorator]
def _all_to_all_fake(x: Tensor, dim: int, blocks: int, to_dim: int, to_blocks: int, size: int, group: str) -> Tensor:
    process_group = resolve(group)
    whole = _resized(x, dim, size)
    return _resized(whole, to_dim, to_blocks * chunk(x.shape[to_dim] // to_blocks, process_group.size(), process_group.rank())[1])


all_reduce: Callable[[Tensor, str], Tensor] = torch.ops.autopar.all_reduce.default
"""`all_reduce(x, group)`: the sum of the ranks' `x`, a new tensor."""

all_gather: Callable[[Tensor, int, int, int, str], Tensor] = torch.ops.autopar.all_gather.default
"""`all_gather(x, dim, blocks, size, group)`: the whole, of `size` along `dim`, of which `x` is this rank's part."""

reduce_scatter: Callable[[Tensor, int, int, str], Tensor] = torch.ops.autopar.reduce_scatter.default
"""`reduce_scatter(x, dim, blocks, group)`: this rank's part along `dim` of the sum of the ranks' whole `x`."""

all_to_all: Callable[[Tensor, int, int, int, int, int, str], Tensor] = torch.ops.autopar.all_to_all.default
"""`all_to_all(x, dim, blocks, to_dim, to_blocks, size, group)`: from a part along `dim` (whole: `size`) to a part along `to_dim`."""
