"""The search over time steps: its parts against plain sums and against trying everything."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from ortools.sat.python import cp_model

from autopar.search.solver.arrays import lay_out
from autopar.search.solver.compiled import generator, uniform, whole
from autopar.search.solver.cuts import add_cuts, solve_with_cuts
from autopar.search.solver.dual import Dual
from autopar.search.solver.evaluate import add_prices, cost_of, cost_of_change, usage_of
from autopar.search.solver.forest import clear, grow, new_forest, solve
from autopar.search.solver.last_resort import least_cost, least_memory
from autopar.search.solver.messages import find_core
from autopar.search.solver.moves import improve, new_walk
from autopar.search.solver.pairs import pairs
from autopar.search.solver.possible import Possible
from autopar.search.solver.problem import Ints, Problem
from autopar.search.solver.residual import residual
from autopar.search.solver.timed import search_timed
from autopar.search.solver.trees import choose_down, find_trees, pass_up
from tests.search.timed_problems import choices, optimum, problems, timed_problem

several = settings(max_examples=300, deadline=None)
some = settings(max_examples=60, deadline=None)


@several
@given(problems)
def test_flat_arrays_say_what_the_problem_says(problem: Problem) -> None:
    arrays = lay_out(problem)
    for choice in choices(problem)[:40]:
        cost, memory = problem.evaluate(choice)
        picked = np.array(choice, np.int64)
        assert cost_of(arrays, picked) == cost
        over = usage_of(arrays, picked) - arrays.room
        assert (over.max() > 0) == (memory > problem.memory_limit_bytes)
        if over.max() > 0:
            assert over.max() == memory - problem.memory_limit_bytes


@several
@given(problems)
def test_half_edges_find_back(problem: Problem) -> None:
    arrays = lay_out(problem)
    source = np.repeat(np.arange(len(arrays.sizes)), np.diff(arrays.start))
    assert (arrays.back[arrays.back] == np.arange(len(arrays.back))).all()
    assert (source[arrays.back] == arrays.other).all()
    assert (arrays.rows[arrays.back] == arrays.columns).all()


@several
@given(problems, st.integers(0, 10**6))
def test_prices_are_those_of_usage(problem: Problem, seed: int) -> None:
    arrays = lay_out(problem)
    random = np.random.default_rng(seed)
    prices = random.integers(0, 5, len(arrays.room)).astype(np.float64)
    choice = np.array([random.integers(size) for size in arrays.sizes], np.int64)
    priced = np.zeros(len(arrays.cost))
    add_prices(arrays, prices, priced)
    assert priced[arrays.first[:-1] + choice].sum() == usage_of(arrays, choice) @ prices


def a_possible_choice(problem: Problem, random: np.random.Generator) -> Ints | None:
    """Any of finite cost, whatever the memory; None where there is none."""
    possible = [c for c in choices(problem) if problem.evaluate(c)[0] < np.inf]
    return np.array(possible[random.integers(len(possible))], np.int64) if possible else None


@several
@given(problems, st.integers(0, 10**6))
def test_forests_have_no_cycle_and_are_solved_exactly(problem: Problem, seed: int) -> None:
    arrays, random = lay_out(problem)._replace(room=np.full(1, np.inf)), np.random.default_rng(seed)
    old = a_possible_choice(problem, random)
    if old is None:
        return
    forest, new = new_forest(arrays), old.copy()
    count, touched = grow(arrays, forest, 4, 1 + int(random.integers(12)), generator(seed))
    inside = forest.nodes[:count].tolist()
    assert sorted(inside) == np.flatnonzero(forest.inside).tolist()
    pairs = {(i, j) for i, j, _ in problem.edges if i in inside and j in inside}
    assert len(pairs) == sum(forest.parent[v] >= 0 for v in inside)
    for v in inside:
        if forest.parent[v] >= 0:
            assert inside.index(int(arrays.other[forest.parent[v]])) < inside.index(v)
    solve(arrays, forest, count, arrays.cost, 0.0, old, new, generator(seed))
    kept = [v for v in range(len(old)) if v not in inside]
    best = min(problem.evaluate(c)[0] for c in choices(problem) if all(c[v] == old[v] for v in kept))
    assert problem.evaluate(tuple(new.tolist()))[0] == best
    assert cost_of(arrays, new) - cost_of(arrays, old) == cost_of_change(arrays, forest.nodes, count, old, new)
    clear(forest, touched)
    assert not forest.inside.any() and not forest.near.any()


@several
@given(problems, st.integers(0, 10**6))
def test_nodes_that_close_cycles_are_solved_with_the_forest(problem: Problem, seed: int) -> None:
    arrays, random = lay_out(problem)._replace(room=np.full(1, np.inf)), np.random.default_rng(seed)
    old = a_possible_choice(problem, random)
    if old is None:
        return
    before, forest, new, state = old.copy(), new_forest(arrays), old.copy(), generator(seed)
    count, touched = grow(arrays, forest, 1, 12, state)
    cuts = add_cuts(arrays, forest, count, touched, 2, state)
    solve_with_cuts(arrays, forest, count, cuts, arrays.cost, 0.0, old, new, state)
    block = forest.nodes[: count + cuts].tolist()
    assert len(set(block)) == len(block) and (old == before).all()
    kept = [v for v in range(len(old)) if v not in block]
    assert (new[kept] == old[kept]).all()
    best = min(problem.evaluate(c)[0] for c in choices(problem) if all(c[v] == old[v] for v in kept))
    assert problem.evaluate(tuple(new.tolist()))[0] == best


@several
@given(problems)
def test_strategies_of_good_choices_are_kept(problem: Problem) -> None:
    best = optimum(problem)
    if best == np.inf:
        return
    dual = Dual(lay_out(problem), sweeps=2)
    for _ in range(10):
        dual.step()
    for cost in (best, best + 3):
        kept = dual.worth_keeping(cost)
        for choice in choices(problem):
            value, memory = problem.evaluate(choice)
            if value <= cost and memory <= problem.memory_limit_bytes:
                assert kept[dual.arrays.first[:-1] + np.array(choice)].all()


@some
@given(problems)
def test_the_program_of_what_is_left_has_the_optimum(problem: Problem) -> None:
    best, arrays = optimum(problem), lay_out(problem)
    program = residual(arrays, arrays.cost < np.inf, np.zeros(len(arrays.sizes), np.int64))
    assert program is not None
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    choice, bound = program.solve(solver)
    assert bound == best
    assert choice is None if best == np.inf else problem.evaluate(tuple(choice.tolist()))[0] == best


@some
@given(problems, st.integers(0, 10**6))
def test_a_possible_choice_is_found_by_moves_and_by_the_program(problem: Problem, seed: int) -> None:
    arrays = lay_out(problem)
    start = least_memory(arrays)
    near, program = Possible(arrays, start, generator(seed)), pairs(arrays, start)
    for _ in range(10):
        near.walk()
    assert program is not None
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    choice, bound = program.solve(solver)
    if all(problem.evaluate(c)[0] == np.inf for c in choices(problem)):
        assert near.choice is None and choice is None and bound == np.inf
        return
    for found in (near.choice, choice):
        assert found is not None and problem.evaluate(tuple(found.tolist()))[0] < np.inf
    assert bound == -np.inf


@several
@given(problems)
def test_trees_are_exact(problem: Problem) -> None:
    arrays = lay_out(problem)
    trees = find_trees(arrays)
    assert sorted([*trees.nodes.tolist(), *trees.core.tolist()]) == list(range(len(arrays.sizes)))
    core = find_core(arrays, trees)
    assert all(core.start[p + 1] - core.start[p] >= 2 for p in range(len(trees.core)))
    if len(trees.core):
        return
    reach, choice = arrays.cost.copy(), np.zeros(len(arrays.sizes), np.int64)
    least = pass_up(arrays, trees, reach, np.zeros(8))
    choose_down(arrays, trees, reach, choice)
    best = min(problem.evaluate(c)[0] for c in choices(problem))
    assert least == best
    if best < np.inf:
        assert cost_of(arrays, choice) == best


@several
@given(problems)
def test_the_bound_is_never_above_the_optimum(problem: Problem) -> None:
    best = optimum(problem)
    dual = Dual(lay_out(problem), sweeps=3)
    assert least_cost(dual.arrays) <= best
    for _ in range(30):
        assert dual.bound <= best
        dual.step()
    assert dual.bound <= best


@some
@given(problems, st.integers(0, 10**6))
def test_walks_stay_within_the_limit_once_they_are(problem: Problem, seed: int) -> None:
    arrays = lay_out(problem)
    within = [c for c in choices(problem) if problem.evaluate(c)[1] <= problem.memory_limit_bytes and problem.evaluate(c)[0] < np.inf]
    if not within:
        return
    walk, state = new_walk(arrays, np.array(within[seed % len(within)], np.int64)), generator(seed)
    before = walk.score[2]
    for _ in range(5):
        improve(arrays, walk, arrays.cost, 1.0, 1.0, 5.0, 20, 4, state)
        assert usage_of(arrays, walk.choice).max() - arrays.room.min() <= 0 or (usage_of(arrays, walk.choice) <= arrays.room).all()
        assert problem.evaluate(tuple(walk.best.tolist()))[0] == walk.score[2] <= before


@some
@given(problems)
def test_small_problems_are_solved(problem: Problem) -> None:
    best = optimum(problem)
    solution = search_timed(problem)
    assert solution.feasible == (best < np.inf)
    assert solution.lower_bound_s == best
    if solution.feasible:
        assert problem.evaluate(solution.choice) == (solution.cost_s, solution.memory_bytes)
        assert solution.cost_s == best
        assert solution.memory_bytes <= problem.memory_limit_bytes


def test_the_same_seed_gives_the_same_answer() -> None:
    problem = timed_problem(5, 8, 6, 0.7)
    first, again = (search_timed(problem, seed=3) for _ in range(2))
    assert first == again


def test_random_numbers_spread() -> None:
    state = generator(0)
    drawn = np.array([uniform(state) for _ in range(2000)])
    assert 0 <= drawn.min() < 0.01 and 0.99 < drawn.max() < 1 and abs(drawn.mean() - 0.5) < 0.03
    assert sorted({whole(state, 5) for _ in range(200)}) == [0, 1, 2, 3, 4]
