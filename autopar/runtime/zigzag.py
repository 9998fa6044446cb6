"""Causal work shared evenly: every rank trades half of its block of the sequence for one of the other end.

Row `i` of causal attention sees `i + 1` keys, so that of contiguous blocks the last rank's would take twice the mean. In half-blocks
`0 ... 2n-1`, rank `r` works on `r` and `2n-1-r`, which together are as much for all (Llama Team 2024, "The Llama 3 herd of models",
section 3.3.2). Outside of attention values stay in contiguous blocks: `exchange` is one all-to-all on the way in and one on the way out.

Where several axes split the sequence, one within the other, the innermost is traded so, and along every outer axis the second half goes
to the rank of mirrored index: again the two halves of every rank add up to `2n-1`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.ir.rules.local_context import AxisContext
from autopar.runtime.collectives import resolve


@dataclass(frozen=True, slots=True)
class Blocks:
    """The ranks among which a sequence is cut in blocks: of `axes`, outermost first."""

    axes: tuple[AxisContext, ...]

    @property
    def count(self) -> int:
        return prod(axis.size for axis in self.axes)

    def number(self, offsets: Sequence[int]) -> int:
        """The block of the rank that is so many places further back on every axis, in a ring."""
        found = 0
        for axis, offset in zip(self.axes, offsets, strict=True):
            found = found * axis.size + (axis.index - offset) % axis.size
        return found

    @property
    def own(self) -> int:
        return self.number((0,) * len(self.axes))

    def lower(self, block: int) -> int:
        """The lower of the two half-blocks that the rank of `block` works on; the upper is `2 n - 1` less it."""
        inner = self.axes[-1].size
        first = block // inner * 2 * inner + block % inner
        return min(first, 2 * self.count - 1 - first)

    def packed(self) -> tuple[list[str], list[int], list[int]]:
        """Plain arguments of an operator: groups, sizes, indices."""
        return [axis.group for axis in self.axes], [axis.size for axis in self.axes], [axis.index for axis in self.axes]


def unpacked(groups: Sequence[str], sizes: Sequence[int], indices: Sequence[int]) -> Blocks:
    return Blocks(tuple(AxisContext(*item) for item in zip(groups, sizes, indices, strict=True)))


def _to_zigzag(xs: Sequence[Tensor], groups: Sequence[str], sizes: Sequence[int], indices: Sequence[int]) -> list[Tensor]:
    blocks = unpacked(groups, sizes, indices)
    first, second = (_pack(xs, half) for half in (0, 1))
    inner = blocks.axes[-1]
    first, second = _trade(first, second, inner, back=False)
    for axis in blocks.axes[:-1]:
        second = _mirror(second, axis)
    if _swapped(blocks):
        first, second = second, first
    return _unpack(first, second, xs)


def _from_zigzag(xs: Sequence[Tensor], groups: Sequence[str], sizes: Sequence[int], indices: Sequence[int]) -> list[Tensor]:
    blocks = unpacked(groups, sizes, indices)
    first, second = (_pack(xs, half) for half in (0, 1))
    if _swapped(blocks):
        first, second = second, first
    for axis in blocks.axes[:-1]:
        second = _mirror(second, axis)
    first, second = _trade(first, second, blocks.axes[-1], back=True)
    return _unpack(first, second, xs)


def _swapped(blocks: Blocks) -> bool:
    inner = blocks.axes[-1].size
    return blocks.lower(blocks.own) != blocks.own // inner * 2 * inner + blocks.own % inner


def _pack(xs: Sequence[Tensor], half: int) -> Tensor:
    """Half of every block along the last but one dim, one behind the other in one flat tensor."""
    parts = [x.narrow(-2, half * (x.shape[-2] // 2), x.shape[-2] // 2).reshape(-1) for x in xs]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _unpack(first: Tensor, second: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    found, start = [], 0
    for x in like:
        shape = (*x.shape[:-2], x.shape[-2] // 2, x.shape[-1])
        size = prod(shape)
        out = _empty(x)
        for half, flat in enumerate((first, second)):
            out.narrow(-2, half * shape[-2], shape[-2]).copy_(flat.narrow(0, start, size).view(shape))
        found.append(out)
        start += size
    return found


def _empty(x: Tensor) -> Tensor:
    """As `x (..., heads, rows, size)`, in memory `(..., rows, heads, size)`: what projections make and read, without a copy."""
    if x.dim() < 3:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return x.new_empty((*x.shape[:-3], x.shape[-2], x.shape[-3], x.shape[-1])).transpose(-3, -2)


def _trade(first: Tensor, second: Tensor, axis: AxisContext, back: bool) -> tuple[Tensor, Tensor]:
    """From half-blocks `2 r` and `2 r + 1` to `r` and `2 n - 1 - r`, or back."""
    n, r, size = axis.size, axis.index, first.numel()
    contiguous, traded = [half // 2 for half in range(2 * n)], [min(half, 2 * n - 1 - half) for half in range(2 * n)]
    source, target = (traded, contiguous) if back else (contiguous, traded)
    mine = [half for half in range(2 * n) if source[half] == r]  # in the order of `first`, `second`
    wanted = [half for half in range(2 * n) if target[half] == r]
    sends = [sum(target[half] == rank for half in mine) * size for rank in range(n)]
    receives = [sum(source[half] == rank for half in wanted) * size for rank in range(n)]
    # On the wire, halves for one rank stand beside each other in their order, ranks in theirs.
    ordered = [part for _, part in sorted(zip(mine, (first, second), strict=True), key=lambda pair: (target[pair[0]], pair[0]))]
    out = first.new_empty(2 * size)
    dist.all_to_all_single(out, torch.cat(ordered), receives, sends, group=resolve(axis.group))
    arrived = sorted(wanted, key=lambda half: (source[half], half))
    parts = dict(zip(arrived, out.split(size), strict=True))  # type: ignore[no-untyped-call]
    return parts[wanted[0]], parts[wanted[1]]


def _mirror(x: Tensor, axis: AxisContext) -> Tensor:
    """Swap with the rank of mirrored index."""
    other = axis.size - 1 - axis.index
    sizes = [x.numel() if rank == other else 0 for rank in range(axis.size)]
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, sizes, sizes, group=resolve(axis.group))
    return out


_library = torch.library.Library("autopar", "FRAGMENT")  # type: ignore[no-untyped-call]
for _name, _function in (("to_zigzag", _to_zigzag), ("from_zigzag", _from_zigzag)):
    _library.define(f"{_name}(Tensor[] xs, str[] groups, int[] sizes, int[] indices) -> Tensor[]")  # type: ignore[no-untyped-call]
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _function, _key)  # type: ignore[no-untyped-call]


def _fake(xs: Sequence[Tensor], groups: Sequence[str], sizes: Sequence[int], indices: Sequence[int]) -> list[Tensor]:
    return [_empty(x) for x in xs]


torch.library.register_fake("autopar::to_zigzag", _fake, lib=_library)
torch.library.register_fake("autopar::from_zigzag", _fake, lib=_library)


def to_zigzag(blocks: Blocks, *xs: Tensor) -> list[Tensor]:
    """`xs (..., rows, size)`, this rank's blocks of the sequence, to its two half-blocks, the lower first. In one exchange."""
    found: list[Tensor] = torch.ops.autopar.to_zigzag.default(list(xs), *blocks.packed())
    return found


def from_zigzag(blocks: Blocks, *xs: Tensor) -> list[Tensor]:
    """Undo `to_zigzag`."""
    found: list[Tensor] = torch.ops.autopar.from_zigzag.default(list(xs), *blocks.packed())
    return found
