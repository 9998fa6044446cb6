"""Memory limits: bounds are bounds, what fits is found, and `exact` is brute force."""

from __future__ import annotations

import numpy as np
import pytest

from autopar.errors import InfeasibleError
from autopar.search.solver.incumbent import Incumbent
from autopar.search.solver.local import Local
from autopar.search.solver.marginals import min_marginals
from autopar.search.solver.minimise import Minimiser, Price
from autopar.search.solver.problem import Problem
from autopar.search.solver.solve import Progress, search, solve, solve_with
from tests.search.test_solver import brute_force, random_problem, repeated_problem


def limited(problem: Problem, limit: float) -> Problem:
    return Problem(problem.nodes, problem.edges, problem.tables, problem.segments, limit)


def cases(start: int, stop: int) -> list[tuple[int, Problem, list[tuple[float, float, tuple[int, ...]]]]]:
    """Random graphs and small chains with every limit that matters: at, between and just below what choices need."""
    found = []
    for seed in range(start, stop):
        problem = repeated_problem(seed, 2, 3, most=2, infinite=0.1) if seed % 3 == 0 else random_problem(seed)
        choices = brute_force(problem)
        if choices:
            memories = sorted({memory for _, memory, _ in choices})
            rng = np.random.default_rng(seed)
            for limit in rng.choice(memories, min(3, len(memories)), replace=False):
                found.append((seed, limited(problem, float(limit)), choices))
    return found


@pytest.mark.parametrize("block", range(6))
def test_fast_never_bounds_too_high_and_finds_what_fits(block: int) -> None:
    off = []
    for seed, problem, choices in cases(block * 30, block * 30 + 30):
        best = min(cost for cost, memory, _ in choices if memory <= problem.memory_limit_bytes)
        solution = solve(problem)
        assert solution.feasible and solution.memory_bytes <= problem.memory_limit_bytes, seed
        assert solution.lower_bound_s <= best * (1 + 1e-9), seed
        assert solution.cost_s >= best, seed
        assert problem.evaluate(solution.choice) == pytest.approx((solution.cost_s, solution.memory_bytes))
        off.append(solution.cost_s / max(best, 1.0))
    assert np.mean(off) < 1.05


@pytest.mark.parametrize("block", range(6))
def test_exact_is_brute_force(block: int) -> None:
    for seed, problem, choices in cases(block * 20, block * 20 + 20):
        best = min(cost for cost, memory, _ in choices if memory <= problem.memory_limit_bytes)
        solution = solve(problem, effort="exact")
        assert solution.cost_s == pytest.approx(best, rel=1e-9), seed
        assert solution.feasible and solution.lower_bound_s == pytest.approx(best, rel=1e-8), seed
        assert solution.lower_bound_s <= best * (1 + 1e-12), seed


def test_what_does_not_fit_says_how_much_is_missing() -> None:
    tried = 0
    for seed in range(60):
        problem = random_problem(seed)
        choices = brute_force(problem)
        least = min((memory for _, memory, _ in choices), default=0.0)
        if least > 0:
            solution = solve(limited(problem, least - 0.5))
            assert not solution.feasible and solution.memory_bytes == least
            tried += 1
    assert tried > 30


def test_repeats_are_mixed_and_the_gap_is_small() -> None:
    gaps = []
    for seed in range(12):
        problem = repeated_problem(seed, 5, 24, most=5, infinite=0.0, invariants=1)
        free = solve(problem)
        least = solve(limited(problem, 0.0))
        if free.memory_bytes == least.memory_bytes:
            continue
        for share in (0.2, 0.5, 0.8):
            limit = least.memory_bytes + share * (free.memory_bytes - least.memory_bytes)
            solution = solve(limited(problem, limit))
            assert solution.feasible and solution.memory_bytes <= limit
            assert free.cost_s <= solution.lower_bound_s <= solution.cost_s
            gaps.append(solution.cost_s / solution.lower_bound_s - 1)
    # most of what is left is no fault of the choice: HiGHS finds nothing cheaper for these within minutes
    assert np.median(gaps) < 0.005 and max(gaps) < 0.08, gaps


def test_exact_closes_what_fast_leaves_on_repeats() -> None:
    for seed in (1, 4):
        problem = repeated_problem(seed, 4, 8, most=4, infinite=0.0, invariants=1)
        free, least = solve(problem), solve(limited(problem, 0.0))
        tight = limited(problem, (free.memory_bytes + least.memory_bytes) / 2)
        fast, exact = solve(tight), solve(tight, effort="exact")
        assert exact.cost_s <= fast.cost_s and exact.lower_bound_s >= fast.lower_bound_s
        assert exact.cost_s == pytest.approx(exact.lower_bound_s, rel=1e-8)


