"""`solve` on problems with time steps, and the contest's command line: answers hold, bounds are bounds, and nothing hangs."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from time import perf_counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from autopar.errors import InfeasibleError
from autopar.search.solver import minimise, timed
from autopar.search.solver.arrays import lay_out
from autopar.search.solver.eliminate import hopeless
from autopar.search.solver.evaluate import add_prices
from autopar.search.solver.last_resort import least_memory
from autopar.search.solver.minimise import Minimiser
from autopar.search.solver.problem import Problem, Segment, Table
from autopar.search.solver.reduce import reduce
from autopar.search.solver.solve import Progress, solve
from benchmarks.contest_like import planted
from tests.search.test_problem_file import GOOD, random_raw
from tests.search.test_shrink import problems, within

REPOSITORY = Path(__file__).resolve().parents[2]


def grid(side: int, size: int, seed: int, tightness: float = 0.3) -> Problem:
    """A grid of nodes, each alive for a few steps: no order of elimination keeps its tables small."""
    rng = np.random.default_rng(seed)
    tables = [Table(rng.integers(0, 50, size).astype(float), rng.integers(1, 50, size).astype(float)) for _ in range(7)]
    tables += [Table(rng.integers(0, 50, (size, size)).astype(float), np.zeros((size, size))) for _ in range(5)]
    nodes = tuple(rng.integers(0, 7, side * side).tolist())
    edges = [(n, n + 1, 7 + int(rng.integers(5))) for n in range(side * side) if (n + 1) % side]
    edges += [(n, n + side, 7 + int(rng.integers(5))) for n in range(side * (side - 1))]
    live = tuple((int(t), int(t + w)) for t, w in zip(rng.integers(0, 40, side * side), rng.integers(0, 9, side * side), strict=True))
    free = Problem(nodes, tuple(edges), tuple(tables), (Segment(0, side * side, 1),), np.inf, live)
    least = free.usage(tuple(int(tables[t].memory_bytes.argmin()) for t in nodes))[1].max()
    most = free.usage(tuple(int(tables[t].memory_bytes.argmax()) for t in nodes))[1].max()
    return replace(free, memory_limit_bytes=float(np.ceil(least + tightness * (most - least))))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(problem=problems())
def test_answers_hold_and_bounds_are_bounds(problem: Problem) -> None:
    fitting = within(problem)
    if not problem.timed:
        return
    try:
        solution = solve(problem, effort="exact")
    except InfeasibleError:
        assert not fitting
        return
    assert (solution.cost_s, solution.memory_bytes) == problem.evaluate(solution.choice)
    assert solution.feasible == bool(fitting)
    if fitting:
        assert solution.lower_bound_s <= min(fitting.values()) <= solution.cost_s
        assert fitting[solution.choice] == solution.cost_s


def test_progress_falls_rises_and_ends_at_the_answer() -> None:
    seen: list[Progress] = []
    problem = grid(12, 5, 0)
    solution = solve(problem, time_limit_s=6.0, gap=0.001, progress=seen.append)
    costs, bounds = [step.best_cost_s for step in seen], [step.lower_bound_s for step in seen]
    assert costs == sorted(costs, reverse=True) and bounds == sorted(bounds) and len(seen) > 1
    assert solution.feasible and solution.cost_s == costs[-1] >= solution.lower_bound_s >= bounds[-1] - 1e-6
    assert [step.seconds for step in seen] == sorted(step.seconds for step in seen)


def test_ctrl_c_returns_the_best_so_far() -> None:
    problem = grid(12, 5, 1)

    def stop(step: Progress) -> None:
        if step.best_cost_s < np.inf:
            raise KeyboardInterrupt

    solution = solve(problem, effort="exact", progress=stop)
    assert solution.feasible and solution.memory_bytes <= problem.memory_limit_bytes
    assert solution.lower_bound_s <= solution.cost_s


def test_same_seed_same_answer() -> None:
    for seed in range(2):
        problem = grid(4, 3, seed)
        first, second = (solve(problem, effort="exact", seed=3) for _ in range(2))
        assert first.choice == second.choice and first.lower_bound_s == second.lower_bound_s


def test_without_any_time_what_fits_is_found() -> None:
    for seed in range(4):
        problem = grid(12, 5, seed, tightness=0.1 * seed)
        start = perf_counter()
        solution = solve(problem, effort="exact", time_limit_s=0.0)
        assert perf_counter() - start < 10
        assert solution.feasible and solution.lower_bound_s <= solution.cost_s
        assert problem.evaluate(solution.choice) == (solution.cost_s, solution.memory_bytes)


def test_who_waits_for_a_compiler_in_vain_has_the_choice_of_least_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    never = Thread(target=Event().wait, daemon=True)
    never.start()
    monkeypatch.setattr(timed, "loading", lambda: never)
    monkeypatch.setattr(timed, "_LOADING_S", 0.1)
    problem = grid(12, 5, 2)
    solution = solve(problem, effort="exact", time_limit_s=0.2)
    assert solution.feasible and 0 < solution.lower_bound_s <= solution.cost_s


def test_least_memory_is_least_at_prices_of_one_over_the_room() -> None:
    arrays = lay_out(grid(6, 4, 3))
    choice, priced = least_memory(arrays), np.zeros(len(arrays.cost))
    add_prices(arrays, 1.0 / arrays.room, priced)
    for node, strategy in enumerate(choice.tolist()):
        own = priced[arrays.first[node] : arrays.first[node + 1]]
        assert own[strategy] <= own.min() * (1 + 1e-9)


def test_what_elimination_cannot_hold_is_searched_without_time_steps_too() -> None:
    rng = np.random.default_rng(3)
    size, count = 12, 18
    tables = [Table(rng.integers(0, 50, size).astype(float), rng.integers(0, 50, size).astype(float)) for _ in range(count)]
    edges = []
    for i in range(count):
        for j in range(i + 1, count):
            edges.append((i, j, len(tables)))
            tables.append(Table(rng.integers(0, 50, (size, size)).astype(float), np.zeros((size, size))))
    problem = Problem(tuple(range(count)), tuple(edges), tuple(tables), (Segment(0, count, 1),), 400.0)
    assert not Minimiser(reduce(problem).problem).fits
    solution = solve(problem, time_limit_s=1.5)
    assert solution.feasible and solution.memory_bytes <= 400.0 and solution.lower_bound_s <= solution.cost_s


def cliques(parts: int, count: int, size: int) -> Problem:
    """Parts in which every node has an edge to every other of its part."""
    rng = np.random.default_rng(5)
    tables = [Table(rng.integers(0, 50, size).astype(float), np.zeros(size))]
    edges = []
    for base in range(0, parts * count, count):
        for i in range(count):
            for j in range(i + 1, count):
                edges.append((base + i, base + j, len(tables)))
                tables.append(Table(rng.integers(0, 50, (size, size)).astype(float), np.zeros((size, size))))
    return Problem((0,) * (parts * count), tuple(edges), tuple(tables), (Segment(0, parts * count, 1),))


def test_a_dear_elimination_is_searched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minimise, "_DEAR_ENTRIES", 1e8)
    problem = cliques(3, 9, 7)
    minimiser = Minimiser(reduce(problem).problem)
    assert minimiser.fits and minimiser.dear
    solution = solve(problem, time_limit_s=2.0)
    assert solution.cost_s == solution.lower_bound_s


def test_a_hopeless_elimination_is_found_out_early() -> None:
    problem = cliques(1, 60, 4)
    assert hopeless(dict.fromkeys(range(60), 4), [(i, j) for i, j, _ in problem.edges])
    assert not hopeless(dict.fromkeys(range(60), 4), [(i, i + 1) for i in range(59)])


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "iopddl.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_command_prints_one_line(tmp_path: Path) -> None:
    path = tmp_path / "small.json.gz"
    path.write_bytes(gzip.compress(json.dumps(GOOD).encode()))
    done = run(str(path), "--timeout", "30")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    found: dict[str, Any] = json.loads(line)
    assert found["instance"] == "small" and found["feasible"] and found["cost"] == 13
    assert 13 - 1e-6 < found["lower_bound"] <= 13 and found["gap"] < 1e-6
    assert 0 < found["seconds"] < 30


def test_the_command_prints_fractions_and_refuses_what_is_no_time(tmp_path: Path) -> None:
    path = tmp_path / "small.json"
    path.write_text(
        json.dumps({"problem": {**GOOD["problem"], "nodes": {**GOOD["problem"]["nodes"], "costs": [[1.5, 2.25], [0, 0, 5], [7]]}}})
    )
    done = run(str(path), "--timeout", "0")
    assert done.returncode == 0 and json.loads(done.stdout)["cost"] == 13.25, done.stderr
    for arguments in (("--timeout", "nan"), ("--timeout", "-1"), ("--timeout", "9", "--gap", "nan")):
        refused = run(str(path), *arguments)
        assert refused.returncode == 2 and "invalid" in refused.stderr and "Traceback" not in refused.stderr


def test_the_command_answers_when_it_is_to_end(tmp_path: Path) -> None:
    path = tmp_path / "entangled.json"
    path.write_text(json.dumps({"problem": planted(np.random.default_rng(0), 400, impossible=0.1)}))
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "iopddl.py"), str(path), "--timeout", "100", "--progress"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "cost inf" in process.stderr.readline():
            pass
        process.terminate()
        out, _ = process.communicate(timeout=60)
    found = json.loads(out)
    assert process.returncode == 0 and found["feasible"] and found["seconds"] < 60


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("{", 2, "no JSON at line 1"),
        (json.dumps({"problem": {**GOOD["problem"], "usage_limit": 3}}), 1, "step 2"),
        (json.dumps({"problem": {**random_raw(4), "usage_limit": -1}}), 1, "over the limit"),
    ],
)
def test_the_command_says_what_is_wrong(text: str, code: int, words: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    done = run(str(path), "--timeout", "30")
    assert done.returncode == code and words in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
