"""The exact core against brute force and against itself unfolded."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from autopar.errors import InfeasibleError, PlanError
from autopar.search.solver.eliminate import Factor, eliminate, find_order
from autopar.search.solver.minimise import Minimiser, Price
from autopar.search.solver.problem import Problem, Segment, Table
from autopar.search.solver.reduce import reduce, restrict
from autopar.search.solver.solve import solve


def random_table(rng: np.random.Generator, *shape: int, infinite: float = 0.0, free: float = 0.0) -> Table:
    """Costs in whole numbers (so that ties occur), some infinite; memory in whole numbers, some zero."""
    cost = rng.integers(0, 12, shape).astype(float)
    cost[rng.random(shape) < infinite] = np.inf
    if not np.isfinite(cost).any():
        cost.flat[0] = 1.0
    memory = rng.integers(0, 10, shape).astype(float) * (rng.random(shape) >= free)
    return Table(cost, memory)


def random_problem(seed: int, most_nodes: int = 7, infinite: float = 0.15) -> Problem:
    """A random graph with parallel edges, isolated nodes and infinite entries."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, most_nodes + 1))
    sizes = rng.integers(1, 4, count)
    tables = [random_table(rng, int(n), infinite=infinite) for n in sizes]
    edges = []
    for _ in range(int(rng.integers(0, 2 * count))):
        if count > 1:
            i, j = sorted(rng.choice(count, 2, replace=False).tolist())
            edges.append((i, j, len(tables)))
            tables.append(random_table(rng, int(sizes[i]), int(sizes[j]), infinite=infinite, free=0.7))
    return Problem(tuple(range(count)), tuple(edges), tuple(tables), (Segment(0, count, 1),))


def brute_force(problem: Problem) -> list[tuple[float, float, tuple[int, ...]]]:
    """Cost, memory and choice of all possible choices."""
    sizes = [len(problem.tables[t].cost_s) for t in problem.nodes]
    found = [(*problem.evaluate(choice), choice) for choice in itertools.product(*map(range, sizes))]
    return [item for item in found if item[0] < np.inf]


def repeated_problem(
    seed: int, length: int, count: int, *, invariants: int = 1, most: int = 4, infinite: float = 0.1, carried: int = 2, tail: int = 1
) -> Problem:
    """Nodes before (read by all repeats or by the first), `count` equal repeats, nodes behind (that read all repeats or the last)."""
    rng = np.random.default_rng(seed)
    tables: list[Table] = []

    def table(*shape: int) -> int:
        tables.append(random_table(rng, *shape, infinite=infinite if len(shape) > 1 else 0.0, free=0.5))
        return len(tables) - 1

    heads = invariants + 1
    sizes = [int(n) for n in rng.integers(1, most + 1, heads)]
    nodes = [table(n) for n in sizes]
    edges = [(0, i, table(sizes[0], sizes[i])) for i in range(1, heads)]
    body = [int(n) for n in rng.integers(1, most + 1, length)]
    body_nodes = [table(n) for n in body]
    inner = [(i, j, table(body[i], body[j])) for i in range(length) for j in range(i + 1, length) if rng.random() < min(1.0, 2.5 / length)]
    over = [(int(i), int(j)) for i, j in rng.integers(0, length, (carried, 2))]
    over_tables = [(i, j, table(body[i], body[j])) for i, j in over]
    always = [(k, int(j), table(sizes[k], body[int(j)])) for k in range(1, heads) for j in rng.integers(0, length, 2)]
    entry = [(0, j, table(sizes[0], body[j])) for _, j in over[:1]]
    for r in range(count):
        base = heads + r * length
        nodes += body_nodes
        edges += [(base + i, base + j, t) for i, j, t in inner]
        edges += [(k, base + j, t) for k, j, t in always]
        edges += [(base - length + i, base + j, t) for i, j, t in over_tables] if r else [(k, base + j, t) for k, j, t in entry]
    behind = len(nodes)
    for _ in range(tail):
        size = int(rng.integers(1, most + 1))
        last = int(rng.integers(0, length))
        nodes.append(table(size))
        edges.append((behind - length + last, len(nodes) - 1, table(body[last], size)))
    if tail and rng.random() < 0.3:
        every = table(body[0], len(tables[nodes[behind]].cost_s))
        edges += [(heads + r * length, behind, every) for r in range(count)]
    segments = (Segment(0, heads, 1), Segment(heads, length, count), *([Segment(behind, tail, 1)] if tail else []))
    return Problem(tuple(nodes), tuple(edges), tuple(tables), segments)


