"""What a special local implementation is told besides its arguments."""

from __future__ import annotations

from dataclasses import dataclass

from autopar.ir.placement import chunk


@dataclass(frozen=True, slots=True)
class AxisContext:
    """A mesh axis that runs the implementation: the name of its process `group`, its `size`, this rank's `index` on it, and the name of
    the `split` that it runs."""

    group: str
    size: int
    index: int
    split: str = ""


@dataclass(frozen=True, slots=True)
class LocalContext:
    """`target`: the operator. `operand_shapes`: global shapes of the operands, in `op.operands` order. `axes`: the axes whose split
    chose the implementation, outermost first; other axes may split the operands too, by loops that need no implementation.
    `first_shapes`: local shapes of the operands on the first rank, which has the largest parts."""

    target: str
    operand_shapes: tuple[tuple[int, ...], ...]
    axes: tuple[AxisContext, ...]
    first_shapes: tuple[tuple[int, ...], ...] = ()

    def part(self, size: int) -> tuple[int, int]:
        """Start and length of this rank's part of `size` elements that all `axes` split, one within the other."""
        start, length = 0, size
        for axis in self.axes:
            offset, length = chunk(length, axis.size, axis.index)
            start += offset
        return start, length
