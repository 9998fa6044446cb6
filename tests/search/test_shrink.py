"""Exact reductions against brute force: the optimum stays, what fits stays findable, and every choice finds its way back."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autopar.errors import InfeasibleError
from autopar.search.solver.check import check
from autopar.search.solver.contract import settle
from autopar.search.solver.dominated import drop_dominated, fold_leaves
from autopar.search.solver.interned import Interned
from autopar.search.solver.problem import Interval, Problem, Segment, Table
from autopar.search.solver.series import bridge_series
from autopar.search.solver.shrink import Shrunk, shrink
from autopar.search.solver.shrinking import Shrinking
from autopar.search.solver.tighten import tighten

Choice = tuple[int, ...]
MOST_CHOICES = 1500
SMALL = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Up to five nodes; infinite entries, functional edges, parallel ones, edges with memory, empty intervals, zero usages, parts apart."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    count = draw(st.integers(1, 5))
    sizes = rng.integers(1, 4, count).tolist()
    infinite = draw(st.sampled_from([0.0, 0.2, 0.5]))
    unused = draw(st.sampled_from([0.0, 0.5]))
    edge_memory = draw(st.integers(0, 3)) == 0
    tables: list[Table] = []

    def table(*shape: int, functional: int = -1, memory: bool = True) -> int:
        cost = rng.integers(0, 8, shape).astype(float)
        cost[rng.random(shape) < (infinite if len(shape) > 1 else infinite / 4)] = np.inf
        if functional >= 0:
            reply = rng.integers(0, shape[1 - functional], shape[functional])
            chosen = reply[:, None] == np.arange(shape[1 - functional])
            cost[~(chosen if functional == 0 else chosen.T)] = np.inf
        amount = rng.integers(0, 8, shape).astype(float) * (rng.random(shape) >= unused) * memory
        tables.append(Table(cost, amount))
        return len(tables) - 1

    def intervals(number: int) -> tuple[Interval, ...]:
        lo = rng.integers(-3, 6, number)
        return tuple(zip(lo.tolist(), (lo + rng.integers(0, 5, number)).tolist(), strict=True))

    nodes = tuple(table(size) for size in sizes)
    edges = []
    for _ in range(draw(st.integers(0, 2 * count)) if count > 1 else 0):
        i, j = sorted(rng.choice(count, 2, replace=False).tolist())
        functional = int(rng.integers(-3, 2))
        edges.append((i, j, table(sizes[i], sizes[j], functional=functional, memory=edge_memory)))
    also = []
    for _ in range(draw(st.integers(0, 2))):
        node = int(rng.integers(count))
        also.append((node, table(sizes[node]), *intervals(1)[0]))
    limit = float("inf") if draw(st.integers(0, 9)) == 0 else float(rng.integers(4, 36))
    live = intervals(count) if draw(st.integers(0, 4)) else None
    edges_live = intervals(len(edges)) if draw(st.booleans()) else None
    return Problem(nodes, tuple(edges), tuple(tables), (Segment(0, count, 1),), limit, live, edges_live, tuple(also))


def within(problem: Problem) -> dict[Choice, float]:
    """All choices within the limit, and what they cost."""
    sizes = [len(problem.tables[t].cost_s) for t in problem.nodes]
    found = {}
    for choice in itertools.product(*map(range, sizes)):
        cost, memory = problem.evaluate(choice)
        if cost < np.inf and memory <= problem.memory_limit_bytes:
            found[choice] = cost
    return found


def hold(problem: Problem, reduce: Callable[[Problem], Shrunk]) -> bool:
    """Check one reduction by brute force. Returns whether anything fits."""
    check(problem)
    first = within(problem)
    try:
        shrunk = reduce(problem)
    except InfeasibleError:
        assert not first
        return False
    check(shrunk.problem)
    if np.prod([len(shrunk.problem.tables[t].cost_s) for t in shrunk.problem.nodes]) > MOST_CHOICES:
        return bool(first)  # edges with memory are nodes now, and not yet taken away again
    left = within(shrunk.problem)
    assert bool(first) == bool(left)
    if first:
        assert min(first.values()) == min(left.values())
    for choice, cost in left.items():
        assert first[shrunk.original(np.array(choice))] == cost
    return bool(first)


def only(*passes: Callable[[Shrinking], object]) -> Callable[[Problem], Shrunk]:
    """The reduction that consists of `passes`, each once."""

    def reduce(problem: Problem) -> Shrunk:
        state = Shrinking(problem)
        for step in passes:
            step(state)
        small, left = state.problem(problem.memory_limit_bytes)
        return Shrunk(small, state, left)

    return reduce


REDUCTIONS = {
    "none": only(),
    "settle": only(settle),
    "tighten": only(tighten),
    "settle, tighten": only(settle, tighten),
    "dominated": only(settle, drop_dominated),
    "leaves": only(settle, fold_leaves),
    "series": only(settle, bridge_series),
    "all once": only(settle, tighten, drop_dominated, fold_leaves, bridge_series, settle),
}


@pytest.mark.parametrize("name", REDUCTIONS)
@SMALL
@given(problem=problems())
def test_each_reduction_keeps_the_optimum(name: str, problem: Problem) -> None:
    hold(problem, REDUCTIONS[name])


@settings(SMALL, max_examples=700)
@given(problem=problems())
def test_shrink_keeps_the_optimum(problem: Problem) -> None:
    hold(problem, shrink)


@settings(SMALL, max_examples=100)
@given(problem=problems())
def test_shrink_without_times_keeps_the_optimum(problem: Problem) -> None:
    hold(replace(problem, live=None, edges_live=None, also=()), shrink)


def chain(count: int, size: int, seed: int, live: bool) -> Problem:
    """A path of equal nodes whose neighbours' strategies must be equal or cost, all alive together or never."""
    rng = np.random.default_rng(seed)
    node = Table(rng.integers(0, 9, size).astype(float), rng.integers(1, 9, size).astype(float))
    edge = Table(rng.integers(1, 9, (size, size)).astype(float), np.zeros((size, size)))
    edges = tuple((i, i + 1, 1) for i in range(count - 1))
    intervals = ((0, 1) if live else (3, 3),) * count
    return Problem((0,) * count, edges, (node, edge), (Segment(0, count, 1),), 4.5 * count, intervals)


