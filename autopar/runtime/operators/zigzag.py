"""Causal work shared evenly: every rank swaps half of its block of the sequence with the rank at the mirrored place.

Row `i` of causal attention sees `i + 1` keys, so that of contiguous blocks the last rank's would take twice the mean. In half-blocks
`0 ... 2n-1`, the block of rank `r` is `2r` and `2r+1`. It keeps `2r` and swaps the other for `2n-1-2r`, which rank `n-1-r` has: together
they are as much work for all, as in Llama 3's training (Llama Team 2024, "The Llama 3 herd of models", section 3.3.2), and half of a
block moves. Outside of attention values stay in contiguous blocks: there is one such exchange on the way in and one on the way out.

Where several axes split the sequence, one within the other, the half goes to the mirrored place on one axis after the other.
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
        return min(2 * block, 2 * self.count - 1 - 2 * block)

    @property
    def upper_first(self) -> bool:
        """Whether the half that this rank keeps is the upper one of the two that it works on."""
        return self.lower(self.own) != 2 * self.own

    def packed(self) -> tuple[list[str], list[int], list[int]]:
        """Plain arguments of an operator: groups, sizes, indices."""
        return [axis.group for axis in self.axes], [axis.size for axis in self.axes], [axis.index for axis in self.axes]


def unpacked(groups: Sequence[str], sizes: Sequence[int], indices: Sequence[int]) -> Blocks:
    return Blocks(tuple(AxisContext(*item) for item in zip(groups, sizes, indices, strict=True)))


def _to_zigzag(xs: Sequence[Tensor], groups: Sequence[str], sizes: Sequence[int], indices: Sequence[int]) -> list[Tensor]:
    blocks = unpacked(groups, sizes, indices)
    kept, other = _pack(xs, 0), _swapped(_pack(xs, 1), blocks)
    return _unpack(other, kept, xs) if blocks.upper_first else _unpack(kept, other, xs)


def _from_zigzag(xs: Sequence[Tensor], groups: Sequence[str], sizes: Sequence[int], indices: Sequence[int]) -> list[Tensor]:
    blocks = unpacked(groups, sizes, indices)
    kept, other = _pack(xs, int(blocks.upper_first)), _pack(xs, int(not blocks.upper_first))
    return _unpack(kept, _swapped(other, blocks), xs)


def _swapped(x: Tensor, blocks: Blocks) -> Tensor:
    """What the rank at the mirrored place has; where that is this rank, its own."""
    for axis in blocks.axes:
        sizes = [x.numel() if rank == axis.size - 1 - axis.index else 0 for rank in range(axis.size)]
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, sizes, sizes, group=resolve(axis.group))
        x = out
    return x


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
