"""Bounds and answers against trying everything in exact arithmetic, on small random files; `benchmarks/bound_check.py` does thousands."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from autopar.search.solver.problem import Problem, Segment, Table
from autopar.search.solver.rounding import fits, lowered, on_grids
from autopar.search.solver.solve import solve
from benchmarks.bound_check import checked, random_problem


@pytest.mark.parametrize("timeout_s", [None, 0.0])
def test_answers_and_bounds_of_random_files(timeout_s: float | None, tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    for seed in range(100):
        words = list(checked(random_problem(seed), tmp_path, timeout_s))
        assert not [word for word in words if word.startswith("wrong")], seed
        counts.update(words)
    assert counts["feasible"] > 30 and counts["infeasible"] > 20
    assert timeout_s is not None or counts["optimum found"] > 30


def one(cost: list[float], held: list[list[float]], limit: float) -> Problem:
    tables = tuple(Table(np.array(cost), np.array(bytes_)) for bytes_ in held)
    live = tuple((0, 2 + at) for at in range(len(held)))
    return Problem(tuple(range(len(held))), (), tables, (Segment(0, len(held), 1),), limit, live)


def test_whole_numbers_are_left_alone_and_bounds_of_others_lowered_by_little() -> None:
    whole, tenths = one([3.0, 5.0], [[1.0, 2.0]] * 3, 4.0), one([0.1, 0.7], [[1.0, 2.0]] * 3, 4.0)
    assert lowered(whole, 9.0) == 9.0 and lowered(whole, 9.0, priced=1.0) == 9.0 and lowered(whole, 9.0 + 1e-15, priced=1.0) == 9.0
    assert 0 < 0.3 - lowered(tenths, 0.3) < 1e-13 and lowered(tenths, -np.inf) == -np.inf
    assert on_grids(whole) is None


def test_fractions_of_bytes_are_never_over_the_limit() -> None:
    problem = one([1.0, 0.0], [[0.1, 0.3], [0.2, 0.3], [0.1, 0.2]], 0.55)
    grids = on_grids(problem)
    assert grids is not None
    assert fits(problem, (0, 0, 1)) and not fits(problem, (1, 0, 1))
    solution = solve(problem, effort="exact")
    assert solution.feasible and fits(problem, solution.choice) and solution.cost_s == 2.0


def test_a_peak_that_only_rounding_brings_under_the_limit_is_no_answer() -> None:
    huge = one([0.0, 1.0], [[2.0**53, 2.0**52], [1.0, 0.0]], 2.0**53)  # 2^53 + 1 is 2^53 in floating point
    solution = solve(huge, effort="exact")
    assert solution.feasible and fits(huge, solution.choice)
