"""Vectors and tables stored once, and named by number, with their sums and slices remembered.

Large problems hold few distinct tables: reducing 50,000 edges is a few thousand operations on arrays when what was done to one table is
not done again to its equals. Two numbers are equal exactly when their arrays are.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autopar.search.solver.problem import Floats, Ints

__all__ = ["Interned"]


class Interned:
    """Number to array. Table `t ^ 1` is table `t` transposed; vectors of costs or bytes, and of indices, have numbers of their own."""

    def __init__(self) -> None:
        self.vectors: list[Floats] = []
        self.indices: list[Ints] = []
        self.tables: list[Floats] = []
        self._vector_numbers: dict[bytes, int] = {}
        self._index_numbers: dict[bytes, int] = {}
        self._table_numbers: dict[bytes, int] = {}
        self._known: dict[tuple[Any, ...], Any] = {}

    # ---- arrays to numbers

    def vector(self, values: Floats) -> int:
        key = np.ascontiguousarray(values + 0.0).tobytes()  # + 0.0: there is one zero
        if key not in self._vector_numbers:
            self._vector_numbers[key] = len(self.vectors)
            self.vectors.append(np.frombuffer(key, np.float64))
        return self._vector_numbers[key]

    def index(self, values: Ints) -> int:
        key = np.ascontiguousarray(values, np.int64).tobytes()
        if key not in self._index_numbers:
            self._index_numbers[key] = len(self.indices)
            self.indices.append(np.frombuffer(key, np.int64))
        return self._index_numbers[key]

    def table(self, values: Floats) -> int:
        values = np.ascontiguousarray(values + 0.0)
        key = _digest(values)
        if key not in self._table_numbers:
            number = len(self.tables)
            self.tables += [values, values.T]
            self._table_numbers[key] = number
            self._table_numbers.setdefault(_digest(np.ascontiguousarray(values.T)), number + 1)
        return self._table_numbers[key]

    def once(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """`make()`, remembered under `key`."""
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    # ---- what is asked of one array

    def possible(self, vector: int) -> NDArray[np.bool_] | None:
        """`(n,)`: which entries are finite; None where all are."""
        found: NDArray[np.bool_] | None = self.once(("possible", vector), lambda: _unless_all(self.vectors[vector] < np.inf))
        return found

    def possible_rows(self, table: int) -> NDArray[np.bool_] | None:
        """`(rows,)`: which rows hold a finite entry; None where all do."""
        found: NDArray[np.bool_] | None = self.once(("rows", table), lambda: _unless_all(np.any(self.tables[table] < np.inf, axis=1)))
        return found

    def function(self, table: int) -> int | None:
        """Where every row has exactly one finite entry, the index vector of their columns."""

        def make() -> int | None:
            finite = self.tables[table] < np.inf
            return self.index(finite.argmax(1)) if (finite.sum(1) == 1).all() else None

        found: int | None = self.once(("function", table), make)
        return found

    def separable(self, table: int) -> tuple[int, int] | None:
        """Vectors `u`, `v` where the table is `u[row] + v[column]` throughout, to the last bit."""

        def make() -> tuple[int, int] | None:
            values = self.tables[table]
            at, by = divmod(int(values.argmin()), values.shape[1])  # the least entry: no digits of small costs are lost in large ones
            if not values[at, by] < np.inf:
                return None
            column, row = values[:, by], values[at] - values[at, by]
            return (self.vector(column), self.vector(row)) if (values == column[:, None] + row).all() else None

        found: tuple[int, int] | None = self.once(("separable", table), make)
        return found

    def most(self, vector: int) -> float:
        """The largest entry."""
        return float(self.once(("most", vector), lambda: self.vectors[vector].max()))

    def most_more(self, first: int, second: int) -> float:
        """The most by which an entry of `first` is over that of `second`."""
        return float(self.once(("more", first, second), lambda: (self.vectors[first] - self.vectors[second]).max()))

    # ---- new arrays from old

    def lowered(self, vector: int) -> tuple[float, int]:
        """The least entry, and the vector less that (-1 where nothing is left)."""

        def make() -> tuple[float, int]:
            values = self.vectors[vector]
            least = float(values.min())
            return least, self.vector(values - least) if (values != least).any() else -1

        found: tuple[float, int] = self.once(("lowered", vector), make)
        return found

    def plus(self, first: int, second: int) -> int:
        """The sum of two vectors."""
        return int(self.once(("plus", first, second), lambda: self.vector(self.vectors[first] + self.vectors[second])))

    def taken(self, vector: int, index: int) -> int:
        """`vector[index]`."""
        return int(self.once(("taken", vector, index), lambda: self.vector(self.vectors[vector][self.indices[index]])))

    def composed(self, first: int, second: int) -> int:
        """Of index vectors: `first[second]`."""
        return int(self.once(("composed", first, second), lambda: self.index(self.indices[first][self.indices[second]])))

    def picked(self, table: int, index: int) -> int:
        """The vector of `table[row, index[row]]`."""

        def make() -> int:
            values = self.tables[table]
            return self.vector(values[np.arange(len(values)), self.indices[index]])

        return int(self.once(("picked", table, index), make))

    def row(self, table: int, row: int) -> int:
        """One row as a vector."""
        return int(self.once(("row", table, row), lambda: self.vector(self.tables[table][row])))

    def rows(self, table: int, index: int) -> int:
        """`table[index]`, a table."""
        return int(self.once(("take", table, index), lambda: self.table(self.tables[table][self.indices[index]])))

    def sum(self, first: int, second: int) -> int:
        """The sum of two tables."""
        return int(self.once(("sum", first, second), lambda: self.table(self.tables[first] + self.tables[second])))


def _unless_all(flags: NDArray[np.bool_]) -> NDArray[np.bool_] | None:
    return None if flags.all() else flags


def _digest(values: Floats) -> bytes:
    return b"%d " % values.shape[1] + blake2b(values.tobytes(), digest_size=16).digest()