def unfolded(problem: Problem) -> Problem:
    return Problem(problem.nodes, problem.edges, problem.tables, (Segment(0, len(problem.nodes), 1),), problem.memory_limit_bytes)


@pytest.mark.parametrize("block", range(10))
def test_solve_is_brute_force_on_random_graphs(block: int) -> None:
    for seed in range(block * 50, block * 50 + 50):
        problem = random_problem(seed)
        found = brute_force(problem)
        if not found:
            with pytest.raises(InfeasibleError):
                solve(problem)
            continue
        solution = solve(problem)
        assert solution.cost_s == min(found)[0] == solution.lower_bound_s, seed
        assert problem.evaluate(solution.choice) == (solution.cost_s, solution.memory_bytes), seed


@pytest.mark.parametrize("price", [0.3, np.inf])
def test_priced_minimum_is_brute_force(price: float) -> None:
    for seed in range(150):
        problem = random_problem(seed)
        found = brute_force(problem)
        if found:
            minimum = Minimiser(reduce(problem).problem).minimise(Price(price))
            wanted = min(m if price == np.inf else c + price * m for c, m, _ in found)
            assert minimum.bound == pytest.approx(wanted, rel=1e-12), seed


@pytest.mark.parametrize("block", range(8))
def test_folded_is_unfolded(block: int) -> None:
    folded_at_all = 0
    for seed in range(block * 25, block * 25 + 25):
        rng = random.Random(seed)
        problem = repeated_problem(
            seed, rng.randint(1, 6), rng.randint(2, 19), invariants=rng.randint(0, 2), carried=rng.randint(0, 3), tail=rng.randint(0, 2)
        )
        plain = Minimiser(problem, fold=False)
        folded = Minimiser(problem)
        folded_at_all += bool(folded.chains)
        for price in (0.0, 0.37, np.inf):
            want, have = plain.minimise(Price(price)), folded.minimise(Price(price))
            if want.bound == np.inf:
                assert have.bound == np.inf
                continue
            assert have.bound == pytest.approx(want.bound, rel=1e-9), (seed, price)
            cost, memory = folded.evaluate(have.choice)
            assert (memory if price == np.inf else cost + price * memory) == pytest.approx(want.bound, rel=1e-9), (seed, price)
            assert problem.evaluate(tuple(have.choice.tolist())) == pytest.approx((cost, memory), rel=1e-9)
    assert folded_at_all > 12


def test_reduction_keeps_the_optimum_at_every_price() -> None:
    dropped = 0
    for seed in range(200):
        problem = repeated_problem(seed, 4, 5) if seed % 2 else random_problem(seed, 9)
        try:
            small = reduce(problem)
        except InfeasibleError:
            continue
        dropped += sum(len(problem.tables[t].cost_s) for t in problem.nodes) - sum(map(len, small.kept))
        for price in (0.0, 0.5, 3.0):
            want = Minimiser(problem, fold=False).minimise(Price(price))
            have = Minimiser(small.problem, fold=False).minimise(Price(price))
            assert have.bound == pytest.approx(want.bound, rel=1e-12) or want.bound == have.bound
            if want.bound < np.inf:
                cost, memory = problem.evaluate(small.original(have.choice))
                assert cost + price * memory == pytest.approx(want.bound, rel=1e-12)
    assert dropped > 200


def test_one_pinned_repeat_leaves_the_others_folded() -> None:
    problem = repeated_problem(3, 4, 12, infinite=0.0)
    heads = problem.segments[0].length
    wide = next(p for p in range(4) if len(problem.tables[problem.nodes[heads + p]].cost_s) > 1)
    pinned = restrict(problem, {heads + 4 * 5 + wide: (1,)})
    assert sum(chain.count for chain, _ in Minimiser(pinned).chains) >= 8
    solution = solve(pinned)
    assert solution.choice[heads + 4 * 5 + wide] == 1
    assert solution.cost_s == pytest.approx(solve(unfolded(pinned)).cost_s, rel=1e-12)
    everywhere = restrict(problem, {heads + 4 * r + wide: (1,) for r in range(12)})
    assert Minimiser(everywhere).chains[0][0].count >= 10