def test_marginals_are_brute_force() -> None:
    for seed in range(120):
        problem = random_problem(seed)
        choices = brute_force(problem)
        if not choices:
            continue
        marginals = min_marginals(Minimiser(problem), 0.3)
        assert marginals is not None
        for node, marginal in enumerate(marginals):
            for strategy, value in enumerate(marginal):
                want = min((c + 0.3 * m for c, m, choice in choices if choice[node] == strategy), default=np.inf)
                assert value == pytest.approx(want, rel=1e-12), (seed, node, strategy)


def test_splices_are_evaluated_exactly() -> None:
    for seed in range(40):
        problem = repeated_problem(seed, 3, 6, infinite=0.2)
        minimiser = Minimiser(problem)
        first, second = (minimiser.minimise(Price(price)).choice for price in (0.0, np.inf))
        if problem.evaluate(tuple(first.tolist()))[0] == np.inf:
            continue
        cost, (memory,) = Local(minimiser).splices(first, second)
        for place in range(len(problem.nodes) + 1):
            want = problem.evaluate(tuple(np.concatenate([first[:place], second[place:]]).tolist()))
            assert (cost[place], memory[place]) == pytest.approx(want)


def test_single_changes_only_improve() -> None:
    for seed in range(40):
        problem = random_problem(seed, infinite=0.0)
        minimiser = Minimiser(problem)
        start = np.array([n - 1 for n in minimiser.sizes])
        cost, memory = minimiser.evaluate(start)
        better = Local(minimiser).improve(start, np.array([memory + 3]))
        assert minimiser.evaluate(better)[0] <= cost and minimiser.evaluate(better)[1] <= memory + 3
        smaller = minimiser.evaluate(Local(minimiser).improve(start, np.array([memory - 2])))[1]
        assert smaller <= memory


def test_progress_tells_falling_costs_and_rising_bounds() -> None:
    problem = repeated_problem(2, 4, 10, infinite=0.0)
    free, least = solve(problem), solve(limited(problem, 0.0))
    seen: list[Progress] = []
    solution = solve(limited(problem, (free.memory_bytes + least.memory_bytes) / 2), effort="exact", progress=seen.append)
    costs, bounds = [p.best_cost_s for p in seen], [p.lower_bound_s for p in seen]
    assert costs == sorted(costs, reverse=True) and bounds == sorted(bounds) and len(seen) >= 3
    assert costs[-1] == solution.cost_s


def test_ctrl_c_returns_the_best_so_far() -> None:
    problem = repeated_problem(2, 4, 10, infinite=0.0)
    free, least = solve(problem), solve(limited(problem, 0.0))
    tight = limited(problem, (free.memory_bytes + least.memory_bytes) / 2)

    def stop_when(phase: str) -> Progress | None:
        def stop(progress: Progress) -> None:
            if progress.phase.startswith(phase):
                raise KeyboardInterrupt

        solution = solve(tight, progress=stop)
        assert solution.feasible and solution.memory_bytes <= tight.memory_limit_bytes
        return None

    stop_when("pricing")
    with pytest.raises(KeyboardInterrupt):
        stop_when("without")


def test_equal_problems_have_equal_solutions() -> None:
    problem = repeated_problem(5, 4, 10, infinite=0.0)
    free, least = solve(problem), solve(limited(problem, 0.0))
    tight = limited(problem, (free.memory_bytes + least.memory_bytes) / 2)
    assert solve(tight) == solve(tight)


def test_alternatives_are_priced_by_one_solve() -> None:
    for seed in range(60):
        problem = random_problem(seed)
        choices = brute_force(problem)
        if not choices:
            continue
        solution = solve(problem)
        for strategy in range(len(problem.tables[problem.nodes[0]].cost_s)):
            want = min((c + 0.2 * m for c, m, choice in choices if choice[0] == strategy), default=np.inf)
            if want == np.inf:
                with pytest.raises(InfeasibleError):
                    solve_with(problem, {0: (strategy,)}, 0.2)
                continue
            alternative = solve_with(problem, {0: (strategy,)}, 0.2)
            assert alternative.choice[0] == strategy
            assert alternative.cost_s + 0.2 * alternative.memory_bytes == pytest.approx(want, rel=1e-12)
            assert alternative.cost_s >= solution.cost_s


def test_bounds_hold_and_what_fits_is_found_when_tables_are_too_large() -> None:
    for seed in range(40):
        problem = random_problem(seed, 8, infinite=0.0)
        choices = brute_force(problem)
        for limit in (float(np.median([m for _, m, _ in choices])), min(m for _, m, _ in choices)):
            best = min(c for c, m, _ in choices if m <= limit)
            incumbent = Incumbent(Minimiser(limited(problem, limit), limit_entries=6), limit, None)
            assert search(incumbent, "fast", None)
            assert incumbent.bound_s <= best * (1 + 1e-9) <= incumbent.cost_s * (1 + 2e-9)
