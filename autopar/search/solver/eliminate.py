"""Exact min-sum by variable elimination, in min-plus algebra on numpy tables.

Eliminating a variable replaces the factors that mention it by one over their other variables: the minimum over the variable of their
sum. In any order that leaves the exact minimum; the order only decides how large the tables get. (Bertele and Brioschi 1972;
Dechter 1999, "Bucket elimination".) Where a table would grow over the limit, the factors are split in groups that are minimised
apart: a lower bound instead of the minimum (Dechter and Rish 2003, "Mini-buckets"), and `exact` says so.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from string import ascii_letters

import numpy as np
from numpy.typing import NDArray

from autopar.search.solver.problem import Floats

Ints = NDArray[np.int64]

LIMIT_ENTRIES = 50_000_000
_COMPILED_ENTRIES = 1 << 20  # of a sum: from there on compiled code pays, even if it must be loaded first
_COMPILED_IN_DEAR = 1 << 17  # of a sum on the way to so many in all that it is loaded anyway
_CHEAP_ENTRIES = 1e8
_NOISY_ORDERS = 12
_NOISE_ENTRIES = 5e5  # by variable: fewer take less time than a search for an order with fewer
_IN_VAIN = 3
_MEMO_BYTES = 1 << 28
_HOPELESS = 8  # times the limit on tables: no noise mends that


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """A cost for every choice of `variables`; `table` has one axis per variable, in their order. Variables do not repeat."""

    variables: tuple[int, ...]
    table: Floats


def factor(variables: Sequence[int], table: Floats) -> Factor:
    """A factor whose `variables` may repeat: equal ones are made one axis (the diagonal)."""
    distinct = tuple(dict.fromkeys(variables))
    if len(distinct) < len(variables):
        letter = {v: ascii_letters[axis] for axis, v in enumerate(distinct)}
        table = np.einsum("".join(letter[v] for v in variables) + "->" + "".join(letter.values()), table)
    return Factor(distinct, table)


@dataclass(frozen=True, slots=True)
class Order:
    """Variables in the order in which they go; `largest_entries` and `total_entries` of the tables on the way.

    `left`: pairs of variables that are left joined afterwards.
    """

    variables: tuple[int, ...]
    largest_entries: float
    total_entries: float
    left: tuple[tuple[int, int], ...]


def find_order(sizes: dict[int, int], scopes: Iterable[Sequence[int]], keep: Iterable[int] = ()) -> Order:
    """A good order: the cheapest of some greedy ones.

    `sizes`: strategies per variable; `scopes`: the variables of each factor; those in `keep` are not eliminated. Greedy by the tables
    that eliminating a variable would make necessary (weighted min-fill, Kjaerulff 1990), then by the size of its own table, then
    the first with noise from a fixed seed, as long as the order is not cheap enough and noise may make it so.
    """
    return _found_order(tuple(sizes.items()), tuple([tuple(scope) for scope in scopes]), frozenset(keep))


@lru_cache(maxsize=64)  # one search solves graphs of one structure again and again
def _found_order(items: tuple[tuple[int, int], ...], scopes: tuple[tuple[int, ...], ...], kept: frozenset[int]) -> Order:
    sizes = dict(items)
    best = _greedy(sizes, scopes, kept, _by_fill)
    if best.total_entries > _CHEAP_ENTRIES:
        best = min(best, _greedy(sizes, scopes, kept, _by_weight), key=_dearness)
    in_vain = 0
    for seed in range(_NOISY_ORDERS):
        worth = best.total_entries > _CHEAP_ENTRIES and best.total_entries > _NOISE_ENTRIES * len(sizes)
        if not worth or in_vain == _IN_VAIN or best.largest_entries > _HOPELESS * LIMIT_ENTRIES:
            break
        noise = np.exp(np.random.default_rng(seed).normal(0.0, 0.5, len(sizes)))
        other = _greedy(sizes, scopes, kept, _by_fill, dict(zip(sizes, noise.tolist(), strict=True)))
        in_vain = 0 if other.total_entries < best.total_entries else in_vain + 1
        best = min(best, other, key=_dearness)
    return best


def hopeless(sizes: dict[int, int], scopes: Sequence[Sequence[int]]) -> bool:
    """Whether the order by table size, taken until one is far too large, says that none will do. `find_order` goes on to the end, which
    takes long in just that case: near the end every variable of an entangled graph is joined to all others."""
    return _greedy(sizes, scopes, frozenset(), _by_weight, most=_HOPELESS * LIMIT_ENTRIES).largest_entries > _HOPELESS * LIMIT_ENTRIES


def _dearness(order: Order) -> float:
    return order.total_entries


def _by_fill(v: int, around: dict[int, set[int]], sizes: dict[int, int]) -> float:
    """Entries of the pairwise tables that would appear between neighbours of `v`; ties by its own table, much less."""
    neighbours = around[v]
    twice = 0  # whole numbers add up the same in any order
    for u in neighbours:
        missing = neighbours - around[u]
        if len(missing) > 1:  # `u` is never around itself
            twice += sizes[u] * (sum([sizes[w] for w in missing]) - sizes[u])
    return twice / 2 + 1e-9 * _by_weight(v, around, sizes)


def _by_weight(v: int, around: dict[int, set[int]], sizes: dict[int, int]) -> float:
    """Entries of the table that eliminating `v` needs."""
    return float(sizes[v]) * prod(sizes[u] for u in around[v])


def _greedy(
    sizes: dict[int, int],
    scopes: Sequence[Sequence[int]],
    kept: frozenset[int],
    score: Callable[[int, dict[int, set[int]], dict[int, int]], float],
    noise: dict[int, float] | None = None,
    most: float = np.inf,
) -> Order:
    """The order that always eliminates the variable of least `score` times `noise`, the lowest number among equals.

    It ends where a table has over `most` entries.
    """
    around: dict[int, set[int]] = {v: set() for v in sizes}
    for scope in scopes:
        for v in scope:
            around[v].update(scope)
    for v in around:
        around[v].discard(v)

    def scored(v: int) -> float:
        return score(v, around, sizes) * (noise[v] if noise else 1.0)

    current = {v: scored(v) for v in sizes if v not in kept}
    heap = [(w, v) for v, w in current.items()]
    heapq.heapify(heap)
    order: list[int] = []
    largest = total = 0.0
    while heap and largest <= most:
        w, v = heapq.heappop(heap)
        if current.get(v) != w:
            continue
        del current[v]
        order.append(v)
        entries = _by_weight(v, around, sizes)
        largest, total = max(largest, entries), total + entries
        neighbours = around.pop(v)
        touched = set(neighbours)
        for u in neighbours:
            around[u].discard(v)
            if not neighbours <= around[u] | {u}:
                around[u] |= neighbours
                around[u].discard(u)
                touched |= around[u]
        for u in touched:
            if u in current:
                fresh = scored(u)
                if fresh != current[u]:
                    current[u] = fresh
                    heapq.heappush(heap, (fresh, u))
    left = tuple((v, u) for v in sorted(around) for u in sorted(around[v]) if v < u)
    return Order(tuple(order), largest, total, left)


@dataclass(frozen=True, slots=True)
class Eliminated:
    """What is left: `constant` and the factors in `rest` over variables that were not eliminated, their sum being the minimum.

    `steps` holds the factors met on the way, to choose the eliminated variables again, `messages` what each variable left behind
    (where its factors were not split). `exact` is False where `rest` only bounds the minimum from below.
    """

    rest: tuple[Factor, ...]
    constant: float
    steps: tuple[tuple[int, tuple[Factor, ...]], ...]
    messages: dict[int, Factor]
    exact: bool

    def table(self, keep: Sequence[int], sizes: dict[int, int]) -> Floats:
        """The minimum as one table with an axis per variable in `keep`, which are all that are left."""
        table = np.full(tuple([sizes[v] for v in keep]), self.constant)
        for item in self.rest:
            table += aligned(item, keep)
        return table

    def recover(self, chosen: dict[int, Ints]) -> dict[int, Ints]:
        """Best choices of the eliminated variables, given those of the kept ones.

        `chosen`: per kept variable, indices of shape `(batch,)`. Returns the same for all variables. Ties go to the lowest index.
        """
        chosen = dict(chosen)
        batch = len(next(iter(chosen.values()))) if chosen else 1
        for variable, factors in reversed(self.steps):
            total: Floats = np.zeros((1, 1))
            for item in factors:
                found = item.table[tuple([slice(None) if v == variable else chosen[v] for v in item.variables])]
                total = total + (found.T if item.variables[0] == variable else found)  # (batch, choices)
            best = total.argmin(1)
            chosen[variable] = best if len(best) == batch else np.repeat(best, batch)
        return chosen


class Memo:
    """Messages by what they were made of: where the same tables meet in the same way, as in equal layers or in the next problem that shares
    most tables with the last, nothing is added up twice.

    Variables count by their rank among those of the step, so that equal steps elsewhere in the graph are seen to be equal. Tables count by
    identity, and are kept alive with the entry, so that no other takes their place."""

    def __init__(self) -> None:
        self._found: dict[tuple[object, ...], tuple[Floats, tuple[Factor, ...]]] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._found)

    def message(self, variable: int, factors: tuple[Factor, ...], sizes: dict[int, int], compiled_entries: int) -> Factor:
        """`_minimum` of the factors, looked up."""
        variables = sorted({v for item in factors for v in item.variables})
        rank = {v: at for at, v in enumerate(variables)}
        key = (rank.get(variable), *[(id(item.table), *[rank[v] for v in item.variables]) for item in factors])
        if key in self._found:
            return Factor(tuple([v for v in variables if v != variable]), self._found[key][0])
        found = _minimum(variable, factors, sizes, compiled_entries)
        self._bytes += found.table.nbytes
        if self._bytes > _MEMO_BYTES:
            self._found.clear()
            self._bytes = found.table.nbytes
        self._found[key] = found.table, factors
        return found


def eliminate(
    sizes: dict[int, int],
    factors: Iterable[Factor],
    order: Order,
    limit_entries: int = LIMIT_ENTRIES,
    memo: Memo | None = None,
) -> Eliminated:
    """Minimise the sum of `factors` over the variables in `order`.

    `sizes`: number of choices per variable of the factors, those that stay included. `memo`: where equal steps are remembered.
    """
    pools: dict[int, dict[int, Factor]] = {v: {} for v in sizes}
    constant = 0.0
    exact = True
    number = 0
    steps: list[tuple[int, tuple[Factor, ...]]] = []
    messages: dict[int, Factor] = {}
    compiled_entries = _COMPILED_IN_DEAR if order.total_entries > _CHEAP_ENTRIES else _COMPILED_ENTRIES

    def add(item: Factor) -> None:
        nonlocal number, constant
        for v in item.variables:
            pools[v][number] = item
        number += 1
        if not item.variables:
            constant += float(item.table)

    for item in factors:
        add(item)
    for variable in order.variables:
        bucket = pools.pop(variable)
        for key, item in bucket.items():
            for v in item.variables:
                if v != variable:
                    del pools[v][key]
        steps.append((variable, tuple(bucket.values())))
        for group in _groups(variable, list(bucket.values()), sizes, limit_entries):
            exact &= len(group) == len(bucket)
            if memo is None:
                messages[variable] = _minimum(variable, group, sizes, compiled_entries)
            else:
                messages[variable] = memo.message(variable, tuple(group), sizes, compiled_entries)
            add(messages[variable])
    rest = {key: item for pool in pools.values() for key, item in pool.items()}
    return Eliminated(tuple(rest[key] for key in sorted(rest)), constant, tuple(steps), messages, exact)


def _groups(variable: int, factors: list[Factor], sizes: dict[int, int], limit_entries: int) -> list[list[Factor]]:
    """The factors in as few groups as keep each group's table within the limit: one, but for the worst of graphs."""
    groups: list[tuple[set[int], list[Factor]]] = []
    if prod(sizes[v] for v in {variable}.union(*[item.variables for item in factors])) <= limit_entries:
        return [factors] if factors else [[]]
    for item in sorted(factors, key=lambda item: -item.table.size):
        for scope, members in groups:
            joint = scope.union(item.variables)
            if prod(sizes[v] for v in joint) <= max(limit_entries, item.table.size):
                scope |= joint
                members.append(item)
                break
        else:
            groups.append((set(item.variables), [item]))
    return [members for _, members in groups]


