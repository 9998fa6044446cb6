"""The least sum of some tables over one variable they share, compiled: what dear elimination does nearly all the time.

The loops are laid out so that the innermost runs over variables that only one table has, in whose memory they stand together; of the
other tables it needs a number each, as in a product of matrices. About 0.2 ns an entry, where numpy's slices take 1 to 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import numpy as np
from numpy.typing import NDArray

from autopar.search.solver.compiled import compiled
from autopar.search.solver.problem import Floats

__all__ = ["least_sum"]

Ints = NDArray[np.int64]
Item = tuple[tuple[int, ...], Floats]
"""The variables of a table in the order of its axes, and the table."""

# Nanoseconds an entry, measured; they decide between layouts only.
_START_NS, _ENTRY_NS = 2.0, 0.15  # of the innermost loop
_ADD_NS = 2.0  # of two tables, into a third
_MOVE_NS = 4.0  # to another order of axes


def least_sum(variable: int, items: Sequence[Item], sizes: Mapping[int, int]) -> Floats:
    """`min over variable of the sum of items`, with an axis for each of the other variables, in ascending order.

    Every item has `variable`."""
    items = [(variables, _dense(table)) for variables, table in items]
    others = sorted({v for variables, _ in items for v in variables if v != variable})
    by_row = min((_having(v, items) for v in others), key=lambda having: _dear(having, variable, items, sizes))
    made = _added([items[at] for at in sorted(by_row)], sizes)
    numbers = [item for at, item in enumerate(items) if at not in by_row]
    while len(numbers) > 2:
        numbers.sort(key=lambda item: item[1].size)
        with_first = min(numbers[1:], key=lambda item: _joint(sizes, numbers[0], item))
        numbers = [item for item in numbers[1:] if item is not with_first] + [_added([numbers[0], with_first], sizes)]
    none: Item = (variable,), np.zeros(sizes[variable])
    first, second = [*numbers, none, none][:2]
    inner = [v for v in made[0] if v not in first[0] and v not in second[0]]
    largest = max(first, second, key=lambda one: one[1].size)
    outer = sorted((v for v in others if v not in inner), key=lambda v: -_stride(largest, v))  # as the largest lies in memory
    axes = (*[v for v in outer if v in made[0]], variable, *inner)
    position = {v: axis for axis, v in enumerate(made[0])}
    row: Item = axes, np.ascontiguousarray(made[1].transpose([position[v] for v in axes]))
    shape, length = [sizes[v] for v in outer], prod(sizes[v] for v in inner)
    places = [(item[1].ravel(order="K"), _beginnings(item, outer, shape), _stride(item, variable)) for item in (first, second, row)]
    out = np.empty(prod(shape) * length)
    places = [(item[1].ravel(order="K"), _beginnings(item, outer, shape), _stride(item, variable)) for item in (first, second, row)]
    _least(out, *places[0], *places[1], *places[2], length, sizes[variable])
    left = [*outer, *inner]
    return out.reshape([sizes[v] for v in left]).transpose(np.argsort(left, kind="stable"))


def _dense(table: Floats) -> Floats:
    """The table, or a copy that fills its memory in some order of its axes, so that strides say where entries are."""
    return table if np.may_share_memory(table, table.ravel(order="K")) else np.ascontiguousarray(table)


def _having(v: int, items: Sequence[Item]) -> frozenset[int]:
    """Numbers of the items that have a variable."""
    return frozenset(at for at, (variables, _) in enumerate(items) if v in variables)


def _dear(having: frozenset[int], variable: int, items: Sequence[Item], sizes: Mapping[int, int]) -> float:
    """Nanoseconds, about, where the items `having` make the row."""
    scope = {v for at in having for v in items[at][0]}
    rest = [item for at, item in enumerate(items) if at not in having]
    inner = scope.difference(*[variables for variables, _ in rest], (variable,))
    entries = prod(sizes[v] for v in scope.union(*[variables for variables, _ in rest]))
    found = entries * (_ENTRY_NS + _START_NS / prod(sizes[v] for v in inner))
    size = prod(sizes[v] for v in scope)
    return found + size * (_MOVE_NS + _ADD_NS * (len(having) - 1)) + _ADD_NS * sum(sorted(table.size for _, table in rest)[1:-1])


def _joint(sizes: Mapping[int, int], *items: Item) -> int:
    """Entries over the variables of all."""
    return prod(sizes[v] for v in {v for variables, _ in items for v in variables})


def _added(items: Sequence[Item], sizes: Mapping[int, int]) -> Item:
    """The sum of some items, as one."""
    if len(items) == 1:
        return items[0]
    largest = max(items, key=lambda item: item[1].size)
    variables = (*sorted({v for item in items for v in item[0]}.difference(largest[0])), *largest[0])
    total = np.zeros([sizes[v] for v in variables])
    for own, table in items:
        position = {v: axis for axis, v in enumerate(own)}
        there = table.transpose([position[v] for v in variables if v in position])
        total += there[tuple([slice(None) if v in position else None for v in variables])]
    return variables, total


def _stride(item: Item, v: int) -> int:
    """Entries from one value of a variable to the next."""
    return item[1].strides[item[0].index(v)] // item[1].itemsize if v in item[0] else 0


def _beginnings(item: Item, outer: Sequence[int], shape: Sequence[int]) -> Ints:
    """Where in memory the entries of every choice of `outer` begin."""
    found: Ints = np.zeros((), np.int64)
    for v, size in zip(outer, shape, strict=True):
        found = found[..., None] + _stride(item, v) * np.arange(size)
    return found.ravel()


@compiled
def _least(
    out: Floats, one: Floats, one_at: Ints, one_step: int, two: Floats, two_at: Ints, two_step: int,
    row: Floats, row_at: Ints, row_step: int, length: int, size: int,
) -> None:  # fmt: skip
    """`out[r, :] = min over s of one[r, s] + two[r, s] + row[r, s, :]`."""
    for r in range(len(row_at)):
        best = out[r * length : (r + 1) * length]
        for s in range(size):
            number = one[one_at[r] + s * one_step] + two[two_at[r] + s * two_step]
            begin = row_at[r] + s * row_step
            other = row[begin : begin + length]
            if s == 0:
                for i in range(length):
                    best[i] = number + other[i]
            else:
                for i in range(length):
                    total = number + other[i]
                    best[i] = total if total < best[i] else best[i]
