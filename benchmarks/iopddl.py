"""Solve a problem of the ASPLOS 2025 / EuroSys 2025 contest on intra-operator parallelism.

    python benchmarks/iopddl.py FILE --timeout SECONDS [--seed N] [--gap G] [--progress]

FILE is one of the contest's instances, JSON or gzipped JSON. Prints one line of JSON: `instance`, `cost`, `feasible`, `lower_bound`,
`seconds` from the start of this process, imports and reading included, and `gap`. Cost and feasibility are a judge's that shares no
code with the solver and adds whole numbers from the file. An answer that breaks the limit counts for nothing: then `cost` is null and
`fault` says why. Ctrl-C, or a signal to terminate, ends the search early with the best choice so far. `--progress` writes a line to
stderr whenever something better is known. The exit code is 0 for a feasible answer, 1 for none, 2 for a file that cannot be used.

The results are in `benchmarks/iopddl.md`.
"""

from __future__ import annotations

from time import perf_counter, process_time

START = perf_counter()

import argparse  # noqa: E402
import json  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
from math import inf, isfinite  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from autopar.errors import AutoparError, InfeasibleError  # noqa: E402
from autopar.search.solver.judge import judge  # noqa: E402
from autopar.search.solver.problem_file import read_instance  # noqa: E402
from autopar.search.solver.solve import Progress, solve  # noqa: E402

RESERVE_S = 1.0  # of the timeout: to judge the answer, and for a step of the search that is under way when time is up
RESERVE_SHARE = 0.02
MOST_SLOW = 5.0  # times that, on a machine that is busy with other work


def amount(text: str) -> float:
    """A finite number of at least 0."""
    value = float(text)
    if not 0 <= value < inf:
        raise ValueError
    return value


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--timeout", type=amount, required=True, help="seconds from the start of this process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gap", type=amount, default=0.0, help="stop when cost and bound differ by no more than this part of the bound")
    parser.add_argument("--progress", action="store_true")
    return parser.parse_args()


class Reporter:
    """Writes a line whenever the best cost or the bound has changed."""

    def __init__(self) -> None:
        self.last: tuple[float, float] | None = None

    def __call__(self, step: Progress) -> None:
        if (step.best_cost_s, step.lower_bound_s) != self.last:
            self.last = (step.best_cost_s, step.lower_bound_s)
            at = f"{perf_counter() - START:7.1f} s  {step.phase:12}"
            print(f"{at}  cost {step.best_cost_s:.12g}  bound {step.lower_bound_s:.12g}  gap {step.gap:.3g}", file=sys.stderr, flush=True)


def answer(options: argparse.Namespace) -> dict[str, Any]:
    """The line to print."""
    instance = read_instance(options.file)
    found: dict[str, Any] = {"instance": instance.name, "cost": None, "feasible": False, "lower_bound": None}
    spent = perf_counter() - START
    slow = min(max(1.0, spent / max(process_time(), 1e-9)), MOST_SLOW)  # reading is one thread's work: seconds over CPU seconds
    left = options.timeout - slow * (RESERVE_S + RESERVE_SHARE * options.timeout) - spent
    try:
        solution = solve(
            instance.problem,
            effort="exact",
            time_limit_s=max(0.0, left),
            seed=options.seed,
            gap=options.gap,
            progress=Reporter() if options.progress else None,
        )
    except InfeasibleError as error:
        return found | {"fault": str(error), "seconds": round(perf_counter() - START, 3)}
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # there is an answer: it is about to be printed
    verdict = judge(instance.raw, solution.choice)
    bound = solution.lower_bound_s
    found |= {"feasible": verdict.feasible, "lower_bound": bound if isfinite(bound) else None}
    if verdict.feasible:
        cost = verdict.cost if isinstance(verdict.cost, int) else float(verdict.cost)
        over = max(0.0, cost - bound)
        found |= {"cost": cost, "gap": 0.0 if not over else over / abs(bound) if bound and isfinite(bound) else None}
    elif bound == inf:
        found |= {"fault": f"no choice fits; of one that was tried: {verdict.fault}"}
    else:
        found |= {"fault": verdict.fault}
    return found | {"seconds": round(perf_counter() - START, 3)}


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    options = arguments()
    signal.signal(signal.SIGTERM, interrupt)
    try:
        found = answer(options)
    except AutoparError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted before there was an answer", file=sys.stderr)
        return 130
    print(json.dumps(found))
    return 0 if found["feasible"] else 1


if __name__ == "__main__":
    sys.exit(main())
