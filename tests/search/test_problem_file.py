"""Problem files: what is read is what the judge sees, and what is damaged is named."""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autopar.errors import AutoparError, ProblemError
from autopar.search.solver.check import check
from autopar.search.solver.judge import judge
from autopar.search.solver.problem import Problem, Segment, Table
from autopar.search.solver.problem_file import IMPOSSIBLE, _sum_from_below, read_instance

GOOD: dict[str, Any] = {
    "problem": {
        "name": "small",
        "nodes": {
            "intervals": [[0, 3], [1, 1], [2, 9]],
            "costs": [[1, 2], [0, 0, 5], [7]],
            "usages": [[10, 3], [9, 9, 9], [4]],
        },
        "edges": {"nodes": [[0, 1], [2, 1]], "costs": [[0, 1, 2, 3, IMPOSSIBLE, 5], [1, 2, 3]]},
        "usage_limit": 13,
    }
}


def written(folder: Path, document: Any, name: str = "file.json") -> Path:
    path = folder / name
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def random_raw(seed: int) -> dict[str, Any]:
    """A `problem` object with edges both ways round, from nodes to themselves, parallel ones, and impossible entries."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 6))
    sizes = rng.integers(1, 5, count).tolist()
    starts = rng.integers(0, 6, count)
    ends = rng.integers(0, count, (int(rng.integers(0, 8)), 2)).tolist()

    def costs(size: int) -> list[int]:
        found = rng.integers(0, 9, size)
        return [IMPOSSIBLE + 7 if rng.random() < 0.05 else int(c) for c in found]

    return {
        "nodes": {
            "intervals": [[int(s), int(s + n)] for s, n in zip(starts, rng.integers(0, 5, count), strict=True)],
            "costs": [costs(n) for n in sizes],
            "usages": [rng.integers(0, 9, n).tolist() for n in sizes],
        },
        "edges": {"nodes": ends, "costs": [costs(sizes[i] * sizes[j]) for i, j in ends]},
        "usage_limit": int(rng.integers(5, 20)),
    }


def test_what_is_read_is_what_the_judge_sees(tmp_path: Path) -> None:
    possible = 0
    for seed in range(150):
        raw = random_raw(seed)
        instance = read_instance(written(tmp_path, {"problem": raw}))
        check(instance.problem)
        rng = np.random.default_rng(seed)
        for _ in range(4):
            choice = tuple(int(rng.integers(len(costs))) for costs in raw["nodes"]["costs"])
            verdict = judge(instance.raw, choice)
            cost, peak = instance.problem.evaluate(choice)
            assert peak == verdict.peak
            assert verdict.feasible == (cost < np.inf and peak <= instance.problem.memory_limit_bytes), seed
            assert cost == verdict.cost or (cost == np.inf and "not possible" in verdict.fault)
            possible += verdict.feasible
            starts, usage = instance.problem.usage(choice)
            for start, now in zip(starts.tolist(), usage.tolist(), strict=True):
                alive = [i for i, (lo, hi) in enumerate(raw["nodes"]["intervals"]) if lo <= start < hi]
                assert now == sum(raw["nodes"]["usages"][i][choice[i]] for i in alive)
    assert possible > 50


def test_gzip_is_read_and_equal_tables_are_stored_once(tmp_path: Path) -> None:
    raw = copy.deepcopy(GOOD["problem"])
    raw["nodes"]["costs"][2], raw["nodes"]["usages"][2] = [1, 2], [10, 3]
    raw["edges"] = {"nodes": [[0, 1], [1, 0], [2, 1]], "costs": [[0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5], [0, 3, 1, 4, 2, 5][::-1]]}
    raw["edges"]["costs"][2] = [0, 1, 2, 3, 4, 5]
    path = tmp_path / "packed.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"problem": raw}).encode()))
    problem = read_instance(path).problem
    assert problem.nodes[0] == problem.nodes[2] and problem.edges[0][:2] == problem.edges[1][:2] == (0, 1)
    assert (problem.tables[problem.edges[0][2]].cost_s == problem.tables[problem.edges[1][2]].cost_s).all()
    assert len(problem.tables) == 5 and problem.edges[2][:2] == (1, 2)


def test_what_costs_a_little_less_than_the_impossible_is_possible(tmp_path: Path) -> None:
    raw = copy.deepcopy(GOOD["problem"])
    raw["nodes"]["costs"][2], raw["edges"]["costs"][1] = [IMPOSSIBLE - 1], [IMPOSSIBLE - 1, 10**400, IMPOSSIBLE]
    problem = read_instance(written(tmp_path, {"problem": raw})).problem
    for choice in ((1, 0, 0), (1, 1, 0), (1, 2, 0)):
        assert (problem.evaluate(choice)[0] < np.inf) == judge(raw, choice).feasible == (choice[1] == 0)
    own, self_edge = np.array([2.8, 1.0]), np.array([1858779580229217.0, 1.0])
    assert Fraction(float(_sum_from_below(own, self_edge)[0])) <= Fraction(2.8) + 1858779580229217


def test_answers_that_do_not_count() -> None:
    raw = GOOD["problem"]
    assert judge(raw, (0, 0, 0)).fault == "step 2: usage 14 over the limit of 13"
    assert judge(raw, (1, 1, 0)).fault == "edge 0: not possible"
    assert judge(raw, (1, 3, 0)).fault == "node 1: strategy 3 of 3" and judge(raw, (1, -1, 0)).fault and judge(raw, (1, 1)).fault
    assert judge(raw, (1, 0, 0)).feasible and judge(raw, (1, 0, 0)).cost == 2 + 0 + 7 + 3 + 1


def damage(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    """Puts `value` in the place `path` of the `problem` object."""

    def change(problem: dict[str, Any]) -> None:
        at: Any = problem
        for step in path[:-1]:
            at = at[step]
        at[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (damage("nodes", "costs", 1, 2, value=float("nan")), r"nodes\.costs\[1\]\[2\] is NaN"),
        (damage("nodes", "costs", 1, 2, value="5"), r'nodes\.costs\[1\]\[2\] is "5"'),
        (damage("nodes", "costs", 1, 2, value=None), r"nodes\.costs\[1\]\[2\] is null"),
        (damage("nodes", "costs", 1, 2, value=[3]), r"nodes\.costs\[1\]\[2\] is \[3\]"),
        (damage("nodes", "costs", 1, 2, value=True), r"nodes\.costs\[1\]\[2\] is true"),
        (damage("nodes", "costs", 1, 2, value=-float("inf")), r"nodes\.costs\[1\]\[2\] is -Infinity"),
        (damage("nodes", "costs", 1, value=[]), r"nodes\.costs\[1\] is empty"),
        (damage("nodes", "costs", 1, value=[1, 2]), r"nodes\.usages\[1\] has 3 entries.*2 costs"),
        (damage("nodes", "costs", value=[[1, 2]]), r"nodes has 3 intervals and 1 costs"),
        (damage("nodes", "usages", 0, 1, value=-3), r"nodes\.usages\[0\]\[1\] is -3"),
        (damage("nodes", "usages", 0, 1, value=float("inf")), r"nodes\.usages\[0\]\[1\] is Infinity"),
        (damage("nodes", "usages", 0, value=7), r"nodes\.usages\[0\] is 7; wanted a list"),
        (damage("nodes", "intervals", 1, value=[3, 2]), r"nodes\.intervals\[1\] is \[3, 2\]"),
        (damage("nodes", "intervals", 1, value=[-1, 2]), r"nodes\.intervals\[1\] is \[-1, 2\]"),
        (damage("nodes", "intervals", 1, value=[0.5, 2]), r"nodes\.intervals\[1\] is \[0\.5, 2\]"),
        (damage("nodes", "intervals", 1, value=[0]), r"nodes\.intervals\[1\] is \[0\]"),
        (damage("nodes", "intervals", 1, value=[0, 10**30]), r"nodes\.intervals\[1\] is \[0, 1000"),
        (damage("edges", "nodes", 1, value=[0, 3]), r"edges\.nodes\[1\] is \[0, 3\]; nodes are numbered 0 to 2"),
        (damage("edges", "nodes", 1, value=[-1, 2]), r"edges\.nodes\[1\] is \[-1, 2\]"),
        (damage("edges", "nodes", 1, value=[0, 1, 2]), r"edges\.nodes\[1\] is \[0, 1, 2\]"),
        (damage("edges", "costs", 0, value=[0, 1, 2, 3, 4]), r"edges\.costs\[0\] has 5 entries.*wanted 6"),
        (damage("edges", "costs", value=[[0]]), r"edges has 2 nodes and 1 costs"),
        (damage("edges", "costs", 0, 3, value={}), r"edges\.costs\[0\]\[3\] is \{\}"),
        (damage("edges", value=[]), r"edges is \[\]; wanted an object"),
        (damage("nodes", value={}), r"nodes\.intervals is missing"),
        (damage("nodes", "costs", 0, 1, value=-(10**400)), r"nodes\.costs\[0\]\[1\] is -1000"),
        (damage("usage_limit", value=float("nan")), r"usage_limit is NaN"),
        (damage("usage_limit", value="13"), r'usage_limit is "13"'),
    ],
)
def test_damage_is_named(change: Callable[[dict[str, Any]], None], words: str, tmp_path: Path) -> None:
    document = copy.deepcopy(GOOD)
    change(document["problem"])
    with pytest.raises(ProblemError, match=rf"file\.json: problem\.{words}"):
        read_instance(written(tmp_path, document))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"problem": 3}', '{"problem": {"nodes"', "\x00\x01", "[" * 100_000, "9" * 10_000])
def test_what_is_no_problem_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ProblemError, match=r"file\.json: "):
        read_instance(written(tmp_path, text))


def test_keys_that_occur_twice_are_refused(tmp_path: Path) -> None:
    text = json.dumps(GOOD)
    with pytest.raises(ProblemError, match=r'file\.json: the key "usage_limit" occurs twice'):
        read_instance(written(tmp_path, text.replace('"usage_limit"', '"usage_limit": 5, "usage_limit"')))


def test_cut_gzip_and_missing_files_are_refused(tmp_path: Path) -> None:
    whole = gzip.compress(json.dumps(GOOD).encode())
    for name, data in {"short": whole[: len(whole) // 2], "head": whole[:2], "noise": b"\x1f\x8b" + bytes(range(200))}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ProblemError, match=f"{name}: the gzip data is damaged or cut short"):
            read_instance(tmp_path / name)
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(ProblemError, match="cannot read"):
            read_instance(path)


def test_every_single_change_of_a_file_is_read_or_refused(tmp_path: Path) -> None:
    text = json.dumps(GOOD)
    rng = np.random.default_rng(0)
    for _ in range(400):
        at = int(rng.integers(len(text)))
        damaged = text[:at] + str(rng.choice(list('0-9e.,[]{}"a '))) + text[at + int(rng.integers(0, 3)) :]
        try:
            check(read_instance(written(tmp_path, damaged)).problem)
        except AutoparError:
            continue


def timed(**changes: object) -> Problem:
    table, edge = Table(np.zeros(2), np.zeros(2)), Table(np.zeros((2, 2)), np.zeros((2, 2)))
    fields: dict[str, object] = {"nodes": (0, 0), "edges": ((0, 1, 1),), "tables": (table, edge), "segments": (Segment(0, 2, 1),)}
    return Problem(**(fields | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (timed(live=((0, 1),)), "live has 1 intervals, and there are 2 nodes"),
        (timed(live=((0, 1), (3, 2))), r"live\[1\] is the interval \[3, 2\]"),
        (timed(edges_live=()), "edges_live has 0 intervals, and there are 1 edges"),
        (timed(also=((0, 0, 4, 3),)), r"also\[0\] is the interval \[4, 3\]"),
        (timed(also=((0, 1, 0, 3),)), r"also\[0\] gives table 1 to node 0"),
        (timed(also=((2, 0, 0, 3),)), r"also\[0\] gives table 0 to node 2"),
    ],
)
def test_damaged_times_are_named(problem: Problem, words: str) -> None:
    with pytest.raises(AutoparError, match=words):
        check(problem)


def test_memory_over_time_adds_nodes_edges_and_further_holdings() -> None:
    tables = (
        Table(np.zeros(2), np.array([1.0, 2.0])),
        Table(np.zeros((2, 2)), np.array([[4.0, 8.0], [16.0, 32.0]])),
        Table(np.zeros(2), np.array([64.0, 128.0])),
    )
    problem = Problem((0, 0), ((0, 1, 1),), tables, (), live=((0, 4), (2, 6)), edges_live=((3, 5),), also=((1, 2, 7, 8),))
    starts, usage = problem.usage((1, 0))
    assert dict(zip(starts.tolist(), usage.tolist(), strict=True)) == {0: 2, 2: 3, 3: 19, 4: 17, 5: 1, 6: 0, 7: 64, 8: 0}
    assert problem.evaluate((1, 0)) == (0.0, 64.0)
    always = Problem((0, 0), ((0, 1, 1),), tables, (), live=((0, 0), (2, 6)))
    assert always.evaluate((1, 0)) == (0.0, 17.0)
