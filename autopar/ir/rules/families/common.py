"""What the families share: dims counted from the front, and terms of one loop a dim."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from autopar.ir.rules.nest import Call, Nest, Term

Family = Callable[[Call], Nest | None]


def positive(dim: int, rank: int) -> int:
    """`dim` counted from the front of a tensor of `rank` dims."""
    return dim + rank if dim < 0 else dim


def dims(given: Iterable[int] | None, rank: int) -> frozenset[int]:
    """The dims of a reduction, counted from the front; none given means all."""
    found = frozenset(positive(dim, rank) for dim in given or ())
    return found or frozenset(range(rank))


def names(rank: int) -> Term:
    """`d0 d1 ...`: one loop a dim."""
    return tuple((f"d{index}",) for index in range(rank))


def sizes(shape: tuple[int, ...]) -> dict[str, int]:
    return {f"d{index}": size for index, size in enumerate(shape)}


def broadcast(shape: tuple[int, ...], result: tuple[int, ...]) -> Term:
    """The term of an operand of `shape` that is broadcast to a result whose dims are `d0 d1 ...`."""
    offset = len(result) - len(shape)
    assert offset >= 0, f"{shape} does not broadcast to {result}"
    return tuple((f"d{offset + index}",) if size == result[offset + index] else () for index, size in enumerate(shape))
