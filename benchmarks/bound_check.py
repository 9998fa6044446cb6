"""Check answers and bounds of the solver on thousands of small random problems against trying everything, in exact arithmetic.

    python benchmarks/bound_check.py [--problems N] [--seed N] [--seconds S] [--timeout S]

Each problem is written as a file of the contest's format, read back and solved with `effort="exact"`; what it costs at least is found by
trying every choice in whole numbers (or fractions) as they stand in the file. Counted as wrong: a bound above the optimum, an answer
that the judge refuses though one exists or that claims what it is not, a problem called infeasible that is not, and any exception. Where
there is no time limit, also an optimum that is missed. Where bytes do not add up exactly in floating point (fractions, 2^53 and more)
the solver keeps a margin from the limit and may miss what is nearer; that is counted apart. Prints one line of JSON, and every wrong
case to stderr with its seed.

`--timeout` is the solver's time limit per problem, `--seconds` the CPU seconds after which no further problem is begun.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np

from autopar.errors import InfeasibleError
from autopar.search.solver.judge import judge
from autopar.search.solver.problem_file import read_instance
from autopar.search.solver.rounding import on_grids
from autopar.search.solver.solve import solve

__all__ = ["KINDS", "checked", "optimum", "random_problem"]

Raw = dict[str, Any]
IMPOSSIBLE = 10**18
MOST_CHOICES = 3000

# What entries of node and edge tables are drawn from.
KINDS: dict[str, Any] = {
    "small": lambda rng, n: rng.integers(0, 20, n).tolist(),
    "tied": lambda rng, n: rng.integers(0, 2, n).tolist(),
    "negative": lambda rng, n: rng.integers(-20, 20, n).tolist(),
    "free": lambda rng, n: [0] * n,
    "fractions": lambda rng, n: rng.uniform(0, 10, n).tolist(),
    "tenths": lambda rng, n: (rng.integers(0, 30, n) / 10).tolist(),
    "spread": lambda rng, n: [int(10**x) for x in rng.uniform(0, 17.9, n).tolist()],
    "huge": lambda rng, n: rng.integers(10**15, 10**18, n).tolist(),
    "huge and near": lambda rng, n: (10**17 + rng.integers(0, 40, n)).tolist(),
    "at the edge": lambda rng, n: (IMPOSSIBLE - 1 - rng.integers(0, 3, n)).tolist(),
    "huge fractions": lambda rng, n: (rng.uniform(1, 2, n) * 1e15).tolist(),
}
HELD: dict[str, Any] = {
    "small": lambda rng, n: rng.integers(0, 10, n).tolist(),
    "zero": lambda rng, n: [0] * n,
    "zero or one": lambda rng, n: rng.integers(0, 2, n).tolist(),
    "fractions": lambda rng, n: rng.uniform(0, 3, n).tolist(),
    "tenths": lambda rng, n: (rng.integers(0, 30, n) / 10).tolist(),
    "huge": lambda rng, n: (10**16 + rng.integers(0, 10, n)).tolist(),
    "spread": lambda rng, n: [int(10**x) for x in rng.uniform(0, 13, n).tolist()],
}
LIMITS = (-0.1, 0.0, 0.0, 0.05, 0.2, 0.5, 1.0, 1.5)  # 0: what some choice needs at least; 1: what none needs more than


def random_problem(seed: int) -> Raw:
    """A `problem` object of a file: up to 8 nodes, with edges both ways round, parallel, and from nodes to themselves."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 9))
    sizes: list[int] = []
    for _ in range(count):
        sizes.append(int(rng.integers(1, 1 + max(1, min(5, MOST_CHOICES // int(np.prod(sizes, dtype=int)))))))
    steps = int(rng.choice([1, 2, 4, 8, 30]))
    own, between, held = (str(rng.choice(list(kinds))) for kinds in (KINDS, KINDS, HELD))
    impossible = float(rng.choice([0.0, 0.0, 0.05, 0.2, 0.5]))
    edges = rng.integers(0, count, (int(rng.integers(0, 3 * count + 1)), 2)).tolist()

    def costs(kind: str, size: int) -> list[float]:
        drawn = KINDS[kind](rng, size)
        barred = rng.random(size) < impossible
        return [int(rng.choice([IMPOSSIBLE, IMPOSSIBLE + 1, 3 * IMPOSSIBLE])) if bar else c for c, bar in zip(drawn, barred, strict=True)]

    starts = rng.integers(0, steps, count).tolist()
    raw: Raw = {
        "nodes": {
            "intervals": [[lo, int(rng.integers(lo, steps + 1))] for lo in starts],
            "costs": [costs(own, size) for size in sizes],
            "usages": [HELD[held](rng, size) for size in sizes],
        },
        "edges": {"nodes": edges, "costs": [costs(between, sizes[i] * sizes[j]) for i, j in edges]},
    }
    _, peaks = everything(raw)
    least, most = min(peaks), max(peaks)
    limit = least + Fraction(float(rng.choice(LIMITS))) * (most - least) - (1 if rng.random() < 0.1 else 0)
    if rng.random() < 0.95:
        raw["usage_limit"] = int(limit) if rng.random() < 0.8 else float(limit)
    return raw


def everything(raw: Raw) -> tuple[list[Fraction | None], list[Fraction]]:
    """Cost (None: not possible) and peak usage of every choice, exact; the last node's strategy changes fastest."""
    nodes, edges = raw["nodes"], raw["edges"]
    sizes = [len(costs) for costs in nodes["costs"]]
    picked = np.indices(sizes).reshape(len(sizes), -1)
    total = np.full(picked.shape[1], Fraction(0), object)
    barred = np.zeros(picked.shape[1], bool)
    tables = [(picked[i], costs) for i, costs in enumerate(nodes["costs"])]
    tables += [(picked[i] * sizes[j] + picked[j], costs) for (i, j), costs in zip(edges["nodes"], edges["costs"], strict=True)]
    for at, costs in tables:
        total = total + _exact(costs)[at]
        barred |= np.array([cost >= IMPOSSIBLE for cost in costs])[at]
    peak = np.full(picked.shape[1], Fraction(0), object)
    for start in {lo for lo, hi in nodes["intervals"] if lo < hi}:
        alive = [i for i, (lo, hi) in enumerate(nodes["intervals"]) if lo <= start < hi]
        peak = np.maximum(peak, sum(_exact(nodes["usages"][i])[picked[i]] for i in alive))
    return [None if bar else cost for cost, bar in zip(total.tolist(), barred.tolist(), strict=True)], peak.tolist()


def _exact(numbers: list[float]) -> Any:
    return np.array([Fraction(number) for number in numbers], object)


def optimum(raw: Raw) -> Fraction | None:
    """The least cost within the limit, exact; None where nothing is."""
    limit = raw.get("usage_limit", float("inf"))
    costs, peaks = everything(raw)
    return min((cost for cost, peak in zip(costs, peaks, strict=True) if cost is not None and peak <= limit), default=None)


def checked(raw: Raw, folder: Path, timeout_s: float | None) -> Iterator[str]:
    """What can be said of one problem: what kind it was, and words that begin with `wrong` where the solver is."""
    path = folder / "made.json"
    path.write_text(json.dumps({"problem": raw}))
    problem, best = read_instance(path).problem, optimum(raw)
    yield "feasible" if best is not None else "infeasible"
    try:
        solution = solve(problem, effort="exact", time_limit_s=timeout_s)
    except InfeasibleError:
        if best is not None:
            yield "wrong: called infeasible"
        return
    verdict = judge(raw, solution.choice)
    bound = solution.lower_bound_s
    wrong = "wrong" if on_grids(problem) is None else "bytes too long for floating point"
    if solution.feasible != verdict.feasible:
        yield f"{wrong}: claims feasible={solution.feasible}, judge: {verdict.fault or 'feasible'}"
    if best is None:
        return
    if not bound <= best:
        yield f"wrong: the bound is above the optimum, by {float(Fraction(bound) - best):.3g} of {float(best):.6g}"
    if not verdict.feasible:
        yield f"{wrong}: nothing found that fits"
        return
    if verdict.cost == best:
        yield "optimum found"
    elif verdict.cost > best + Fraction(2.0**-50) * _scale(raw):
        yield f"{wrong}: the optimum is missed" if timeout_s is None else "optimum missed"
    yield "proven" if best - Fraction(bound) <= Fraction(1e-9) * _scale(raw) else "not proven"


def _scale(raw: Raw) -> Fraction:
    """The sum of the largest costs, for what floating-point numbers cannot tell apart."""
    rows = [*raw["nodes"]["costs"], *raw["edges"]["costs"]]
    return sum((max((abs(Fraction(cost)) for cost in row if cost < IMPOSSIBLE), default=Fraction(0)) for row in rows), Fraction(0))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first problem; the others follow")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--timeout", type=float, default=None)
    options = parser.parse_args()
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seed, options.seed + options.problems):
            if process_time() > options.seconds:
                break
            counts["problems"] += 1
            try:
                for words in checked(random_problem(seed), Path(folder), options.timeout):
                    counts[words.split(",")[0]] += 1
                    if words.startswith("wrong"):
                        print(f"seed {seed}: {words}", file=sys.stderr)
            except Exception as error:  # whatever it is, the others are to be tried
                counts["wrong: exception"] += 1
                print(f"seed {seed}: {type(error).__name__}: {error}", file=sys.stderr)
    print(json.dumps(dict(sorted(counts.items())) | {"cpu_seconds": round(process_time(), 1)}))
    return int(any(words.startswith("wrong") for words in counts))


if __name__ == "__main__":
    sys.exit(main())
