"""`solve`: from a problem to a choice, and what is proven about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Literal

import numpy as np

from autopar.errors import InfeasibleError
from autopar.search.solver.check import check
from autopar.search.solver.incumbent import Incumbent, Progress
from autopar.search.solver.memory import GOOD_GAP, constrained
from autopar.search.solver.minimise import Minimiser, Price
from autopar.search.solver.over_time import solve_over_time
from autopar.search.solver.problem import Problem, Solution, Table
from autopar.search.solver.reduce import Reduced, reduce, restrict
from autopar.search.solver.rounding import fits, lowered, on_grids
from autopar.search.solver.steps import Steps, in_steps

_UNKNOWN_S = 60.0  # how long the fast search looks for anything that fits where no table of elimination does

__all__ = ["Progress", "restrict", "search", "solve", "solve_with"]


class Ready:
    """A problem of few steps made ready to be solved under many limits and prices: reduced once, and no minimum is looked for twice."""

    def __init__(self, steps: Steps) -> None:
        self.starts = steps.starts
        self.reduced = reduce(steps.problem)
        self.minimiser = Minimiser(self.reduced.problem)


def solve(
    problem: Problem,
    *,
    ready: Ready | None = None,
    beside_bytes: tuple[float, ...] = (),
    effort: Literal["fast", "exact"] = "fast",
    time_limit_s: float | None = None,
    seed: int = 0,
    gap: float | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Solution:
    """The cheapest choice within the problem's memory limit, or nearly, with a bound that says how nearly.

    Without a limit in the way the choice is optimal (but for graphs so entangled that no table of elimination fits, where the bound
    says so). With one, `"fast"` prices memory and mixes; `"exact"` also closes the gap by branch and bound, within `time_limit_s`
    seconds. Problems whose memory differs between many time steps, and those that elimination cannot hold, are searched: until the time
    limit, until cost and bound differ by no more than `gap` of the bound (None: 0.01% for `"fast"`, nothing for `"exact"`), or
    until nothing is found for long. `progress` is called on every step. Ctrl-C ends the search with the best choice so far, if there
    is one. The same `seed` gives the same answer where the time limit is not what ends the search.

    `ready`: the problem, whatever its limit, made ready before. `beside_bytes`: by step of `ready`, what is held whatever is chosen.

    Raises `PlanError` for a damaged problem and `InfeasibleError` when every choice is impossible whatever the memory, or, with time
    steps, when it is plain that nothing fits.
    """
    gap = (GOOD_GAP if effort == "fast" else 0.0) if gap is None else gap
    options = _Options(effort, time_limit_s, seed, gap, progress)
    if ready is not None:
        return _by_steps(problem, ready, beside_bytes, options)
    check(problem)
    grids = on_grids(problem)
    if grids is None:
        return _solved(problem, options)
    start = perf_counter()
    found = _solved(grids[0], options if time_limit_s is None else replace(options, time_limit_s=time_limit_s / 2))
    if found.feasible and not fits(grids[1], found.choice):
        found = replace(found, feasible=fits(problem, found.choice))
        try:
            strict = _solved(grids[1], options.after(perf_counter() - start))
        except InfeasibleError:
            strict = found
        if strict.feasible:
            found = replace(strict, lower_bound_s=found.lower_bound_s)
    return replace(found, memory_bytes=problem.evaluate(found.choice)[1])


@dataclass(frozen=True, slots=True)
class _Options:
    """How `solve` was asked; `gap` is known."""

    effort: Literal["fast", "exact"]
    time_limit_s: float | None
    seed: int
    gap: float
    progress: Callable[[Progress], None] | None

    def after(self, seconds: float) -> _Options:
        """What is left after some time."""
        return self if self.time_limit_s is None else replace(self, time_limit_s=max(0.0, self.time_limit_s - seconds))

    def over_time(self, problem: Problem) -> Solution:
        return solve_over_time(problem, time_limit_s=self.time_limit_s, seed=self.seed, gap=self.gap, progress=self.progress)


def _solved(problem: Problem, options: _Options) -> Solution:
    """The answer for a problem whose memory adds up exactly; what rounding can have done is taken off its bound."""
    stepped = in_steps(problem)
    ready = None if stepped is None else Ready(stepped)
    if ready is None or (problem.timed and not ready.minimiser.fits):
        found, paid = options.over_time(problem), 0.0  # prices are accounted for there
    else:
        found = _by_steps(problem, ready, (), options)
        price = found.multiplier_s_per_byte
        paid = price * problem.memory_limit_bytes if price else 0.0
    return replace(found, lower_bound_s=lowered(problem, found.lower_bound_s, paid))


def _by_steps(problem: Problem, ready: Ready, beside_bytes: tuple[float, ...], options: _Options) -> Solution:
    start = perf_counter()
    reduced, time_limit_s = ready.reduced, options.time_limit_s
    incumbent = Incumbent(ready.minimiser, problem.memory_limit_bytes, options.progress, beside_bytes)
    if time_limit_s is not None:
        incumbent.minimiser.search_s = min(incumbent.minimiser.search_s, time_limit_s / 4)
    feasible = True
    try:
        feasible = search(incumbent, options.effort, time_limit_s)
    except KeyboardInterrupt:
        if incumbent.choice is None:
            raise
        return _solution(reduced, incumbent, feasible)
    found = _solution(reduced, incumbent, feasible)
    good = incumbent.gap <= max(options.gap, GOOD_GAP)
    if incumbent.minimiser.fits or good or any(t.memory_bytes.any() for t in _edge_tables(problem)):
        return found
    rest = options.after(perf_counter() - start) if time_limit_s is not None else replace(options, time_limit_s=_UNKNOWN_S)
    try:
        other = rest.over_time(problem)
    except InfeasibleError:
        return found
    better = min(found, other, key=lambda one: (not one.feasible, one.cost_s))
    return replace(better, lower_bound_s=max(found.lower_bound_s, other.lower_bound_s), multiplier_s_per_byte=found.multiplier_s_per_byte)


def _edge_tables(problem: Problem) -> list[Table]:
    return [problem.tables[table] for table in {table for _, _, table in problem.edges}]


def search(incumbent: Incumbent, effort: Literal["fast", "exact"], time_limit_s: float | None) -> bool:
    """Improve `incumbent` as far as `effort` goes. Returns whether anything fits; if not it holds a choice of least memory."""
    minimiser = incumbent.minimiser
    least = constrained(minimiser, incumbent)
    minimiser = minimiser.weighted(incumbent.weights)
    unknown = least is not None and not least.exact
    if unknown or (effort == "exact" and least is None):
        from autopar.search.solver.exact import close_gap  # HiGHS takes a while to import

        close_gap(minimiser, incumbent, time_limit_s if effort == "exact" else min(time_limit_s or _UNKNOWN_S, _UNKNOWN_S))
    if incumbent.choice is None:
        assert least is not None
        incumbent.choice = least.choice
        incumbent.cost_s, usage = minimiser.usage(least.choice)
        incumbent.memory_bytes = incumbent.peak(usage)
        return False
    return True


def solve_with(
    problem: Problem, allowed: Mapping[int, tuple[int, ...]], multiplier_s_per_byte: float = 0.0, ready: Ready | None = None
) -> Solution:
    """The least `cost + multiplier * memory` when the nodes of `allowed` may only choose the strategies listed: one solve, cheap.

    With the multiplier of an earlier solution this prices alternatives as that solution saw them. The memory limit is not enforced;
    `feasible` says whether it holds, and `lower_bound_s` bounds every choice within it that `allowed` admits. `ready`: the problem with
    nothing restricted, made ready before.
    """
    if ready is None:
        check(problem)
        stepped = in_steps(restrict(problem, dict(allowed)))
        assert stepped is not None, "memory of few time steps"
        ready = Ready(stepped)
    minimum = ready.minimiser.minimise(Price(multiplier_s_per_byte))
    cost, usage = ready.minimiser.usage(minimum.choice)
    limit, memory = problem.memory_limit_bytes, float(usage.max())
    bound = minimum.bound - (multiplier_s_per_byte * limit if multiplier_s_per_byte else 0.0)
    return Solution(ready.reduced.original(minimum.choice), cost, memory, bound, memory <= limit, multiplier_s_per_byte)


def _solution(reduced: Reduced, incumbent: Incumbent, feasible: bool) -> Solution:
    assert incumbent.choice is not None
    bound = min(incumbent.bound_s, incumbent.cost_s) if feasible else incumbent.bound_s
    return Solution(
        reduced.original(incumbent.choice),
        float(incumbent.cost_s),
        float(incumbent.memory_bytes),
        float(bound),
        feasible and bool(np.isfinite(incumbent.cost_s)),
        float(incumbent.price),
    )