def aligned(item: Factor, scope: Sequence[int]) -> Floats:
    """The factor's table with an axis for every variable in `scope`, of length 1 where it does not depend on it."""
    position = {v: axis for axis, v in enumerate(item.variables)}
    table = item.table.transpose([position[v] for v in scope if v in position])
    return table[tuple([slice(None) if v in position else None for v in scope])]


def _minimum(variable: int, factors: Sequence[Factor], sizes: dict[int, int], compiled_entries: int) -> Factor:
    """Sum `factors` and minimise over `variable`. The variables of the result are in ascending order."""
    if not factors:
        return Factor((), np.zeros(()))
    others = tuple(sorted({v for item in factors for v in item.variables if v != variable}))
    if len(factors) == 1:
        item = factors[0]
        axis = item.variables.index(variable)
        return Factor(others, aligned(Factor(item.variables[:axis] + item.variables[axis + 1 :], item.table.min(axis)), others))
    if prod(sizes[v] for v in others) * sizes[variable] > compiled_entries:
        from autopar.search.solver.least_sums import least_sum  # numba takes a while to import

        return Factor(others, least_sum(variable, [(item.variables, item.table) for item in factors], sizes))
    scope = (variable, *others)
    total, *rest = sorted((aligned(item, scope) for item in factors), key=lambda part: part.size)
    for part in rest:
        total = total + part
    return Factor(others, total.min(0))