def test_without_memory_that_matters_a_path_vanishes() -> None:
    shrunk = shrink(chain(300, 5, 0, live=False))
    assert len(shrunk.problem.nodes) == 1
    assert chain(300, 5, 0, live=False).evaluate(shrunk.original(np.array([0])))[0] == shrunk.problem.evaluate((0,))[0]


def test_parts_without_memory_are_eliminated_apart() -> None:
    rng = np.random.default_rng(1)
    tables = [
        Table(rng.integers(0, 9, 3).astype(float), np.zeros(3)),
        Table(rng.integers(0, 9, 3).astype(float), np.array([4.0, 2.0, 1.0])),
    ]
    tables += [Table(rng.integers(0, 9, (3, 3)).astype(float), np.zeros((3, 3))) for _ in range(4)]
    whole = [(i, j, 2 + (i + j) % 4) for i in range(4) for j in range(i + 1, 4)]  # four nodes, each joined to every other
    edges = tuple((base + i, base + j, t) for base in (0, 4) for i, j, t in whole)
    problem = Problem((0,) * 4 + (1,) * 4, edges, tuple(tables), (Segment(0, 8, 1),), 9.0, ((0, 1),) * 8)
    assert len(shrink(problem).problem.nodes) <= 5
    assert hold(problem, shrink)


def test_bijections_collapse_whatever_their_memory() -> None:
    tables = [Table(np.arange(4.0), np.array([3.0, 2.0, 1.0, 0.0]))]
    turned = np.full((4, 4), np.inf)
    turned[np.arange(4), [1, 2, 3, 0]] = 1.0
    tables.append(Table(turned, np.zeros((4, 4))))
    count = 40
    edges = tuple((i, i + 1, 1) for i in range(count - 1))
    live = tuple((i, i + 3) for i in range(count))
    problem = Problem((0,) * count, edges, tuple(tables), (), 6.0, live)
    shrunk = shrink(problem)
    assert len(shrunk.problem.nodes) <= 2
    best = min(within(shrunk.problem), key=lambda choice: shrunk.problem.evaluate(choice))
    cost, memory = problem.evaluate(shrunk.original(np.array(best)))
    assert memory <= 6.0 and cost == shrunk.problem.evaluate(best)[0]
    assert cost == min(c for c, m in (problem.evaluate(tuple((s + k) % 4 for k in range(count))) for s in range(4)) if m <= 6.0)


def test_only_steps_that_can_break_the_limit_are_left() -> None:
    big, small = Table(np.array([0.0, 5.0]), np.array([9.0, 1.0])), Table(np.array([0.0, 1.0]), np.array([2.0, 1.0]))
    # step 0: at most 4; step 2: at most 11 and step 4: at most 20, whose least is 4
    problem = Problem((1, 1, 0, 1, 0, 0), (), (big, small), (), 13.0, ((0, 1), (0, 1), (2, 3), (2, 3), (4, 5), (4, 5)))
    state = Shrinking(problem)
    tighten(state)
    assert state.times.tolist() == [4] and state.slack.tolist() == [11.0]
    assert [len(rows) for rows in state.holds] == [0, 0, 0, 0, 1, 1]
    assert len(shrink(problem).problem.nodes) == 3  # the others took their cheapest strategy


def test_what_cannot_fit_is_named() -> None:
    node = Table(np.zeros(2), np.array([4.0, 6.0]))
    problem = Problem((0, 0, 0), (), (node,), (), 7.0, ((0, 20), (12, 13), (15, 16)))
    with pytest.raises(InfeasibleError, match="time step 12 the least memory of all nodes together is 1 bytes over the limit") as caught:
        shrink(problem)
    assert caught.value.missing_bytes == 1
    impossible = Table(np.array([[np.inf, np.inf]]), np.zeros((1, 2)))
    with pytest.raises(InfeasibleError, match="node 0 has no possible strategy"):
        shrink(Problem((1, 0), ((0, 1, 2),), (node, Table(np.zeros(1), np.zeros(1)), impossible), (), 99.0))


def test_equal_arrays_have_equal_numbers() -> None:
    pool = Interned()
    rng = np.random.default_rng(0)
    table = rng.integers(0, 3, (4, 6)).astype(float)
    number = pool.table(table)
    assert pool.table(table.copy()) == number and pool.table(np.ascontiguousarray(table.T)) == number ^ 1
    assert pool.table(table.reshape(6, 4)) not in (number, number ^ 1)
    assert pool.vector(np.array([0.0, 1.0])) == pool.vector(np.array([-0.0, 1.0]))
    assert pool.sum(number, number) == pool.table(2 * table)