def test_cut_is_taken_where_least_crosses() -> None:
    # a repeat whose boundary lies between a wide node and its reader; cut one node later only the narrow node crosses
    rng = np.random.default_rng(0)
    tables = [random_table(rng, 40), random_table(rng, 2), random_table(rng, 40, 2), random_table(rng, 2, 40)]
    nodes, edges = [], []
    for r in range(10):
        nodes += [1, 0]  # narrow, wide
        edges += [(2 * r, 2 * r + 1, 3)] + ([(2 * r - 1, 2 * r, 2)] if r else [])
    problem = Problem(tuple(nodes), tuple(edges), tuple(tables), (Segment(0, 2, 10),))
    ((chain, shape),) = Minimiser(problem).chains
    assert shape.states == 2 and chain.count >= 8
    assert solve(problem).cost_s == solve(unfolded(problem)).cost_s


def test_too_large_tables_give_a_bound_and_a_choice_instead_of_a_crash() -> None:
    for seed in range(40):
        problem = random_problem(seed, 9, infinite=0.0)
        exact = min(brute_force(problem))[0]
        minimiser = Minimiser(problem, limit_entries=6)
        minimum = minimiser.minimise(Price(0.0))
        cost, _ = minimiser.evaluate(minimum.choice)
        assert minimum.bound <= exact + 1e-9 <= cost + 2e-9
        assert not minimum.exact or cost == exact


def test_elimination_keeps_what_it_is_told_to() -> None:
    rng = np.random.default_rng(1)
    sizes = {0: 3, 1: 2, 2: 4, 3: 2}
    factors = [Factor((0, 1), rng.random((3, 2))), Factor((2, 1), rng.random((4, 2))), Factor((3, 2, 0), rng.random((2, 4, 3)))]
    result = eliminate(sizes, factors, find_order(sizes, [f.variables for f in factors], keep=(2, 0)))
    whole = factors[0].table[:, :, None, None] + factors[1].table.T[None, :, :, None] + factors[2].table.transpose(2, 1, 0)[:, None]
    assert np.allclose(result.table((2, 0), sizes), whole.min((1, 3)).T)
    chosen = result.recover({2: np.array([1, 3]), 0: np.array([2, 0])})
    for k, (c, a) in enumerate([(1, 2), (3, 0)]):
        assert whole[a, chosen[1][k], c, chosen[3][k]] == result.table((2, 0), sizes)[c, a]


def bad(**changes: object) -> Problem:
    good = Table(np.zeros(2), np.zeros(2))
    edge = Table(np.zeros((2, 2)), np.zeros((2, 2)))
    fields: dict[str, object] = {"nodes": (0, 0), "edges": ((0, 1, 1),), "tables": (good, edge), "segments": (Segment(0, 2, 1),)}
    return Problem(**(fields | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (bad(tables=(Table(np.array([0, np.nan]), np.zeros(2)), bad().tables[1])), "table 0.*NaN"),
        (bad(tables=(Table(np.zeros(2), np.array([0, -1.0])), bad().tables[1])), "table 0.*memory"),
        (bad(tables=(Table(np.zeros(2), np.zeros(3)), bad().tables[1])), "table 0.*shape"),
        (bad(tables=(bad().tables[0], Table(np.zeros((2, 3)), np.zeros((2, 3))))), r"edge 0.*\(2, 3\)"),
        (bad(edges=((1, 0, 1),)), "edge 0.*joins"),
        (bad(edges=((0, 1, 7),)), "edge 0.*table 7"),
        (bad(nodes=(0, 5)), "node 1.*table 5"),
        (bad(segments=(Segment(0, 1, 1),)), "segments end at node 1"),
        (bad(memory_limit_bytes=float("nan")), "NaN"),
    ],
)
def test_damaged_problems_are_named(problem: Problem, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        solve(problem)


def test_restrict_refuses_what_does_not_exist() -> None:
    with pytest.raises(PlanError, match="node 9"):
        restrict(bad(), {9: (0,)})
    with pytest.raises(PlanError, match="strategies"):
        restrict(bad(), {0: (4,)})
    with pytest.raises(InfeasibleError):
        solve(restrict(bad(tables=(bad().tables[0], Table(np.array([[0, np.inf]] * 2), np.zeros((2, 2))))), {1: (1,)}))
