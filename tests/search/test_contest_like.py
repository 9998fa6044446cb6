"""The solver on problems unlike those it was built with, in the contest's format: it finds what fits, its bounds are bounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autopar.errors import InfeasibleError
from autopar.search.solver.judge import judge
from autopar.search.solver.problem import Solution
from autopar.search.solver.problem_file import read_instance
from autopar.search.solver.solve import solve
from benchmarks.contest_like import VARIANTS, Raw, layered, least_peak, planted, with_limit


def solved(raw: Raw, folder: Path, **options: Any) -> Solution:
    path = folder / "made.json"
    path.write_text(json.dumps({"problem": raw}))
    return solve(read_instance(path).problem, effort="exact", **options)


def hold(raw: Raw, solution: Solution) -> None:
    verdict = judge(raw, solution.choice)
    assert verdict.feasible and solution.feasible, verdict.fault
    assert verdict.cost == solution.cost_s >= solution.lower_bound_s


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"limit": 1.3},
        {"bound_edges": 0.0, "impossible": 0.6},
        {"bound_edges": 0.0, "impossible": 0.0},
        {"bound_edges": 1.0},
        {"strategies": 1},
        {"strategies": 40, "layers": 2, "width": 4},
        {"strategies": 8, "uneven": 1.0},
        {"parts": 3},
        {"layers": 60, "width": 3, "strategies": 3},
    ],
    ids=str,
)
def test_what_is_known_to_fit_is_found(options: dict[str, Any], tmp_path: Path) -> None:
    sizes = {"layers": 4, "width": 6, "strategies": 5} | options
    for seed in range(2):
        raw = layered(np.random.default_rng(seed), **sizes)
        hold(raw, solved(raw, tmp_path, gap=0.05))


@pytest.mark.parametrize("name", [name for name in VARIANTS if not name.startswith("limit")])
def test_changed_copies_are_solved(name: str, tmp_path: Path) -> None:
    first = layered(np.random.default_rng(7), layers=4, width=6, strategies=5, limit=1.6)
    raw = VARIANTS[name](first, np.random.default_rng(1))
    try:
        hold(raw, solved(raw, tmp_path, gap=0.05))
    except InfeasibleError:
        assert name in ("window", "patch", "at once", "twice")  # with another limit: whether anything fits is not known


def test_a_limit_below_the_least_peak_is_refused_and_one_above_the_most_does_not_matter(tmp_path: Path) -> None:
    raw = layered(np.random.default_rng(3), layers=3, width=5, strategies=4)
    with pytest.raises(InfeasibleError, match="over the limit"):
        solved({**raw, "usage_limit": least_peak(raw) - 1}, tmp_path)
    free = solved(VARIANTS["no limit"](raw, np.random.default_rng(0)), tmp_path)
    assert free.cost_s == free.lower_bound_s <= solved(raw, tmp_path, gap=0.05).cost_s
    assert with_limit(raw, 2.0)["usage_limit"] == 2 * least_peak(raw)


def test_the_order_of_nodes_changes_no_optimum(tmp_path: Path) -> None:
    raw = layered(np.random.default_rng(5), layers=3, width=5, strategies=4, limit=1.2)
    other = VARIANTS["shuffled"](raw, np.random.default_rng(2))
    first, second = (solved(one, tmp_path) for one in (raw, other))
    hold(raw, first)
    hold(other, second)
    assert max(first.lower_bound_s, second.lower_bound_s) <= min(first.cost_s, second.cost_s)


@pytest.mark.parametrize("impossible", [0.3, 0.4, 0.45])
def test_what_fits_is_found_where_most_pairs_are_impossible(impossible: float, tmp_path: Path) -> None:
    raw = planted(np.random.default_rng(1), 300, impossible=impossible, limit=1.0)
    hold(raw, solved(raw, tmp_path, time_limit_s=3.0, gap=0.3))
