"""Equal rows of whole numbers: what `numpy.unique(axis=0)` says, several times faster, since it sorts column by column."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


def equal_rows(*columns: NDArray[np.integer]) -> tuple[Ints, Ints]:
    """`(first, number)`: the row at which each distinct row first occurs, distinct rows in lexicographic order; and for every row the
    number of its distinct row, shape `(rows,)`. All columns are as long."""
    count = len(columns[0])
    order = np.lexsort(columns[::-1])  # stable: of equal rows the first comes first
    new = np.zeros(count, np.bool_)
    new[:1] = True
    for column in columns:
        ordered = column[order]
        new[1:] |= ordered[1:] != ordered[:-1]
    number = np.empty(count, np.int64)
    number[order] = np.cumsum(new) - 1
    return order[new], number


def groups_of(*columns: NDArray[np.integer]) -> list[Ints]:
    """The numbers of the rows that are equal in all columns, ascending; groups in the order in which they begin."""
    first, number = equal_rows(*columns)
    order = np.argsort(number, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(number[order])) + 1)
    return [groups[at] for at in np.argsort(first)]
